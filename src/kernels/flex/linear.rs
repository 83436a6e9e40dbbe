//! Matrix products. Those with few rows, as in decoding, are of [`few_rows`](super::few_rows); those with
//! many of [`many_rows`](super::many_rows), weights in fewer bits being widened for them.

use burn::tensor::{DType, Shape, Tensor, TensorData, backend::Backend};
use burn_flex::FlexTensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::few_rows::{FEW, Held, products};
use super::many_rows::{among_threads, product};
use super::rows::{GroupStorage, Matrix, floats};
use super::{ARCH, PARALLEL, f32_tensor, float_tensor, tensor, typed};
use crate::kernels::operands::Factor;
use crate::kernels::packed::Packed;
#[cfg(test)]
use crate::kernels::work::is_done_by;

/// Numbers that are widened at a time for products of many rows.
const TILE: usize = 1 << 22;

/// By a weight of floats.
pub(crate) fn linear<B: Backend>(x: &Tensor<B, 3>, weight: &Tensor<B, 2>) -> Option<Tensor<B, 3>> {
    let [batch, seq, input] = x.dims();
    let [_, output] = weight.dims();
    if batch * seq <= FEW && is_worth_threads(weight) {
        return of_few(x, &[Held::floats(weight)?])?.pop();
    }
    let (x, weight) = (f32_tensor(x)?, float_tensor(weight)?);
    if weight.dtype() == DType::F32 {
        let rows = x.reshape(Shape::new([batch * seq, input]));
        let products = among_threads(&rows, &weight)?;
        return typed(products.reshape(Shape::new([batch, seq, output])));
    }
    // Whose rows are the outputs.
    let weight = weight.transpose(0, 1);
    by_tile(&x, floats(&weight)?, [batch, seq, output])
}

/// Of two matrices of f32.
pub(crate) fn matmul<B: Backend, const D: usize>(
    lhs: &Tensor<B, D>,
    rhs: &Tensor<B, D>,
) -> Option<Tensor<B, D>> {
    if D != 2 {
        return None;
    }
    typed(among_threads(&f32_tensor(lhs)?, &f32_tensor(rhs)?)?)
}

/// By a matrix in groups.
pub(crate) fn linear_packed<B: Backend>(
    x: &Tensor<B, 3>,
    weight: &Packed<B>,
) -> Option<Tensor<B, 3>> {
    let [batch, seq, _] = x.dims();
    let [_, output] = weight.dims();
    if batch * seq <= FEW {
        return of_few(x, &[Held::groups(weight)?])?.pop();
    }
    let (x, weight) = (f32_tensor(x)?, GroupStorage::of_outputs(weight)?);
    by_tile(&x, weight.groups()?, [batch, seq, output])
}

/// By several matrices.
pub(crate) fn linear_each<B: Backend>(
    x: &Tensor<B, 3>,
    weights: &[Factor<B>],
) -> Option<Vec<Tensor<B, 3>>> {
    let [batch, seq, _] = x.dims();
    let together = |weight: &Factor<B>| match weight {
        Factor::Float(weight) => is_worth_threads(weight),
        Factor::Packed(_) => true,
    };
    if batch * seq <= FEW && weights.iter().all(together) {
        let held = weights.iter().map(|weight| match weight {
            Factor::Float(weight) => Held::floats(weight),
            Factor::Packed(weight) => Held::groups(weight),
        });
        return of_few(x, &held.collect::<Option<Vec<_>>>()?);
    }
    let product = |weight: &Factor<B>| match weight {
        Factor::Float(weight) => linear(x, weight),
        Factor::Packed(weight) => linear_packed(x, weight),
    };
    weights.iter().map(product).collect()
}

/// Smaller ones are Flex's, or a tile, for any number of rows.
fn is_worth_threads<B: Backend>(weight: &Tensor<B, 2>) -> bool {
    weight.shape().num_elements() >= PARALLEL
}

fn of_few<B: Backend>(x: &Tensor<B, 3>, weights: &[Held]) -> Option<Vec<Tensor<B, 3>>> {
    let [batch, seq, input] = x.dims();
    let x = f32_tensor(x)?.to_contiguous();
    let products = products(x.as_slice()?, input, weights)?;
    let tensors = products.into_iter().map(|products| {
        let output = products.len() / (batch * seq);
        tensor(products, [batch, seq, output])
    });
    tensors.collect()
}

/// Products of many rows, of a tile of the weight at a time.
fn by_tile<B: Backend>(
    x: &FlexTensor,
    weight: impl Matrix,
    [batch, seq, output]: [usize; 3],
) -> Option<Tensor<B, 3>> {
    #[cfg(test)]
    is_done_by("by_tile");
    let (input, rows) = (weight.columns(), batch * seq);
    let x = x.to_contiguous().reshape(Shape::new([rows, input]));
    let of_tile = |first: usize, width: usize| {
        let mut numbers = vec![0.0; width * input];
        let row = |(j, to): (usize, &mut [f32])| {
            let row = first + j;
            ARCH.dispatch(Widened { weight, row, to });
        };
        numbers.par_chunks_mut(input).enumerate().for_each(row);
        let tile = FlexTensor::from_data(TensorData::new(numbers, [width, input]));
        product(&x, &tile.transpose(0, 1))
    };
    let width = (TILE / input).clamp(1, output);
    if width == output {
        let products = of_tile(0, output);
        return typed(products.reshape(Shape::new([batch, seq, output])));
    }
    let mut values = vec![0.0; rows * output];
    for first in (0..output).step_by(width) {
        let width = width.min(output - first);
        let products = of_tile(first, width);
        let products = products.as_slice::<f32>()?.par_chunks(width);
        let to = values.par_chunks_mut(output).zip(products);
        to.for_each(|(to, products)| to[first..first + width].copy_from_slice(products));
    }
    tensor(values, [batch, seq, output])
}

/// A row of a weight as f32.
struct Widened<'a, M> {
    weight: M,
    row: usize,
    to: &'a mut [f32],
}

impl<M: Matrix> WithSimd for Widened<'_, M> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.weight.widen(simd, self.row, self.to);
    }
}
