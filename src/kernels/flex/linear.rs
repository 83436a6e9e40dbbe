//! Matrix products. Those with few rows, as in decoding, read a weight once and are as fast as memory
//! is; those with many rows are left to Flex, whose matrix kernels are good, weights in fewer bits
//! being widened for them.

use std::ops::Range;

use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{Shape, Tensor, TensorData, backend::Backend};
use burn_flex::{Flex, FlexTensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::rows::{Floats, GroupStorage, Groups, Matrix, PIECE};
use super::{ARCH, PARALLEL, f32_tensor, float_tensor, simd, tensor, typed};
use crate::kernels::packed::{GROUP, Packed};
#[cfg(test)]
use crate::kernels::work::is_done_by;

/// Rows up to which memory is the limit.
const FEW: usize = 16;
/// Columns a thread works on at a time: their sums stay in the first-level cache.
const COLUMNS: usize = 1024;
/// Parts that the sum over a weight's rows is divided into, for threads to share: each is a piece of
/// memory of its own, which is read faster than every thread's share of each row.
const PARTS: usize = 8;
/// Weight rows added in one pass over the sums.
const UNROLL: usize = 4;

/// Numbers that are widened at a time for products of many rows.
const TILE: usize = 1 << 22;

/// By a weight of f32 with few rows of `x`; of f16 or bf16 with any number.
pub(crate) fn linear<B: Backend>(x: &Tensor<B, 3>, weight: &Tensor<B, 2>) -> Option<Tensor<B, 3>> {
    let [batch, seq, input] = x.dims();
    let [_, output] = weight.dims();
    let rows = batch * seq;
    let few = rows <= FEW && input * output >= PARALLEL;
    let (x, weight) = (f32_tensor(x)?, float_tensor(weight)?);
    if few && let Some(weight) = weight.as_slice::<f32>() {
        let x = x.to_contiguous();
        let values = by_input(x.as_slice()?, weight, rows, output);
        return tensor(values, [batch, seq, output]);
    }
    // Whose rows are the outputs.
    let weight = weight.transpose(0, 1);
    let weight = Floats::new(&weight)?;
    if few {
        let x = x.to_contiguous();
        let values = by_output(x.as_slice()?, weight, rows, output);
        return tensor(values, [batch, seq, output]);
    }
    match weight.is_f32() {
        true => None,
        false => by_tile(&x, weight, [batch, seq, output]),
    }
}

/// By a matrix in groups.
pub(crate) fn linear_packed<B: Backend>(
    x: &Tensor<B, 3>,
    weight: &Packed<B>,
) -> Option<Tensor<B, 3>> {
    let [batch, seq, _] = x.dims();
    let [_, output] = weight.dims();
    let rows = batch * seq;
    if !weight.transposed {
        return None;
    }
    let (x, weight) = (f32_tensor(x)?, GroupStorage::new(weight)?);
    let weight = weight.groups()?;
    if rows > FEW {
        return by_tile(&x, weight, [batch, seq, output]);
    }
    let x = x.to_contiguous();
    let values = by_groups(x.as_slice()?, weight, rows, output);
    tensor(values, [batch, seq, output])
}

/// Products of many rows by Flex's, of a tile of the weight at a time.
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
        Flex::float_matmul(x.clone(), tile.transpose(0, 1))
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

/// `weight` is `[input, output]`, row after row: sums over its rows, for blocks of columns and parts
/// of the rows, which are added in their order: the sum is the same for any number of threads or
/// rows of `x`.
fn by_input(x: &[f32], weight: &[f32], rows: usize, output: usize) -> Vec<f32> {
    #[cfg(test)]
    is_done_by("by_input");
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
    inputs: Range<usize>,
    columns: Range<usize>,
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
fn by_output(x: &[f32], weight: Floats<'_>, rows: usize, output: usize) -> Vec<f32> {
    #[cfg(test)]
    is_done_by("by_output");
    for_blocks(rows, output, |outputs, products| {
        ARCH.dispatch(Products {
            x,
            weight,
            outputs,
            products,
        });
    })
}

/// The same of a matrix in groups.
fn by_groups(x: &[f32], weight: Groups<'_>, rows: usize, output: usize) -> Vec<f32> {
    #[cfg(test)]
    is_done_by("by_groups");
    // The last group of a row may be wider than the row.
    let width = weight.per_row() * GROUP;
    let mut padded = vec![0.0; rows * width];
    let from = x.chunks(weight.columns());
    for (to, x) in padded.chunks_mut(width).zip(from) {
        to[..x.len()].copy_from_slice(x);
    }
    let x = padded.as_chunks().0;
    let sums = x.iter().map(|group: &[f32; GROUP]| group.iter().sum());
    let sums: Vec<f32> = sums.collect();
    for_blocks(rows, output, |outputs, products| {
        ARCH.dispatch(GroupProducts {
            x,
            sums: &sums,
            weight,
            outputs,
            products,
        });
    })
}

/// Products `[rows, output]` from those of blocks of outputs, `[rows, outputs]`, which threads share.
fn for_blocks(
    rows: usize,
    output: usize,
    products: impl Fn(Range<usize>, &mut [f32]) + Sync,
) -> Vec<f32> {
    let width = COLUMNS.min(output.div_ceil(rayon::current_num_threads()));
    let blocks: Vec<Vec<f32>> = (0..output.div_ceil(width))
        .into_par_iter()
        .map(|block| {
            let outputs = block * width..((block + 1) * width).min(output);
            let mut of_block = vec![0.0; rows * outputs.len()];
            products(outputs, &mut of_block);
            of_block
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
    weight: Floats<'a>,
    outputs: Range<usize>,
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

/// The same in groups: a group's scale is taken times the product of its codes, its offset times the
/// sum of x.
struct GroupProducts<'a> {
    /// `[rows, groups]`.
    x: &'a [[f32; GROUP]],
    /// `[rows, groups]`.
    sums: &'a [f32],
    weight: Groups<'a>,
    outputs: Range<usize>,
    products: &'a mut [f32],
}

impl WithSimd for GroupProducts<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (width, per_row) = (self.outputs.len(), self.weight.per_row());
        let mut codes = [0.0; PIECE];
        for (j, output) in self.outputs.enumerate() {
            for from in (0..per_row).step_by(PIECE / GROUP) {
                let groups = from..(from + PIECE / GROUP).min(per_row);
                self.weight.codes(output, groups.clone(), &mut codes);
                let scales = self.weight.scales(output, groups.clone());
                let offsets = self.weight.offsets(output, groups.clone());
                let codes = codes.as_chunks().0;
                let rows = self.x.chunks(per_row).zip(self.sums.chunks(per_row));
                for (row, (x, sums)) in rows.enumerate() {
                    let product = &mut self.products[row * width + j];
                    let scales = &scales[..groups.len()];
                    *product += simd::dot_groups(simd, codes, &x[groups.clone()], scales);
                    if let Some(offsets) = &offsets {
                        let offsets = &offsets[..groups.len()];
                        *product += simd::dot(simd, offsets, &sums[groups.clone()]);
                    }
                }
            }
        }
    }
}
