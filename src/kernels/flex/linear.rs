//! Matrix products with few rows: decoding. They read a weight once and are as fast as memory is;
//! products with many rows are left to Flex, whose matrix kernels are good.

use burn::tensor::{Tensor, backend::Backend};
use burn_flex::FlexTensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{ARCH, PARALLEL, f32_tensor, simd, tensor};

/// Rows up to which memory is the limit.
const FEW: usize = 16;
/// Columns a thread works on at a time: their sums stay in the first-level cache.
const COLUMNS: usize = 1024;
/// Parts that the sum over a weight's rows is divided into, for threads to share: each is a piece of
/// memory of its own, which is read faster than every thread's share of each row.
const PARTS: usize = 8;
/// Weight rows added in one pass over the sums.
const UNROLL: usize = 4;

pub(crate) fn linear<B: Backend>(x: &Tensor<B, 3>, weight: &Tensor<B, 2>) -> Option<Tensor<B, 3>> {
    let [batch, seq, input] = x.dims();
    let [_, output] = weight.dims();
    let rows = batch * seq;
    if rows > FEW || input * output < PARALLEL {
        return None;
    }
    let (x, weight) = (f32_tensor(x)?.to_contiguous(), f32_tensor(weight)?);
    let x = x.as_slice::<f32>()?;
    let values = if let Some(weight) = weight.as_slice::<f32>() {
        by_input(x, weight, rows, output)
    } else {
        by_output(x, transposed(&weight)?.as_slice::<f32>()?, rows, output)
    };
    tensor(values, [batch, seq, output])
}

/// The tensor whose transpose `weight` is, if that lies in one piece.
fn transposed(weight: &FlexTensor) -> Option<FlexTensor> {
    let weight = weight.transpose(0, 1);
    weight.is_contiguous().then_some(weight)
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
fn by_output(x: &[f32], weight: &[f32], rows: usize, output: usize) -> Vec<f32> {
    let input = weight.len() / output;
    let width = COLUMNS.min(output.div_ceil(rayon::current_num_threads()));
    let blocks: Vec<Vec<f32>> = weight
        .par_chunks(width * input)
        .map(|weight| {
            let mut products = vec![0.0; rows * (weight.len() / input)];
            ARCH.dispatch(Products {
                x,
                weight,
                input,
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

/// x[row] · weight[j] for all rows and j.
struct Products<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    input: usize,
    products: &'a mut [f32],
}

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.weight.len() / self.input;
        for (j, weight) in self.weight.chunks(self.input).enumerate() {
            for (row, x) in self.x.chunks(self.input).enumerate() {
                self.products[row * width + j] = simd::dot(simd, x, weight);
            }
        }
    }
}
