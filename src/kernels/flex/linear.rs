//! Matrix products. Those with few rows, as in decoding, read a weight once and are as fast as memory
//! is; those with many rows are left to Flex, whose matrix kernels are good, weights in fewer bits
//! being widened for them.

use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{Shape, Tensor, TensorData, backend::Backend};
use burn_flex::{Flex, FlexTensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::rows::{RowStorage, Rows};
use super::{ARCH, PARALLEL, f32_tensor, simd, tensor, typed};
use crate::kernels::packed::Packed;

/// Rows up to which memory is the limit.
const FEW: usize = 16;
/// Columns a thread works on at a time: their sums stay in the first-level cache.
const COLUMNS: usize = 1024;
/// Parts that the sum over a weight's rows is divided into, for threads to share: each is a piece of
/// memory of its own, which is read faster than every thread's share of each row.
const PARTS: usize = 8;
/// Weight rows added in one pass over the sums.
const UNROLL: usize = 4;

/// Columns that are widened at a time: they stay in the first-level cache.
const PIECE: usize = 1024;
/// Numbers that are widened at a time for products of many rows.
const TILE: usize = 1 << 22;

/// By a weight of f32 with few rows of `x`; of f16 or bf16 with any number.
pub(crate) fn linear<B: Backend>(x: &Tensor<B, 3>, weight: &Tensor<B, 2>) -> Option<Tensor<B, 3>> {
    let [batch, seq, input] = x.dims();
    let [_, output] = weight.dims();
    let rows = batch * seq;
    let few = rows <= FEW && input * output >= PARALLEL;
    if few
        && let Some(weight) = f32_tensor(weight)
        && let Some(weight) = weight.as_slice::<f32>()
    {
        let x = f32_tensor(x)?.to_contiguous();
        let values = by_input(x.as_slice()?, weight, rows, output);
        return tensor(values, [batch, seq, output]);
    }
    let weight = RowStorage::transposed(weight)?;
    match few || !weight.is_f32() {
        true => by_rows(x, &weight, output),
        false => None,
    }
}

/// By a matrix in groups.
pub(crate) fn linear_packed<B: Backend>(
    x: &Tensor<B, 3>,
    weight: &Packed<B>,
) -> Option<Tensor<B, 3>> {
    let [_, output] = weight.dims();
    by_rows(x, &RowStorage::packed(weight)?, output)
}

fn by_rows<B: Backend>(
    x: &Tensor<B, 3>,
    weight: &RowStorage,
    output: usize,
) -> Option<Tensor<B, 3>> {
    let [batch, seq, _] = x.dims();
    let rows = batch * seq;
    let x = f32_tensor(x)?.to_contiguous();
    let weight = weight.rows()?;
    if rows > FEW {
        let products = by_tile(&x, weight, rows, output)?;
        return typed(products.reshape(Shape::new([batch, seq, output])));
    }
    let values = by_output(x.as_slice()?, weight, rows, output);
    tensor(values, [batch, seq, output])
}

/// Products of many rows by Flex's, of a tile of the weight at a time.
fn by_tile(x: &FlexTensor, weight: Rows<'_>, rows: usize, output: usize) -> Option<FlexTensor> {
    let input = weight.columns();
    let x = x.reshape(Shape::new([rows, input]));
    let of_tile = |first: usize, width: usize| {
        let mut numbers = vec![0.0; width * input];
        let row = |(j, to): (usize, &mut [f32])| {
            ARCH.dispatch(Widened {
                weight,
                row: first + j,
                to,
            });
        };
        numbers.par_chunks_mut(input).enumerate().for_each(row);
        let tile = FlexTensor::from_data(TensorData::new(numbers, [width, input]));
        Flex::float_matmul(x.clone(), tile.transpose(0, 1))
    };
    let width = (TILE / input).clamp(1, output);
    if width == output {
        return Some(of_tile(0, output));
    }
    let mut values = vec![0.0; rows * output];
    for first in (0..output).step_by(width) {
        let width = width.min(output - first);
        let products = of_tile(first, width);
        let products = products.as_slice::<f32>()?.par_chunks(width);
        let to = values.par_chunks_mut(output).zip(products);
        to.for_each(|(to, products)| to[first..first + width].copy_from_slice(products));
    }
    let values = TensorData::new(values, [rows, output]);
    Some(FlexTensor::from_data(values))
}

/// A row of a weight as f32.
struct Widened<'a> {
    weight: Rows<'a>,
    row: usize,
    to: &'a mut [f32],
}

impl WithSimd for Widened<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.weight
            .piece(self.row, 0..self.weight.columns(), self.to);
    }
}

/// `weight` is `[input, output]`, row after row: sums over its rows, for blocks of columns and parts
/// of the rows, which are added in their order: the sum is the same for any number of threads or
/// rows of `x`.
fn by_input(x: &[f32], weight: &[f32], rows: usize, output: usize) -> Vec<f32> {
    let input = weight.len() / output;
    let part = input.div_ceil(PARTS).next_multiple_of(UNROLL);
    let tasks: Vec<_> = (0..input)
        .step_by(part)
        .flat_map(|from| (0..output).step_by(COLUMNS).map(move |left| (from, left)))
        .collect();
    let sums: Vec<Vec<f32>> = tasks
        .par_iter()
        .map(|&(from, left)| {
            let columns = left..(left + COLUMNS).min(output);
            let mut sums = vec![0.0; rows * columns.len()];
            ARCH.dispatch(SumOfRows {
                x,
                weight,
                inputs: from..(from + part).min(input),
                columns,
                output,
                sums: &mut sums,
            });
            sums
        })
        .collect();
    let mut values = vec![0.0; rows * output];
    for (&(_, left), sums) in tasks.iter().zip(&sums) {
        let width = sums.len() / rows;
        for (row, sums) in sums.chunks(width).enumerate() {
            let values = &mut values[row * output + left..][..width];
            for (value, sum) in values.iter_mut().zip(sums) {
                *value += sum;
            }
        }
    }
    values
}

/// Σ_i x[row][i] · weight[i][columns] for a range of i.
struct SumOfRows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    inputs: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    output: usize,
    sums: &'a mut [f32],
}

impl WithSimd for SumOfRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let input = self.weight.len() / self.output;
        let width = self.columns.len();
        let weight_row = |i: usize| &self.weight[i * self.output + self.columns.start..][..width];
        let unrolled = self.inputs.end - self.inputs.len() % UNROLL;
        for i in (self.inputs.start..unrolled).step_by(UNROLL) {
            let weights: [&[f32]; UNROLL] = std::array::from_fn(|u| weight_row(i + u));
            for (x, sums) in self.x.chunks(input).zip(self.sums.chunks_mut(width)) {
                add_rows(simd, &x[i..], weights, sums);
            }
        }
        for i in unrolled..self.inputs.end {
            for (x, sums) in self.x.chunks(input).zip(self.sums.chunks_mut(width)) {
                simd::axpy(simd, x[i], weight_row(i), sums);
            }
        }
    }
}

/// `sums += Σ_u x[u] · weights[u]`.
#[inline(always)]
fn add_rows<S: Simd>(simd: S, x: &[f32], weights: [&[f32]; UNROLL], sums: &mut [f32]) {
    let factors: [S::f32s; UNROLL] = std::array::from_fn(|u| simd.splat_f32s(x[u]));
    let [(w0, t0), (w1, t1), (w2, t2), (w3, t3)] = weights.map(S::as_simd_f32s);
    let (sums, sums_tail) = S::as_mut_simd_f32s(sums);
    for ((((sum, &w0), &w1), &w2), &w3) in sums.iter_mut().zip(w0).zip(w1).zip(w2).zip(w3) {
        let low = simd.mul_add_f32s(factors[0], w0, *sum);
        let low = simd.mul_add_f32s(factors[1], w1, low);
        let high = simd.mul_f32s(factors[2], w2);
        let high = simd.mul_add_f32s(factors[3], w3, high);
        *sum = simd.add_f32s(low, high);
    }
    for (j, sum) in sums_tail.iter_mut().enumerate() {
        *sum += x[0] * t0[j] + x[1] * t1[j] + x[2] * t2[j] + x[3] * t3[j];
    }
}

/// `weight` is `[output, input]`, row after row, as an embedding is: one product per row.
fn by_output(x: &[f32], weight: Rows<'_>, rows: usize, output: usize) -> Vec<f32> {
    let width = COLUMNS.min(output.div_ceil(rayon::current_num_threads()));
    let blocks: Vec<Vec<f32>> = (0..output.div_ceil(width))
        .into_par_iter()
        .map(|block| {
            let outputs = block * width..((block + 1) * width).min(output);
            let mut products = vec![0.0; rows * outputs.len()];
            ARCH.dispatch(Products {
                x,
                weight,
                outputs,
                products: &mut products,
            });
            products
        })
        .collect();
    let mut values = Vec::with_capacity(rows * output);
    for row in 0..rows {
        for block in &blocks {
            let width = block.len() / rows;
            values.extend_from_slice(&block[row * width..][..width]);
        }
    }
    values
}

/// x[row] · weight[j] for all rows and some j.
struct Products<'a> {
    x: &'a [f32],
    weight: Rows<'a>,
    outputs: std::ops::Range<usize>,
    products: &'a mut [f32],
}

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (width, input) = (self.outputs.len(), self.weight.columns());
        let mut scratch = [0.0; PIECE];
        for (j, output) in self.outputs.enumerate() {
            for from in (0..input).step_by(PIECE) {
                let piece = from..(from + PIECE).min(input);
                let weight = self.weight.piece(output, piece.clone(), &mut scratch);
                for (row, x) in self.x.chunks(input).enumerate() {
                    self.products[row * width + j] += simd::dot(simd, &x[piece.clone()], weight);
                }
            }
        }
    }
}
