//! Matrix products with few rows, as in decoding: a weight is read from memory once, as fast as it gives it,
//! and several matrices that the same rows are multiplied with are one step among threads.

use std::array::from_fn;
use std::ops::Range;
use std::slice::ChunksExact;

use burn::tensor::{DType, Tensor, backend::Backend};
use burn_flex::FlexTensor;
use half::f16;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::narrow::{AHEAD, AT_ONCE, Rows, SideBySide, floats_at_once, of_floats};
use super::rows::{GroupStorage, Groups, floats};
use super::widen::{Coded, Int4, Int8, MOST_LANES, Number};
use super::{ARCH, PARALLEL, float_tensor, simd};
use crate::kernels::packed::{Codes, GROUP, Packed};
#[cfg(test)]
use crate::kernels::work::is_done_by;

/// Rows up to which memory is the limit.
pub(super) const FEW: usize = 16;
/// Sums that a thread has at a time, of all rows: they stay in the first-level cache.
const SUMS: usize = 4096;
/// Columns that it has at least, where it has some of every row: pieces of memory that are shorter are
/// read slower.
const COLUMNS: usize = 1024;
/// Outputs that it has at most, where it has whole rows of a weight, unless those are short.
const OUTPUTS: usize = 1024;
/// Parts that the sum over a weight's rows is divided into, for threads to share: each is a piece of
/// memory of its own, which is read faster than every thread's share of each row.
const PARTS: usize = 8;
/// Weight rows added in one pass over the sums.
const UNROLL: usize = 4;
/// Shares of the outputs for every thread, so that one that is late leaves some to others.
const SHARES: usize = 4;
/// Scales that are widened at a time, together with those of the same rows' other groups.
const SCALES: usize = 2048;

/// The tensors of a matrix `[input, output]`, as they lie.
pub(super) enum Held {
    /// f32, an input's row after another's.
    Inputs(FlexTensor),
    /// Floats, an output's row after another's: `[output, input]`.
    Outputs(FlexTensor),
    /// Groups, an output's row after another's.
    Groups(Box<GroupStorage>),
}

impl Held {
    /// None if it is not Flex's, or does not lie in one piece.
    pub fn floats<B: Backend>(weight: &Tensor<B, 2>) -> Option<Self> {
        let weight = float_tensor(weight)?;
        if weight.dtype() == DType::F32 && weight.as_slice::<f32>().is_some() {
            return Some(Self::Inputs(weight));
        }
        let outputs = weight.transpose(0, 1);
        floats(&outputs)?;
        Some(Self::Outputs(outputs))
    }

    /// None as of [`GroupStorage::of_outputs`].
    pub fn groups<B: Backend>(weight: &Packed<B>) -> Option<Self> {
        GroupStorage::of_outputs(weight).map(|groups| Self::Groups(Box::new(groups)))
    }

    fn matrix(&self) -> Option<Matrix<'_>> {
        Some(match self {
            Self::Inputs(weight) => Matrix::Inputs {
                weight: weight.as_slice()?,
                output: weight.layout().shape()[1],
            },
            Self::Outputs(weight) => Matrix::Outputs {
                weight: floats(weight)?,
                output: weight.layout().shape()[0],
            },
            Self::Groups(weight) => Matrix::Groups(weight.groups()?),
        })
    }
}

/// What a [`Held`] holds.
#[derive(Clone, Copy)]
enum Matrix<'a> {
    Inputs { weight: &'a [f32], output: usize },
    Outputs { weight: Rows<'a>, output: usize },
    Groups(Groups<'a>),
}

/// How a product is divided: inputs and outputs of a share, but for the last ones.
struct Division {
    inputs: usize,
    outputs: usize,
}

/// What a thread does at a time: sums over some inputs for some outputs.
struct Share {
    inputs: Range<usize>,
    outputs: Range<usize>,
}

/// Rows, and what products of groups need of them besides.
struct X<'a> {
    rows: &'a [f32],
    /// The rows in groups, `[rows, groups]`, the last group filled up with zeros; and the sum of each.
    groups: Vec<Group>,
    sums: Vec<f32>,
}

/// Begins at a line of memory, so that no vector of it crosses two: 16 bytes off, products of eight rows took a
/// third longer.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Group([f32; GROUP]);

/// The products of `x` `[rows, input]` with every matrix, each `[rows, output]`. How they are divided among
/// threads depends on neither the number of threads nor that of rows where sums are, so that those are
/// the same for any.
pub(super) fn products(x: &[f32], input: usize, matrices: &[Held]) -> Option<Vec<Vec<f32>>> {
    let matrices: Vec<_> = matrices.iter().map(Held::matrix).collect::<Option<_>>()?;
    #[cfg(test)]
    for matrix in &matrices {
        is_done_by(match matrix {
            Matrix::Inputs { .. } => "by_input",
            Matrix::Outputs { .. } => "by_output",
            Matrix::Groups(_) => "by_groups",
        });
    }
    let x = X::new(x, input, &matrices);
    let n_rows = x.rows.len() / input;
    let divided = |matrix: &Matrix| {
        let of = matrix.division(input, n_rows);
        let parts = input.div_ceil(of.inputs);
        (of, vec![0.0; parts * n_rows * matrix.output()])
    };
    let mut divided: Vec<_> = matrices.iter().map(divided).collect();
    let mut shares = Vec::new();
    for (matrix, (of, sums)) in matrices.iter().zip(&mut divided) {
        let output = matrix.output();
        for (part, sums) in sums.chunks_mut(n_rows * output).enumerate() {
            let inputs = part * of.inputs..((part + 1) * of.inputs).min(input);
            for (i, sums) in sums.chunks_mut(n_rows * of.outputs).enumerate() {
                let outputs = i * of.outputs..((i + 1) * of.outputs).min(output);
                let inputs = inputs.clone();
                shares.push((matrix, Share { inputs, outputs }, sums));
            }
        }
    }
    let product = |(matrix, share, sums): (&Matrix, Share, _)| matrix.product(&x, share, sums);
    let outputs: usize = matrices.iter().map(Matrix::output).sum();
    match input * outputs < PARALLEL {
        true => shares.into_iter().for_each(product),
        false => shares.into_par_iter().for_each(product),
    }
    let whole = |(matrix, (of, sums)): (&Matrix, (Division, Vec<f32>))| {
        // The sums of one share after another are then all there is.
        match of.inputs == input && n_rows == 1 {
            true => sums,
            false => put_together(&sums, n_rows, matrix.output(), of.outputs),
        }
    };
    Some(matrices.iter().zip(divided).map(whole).collect())
}

/// The products of rows, of parts of their inputs: for each part, and each share of the outputs, the
/// sums `[rows, outputs]`.
fn put_together(sums: &[f32], n_rows: usize, output: usize, width: usize) -> Vec<f32> {
    let mut products = vec![0.0; n_rows * output];
    for part in sums.chunks(n_rows * output) {
        for (i, share) in part.chunks(n_rows * width).enumerate() {
            let rows = share.chunks(share.len() / n_rows);
            for (product, sums) in products.chunks_mut(output).zip(rows) {
                let product = &mut product[i * width..][..sums.len()];
                product.iter_mut().zip(sums).for_each(|(sum, x)| *sum += x);
            }
        }
    }
    products
}

impl<'a> X<'a> {
    fn new(rows: &'a [f32], input: usize, matrices: &[Matrix]) -> Self {
        let (mut groups, mut sums) = (Vec::new(), Vec::new());
        if matrices.iter().any(|m| matches!(m, Matrix::Groups(_))) {
            groups = vec![Group([0.0; GROUP]); rows.len() / input * input.div_ceil(GROUP)];
            let of_rows = rows.chunks(input).flat_map(|row| row.chunks(GROUP));
            for (group, numbers) in groups.iter_mut().zip(of_rows) {
                group.0[..numbers.len()].copy_from_slice(numbers);
            }
            sums.extend(groups.iter().map(|group| group.0.iter().sum::<f32>()));
        }
        Self { rows, groups, sums }
    }
}

impl Matrix<'_> {
    fn output(&self) -> usize {
        match self {
            Self::Inputs { output, .. } | Self::Outputs { output, .. } => *output,
            Self::Groups(groups) => groups.rows(),
        }
    }

    fn division(&self, input: usize, n_rows: usize) -> Division {
        let output = self.output();
        match self {
            // Sums over inputs are formed in parts where every output is in each row of memory.
            Self::Inputs { .. } => Division {
                inputs: input.div_ceil(PARTS).next_multiple_of(UNROLL).min(input),
                // Of whole vectors, so that each column is added up alike for any number of rows.
                outputs: ((SUMS / n_rows).max(COLUMNS) / MOST_LANES * MOST_LANES).min(output),
            },
            Self::Outputs { .. } | Self::Groups(_) => {
                let shares = SHARES * rayon::current_num_threads();
                let least = (PARALLEL / input).max(1);
                let outputs = output.div_ceil(shares).clamp(least, OUTPUTS.max(least));
                Division {
                    inputs: input,
                    outputs: outputs.next_multiple_of(AT_ONCE).min(output),
                }
            }
        }
    }

    /// Adds to `[rows, outputs of the share]`, which are 0.
    fn product(&self, x: &X, share: Share, products: &mut [f32]) {
        let Share { inputs, outputs } = share;
        match *self {
            Self::Inputs { weight, output } => ARCH.dispatch(SumOfRows {
                x: x.rows,
                weight,
                inputs,
                columns: outputs,
                output,
                sums: products,
            }),
            Self::Outputs { weight, .. } => ARCH.dispatch(Products {
                x: x.rows,
                weight,
                outputs,
                products,
            }),
            Self::Groups(weight) => ARCH.dispatch(GroupProducts {
                x,
                weight,
                outputs,
                products,
            }),
        }
    }
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
        let at_once = floats_at_once::<S>();
        let passes = self.x.len().div_ceil(input * at_once);
        let unrolled = self.inputs.end - self.inputs.len() % UNROLL;
        for i in (self.inputs.start..unrolled).step_by(UNROLL) {
            let weights: [&[f32]; UNROLL] = from_fn(|u| weight_row(i + u));
            let x = self.x.chunks(at_once * input);
            let sums = self.sums.chunks_mut(at_once * width);
            for (pass, (x, sums)) in x.zip(sums).enumerate() {
                // The same columns of the next rows are read next. Where several passes use these, only the
                // first reads memory, so each of up to four has some of the next rows fetched.
                let above = match passes {
                    1 => &[],
                    _ => (weights.chunks(UNROLL.div_ceil(passes)).nth(pass)).unwrap_or_default(),
                };
                let fetched = (above, UNROLL * self.output * size_of::<f32>());
                let (x, rows) = (&x[i..], sums.len() / width);
                of_floats!(rows, add_rows::<S>(simd, x, input, weights, fetched, sums));
            }
        }
        for i in unrolled..self.inputs.end {
            for (x, sums) in self.x.chunks(input).zip(self.sums.chunks_mut(width)) {
                simd::axpy(simd, x[i], weight_row(i), sums);
            }
        }
    }
}

/// `sums[r] += Σ_u x[r][u] · weights[u]` for R rows of x, each `pitch` numbers after the one before. Meanwhile the
/// memory `ahead` bytes after each row of `fetched` is fetched.
#[inline(always)]
fn add_rows<S: Simd, const R: usize>(
    simd: S,
    x: &[f32],
    pitch: usize,
    weights: [&[f32]; UNROLL],
    (fetched, ahead): (&[&[f32]], usize),
    sums: &mut [f32],
) {
    let factor = |u: usize, r: usize| simd.splat_f32s(x[r * pitch + u]);
    let factors = from_fn(|u| from_fn(|r| factor(u, r)));
    let width = weights[0].len();
    let pairs = width / S::F32_LANES / 2;
    let mut rows = sums.chunks_exact_mut(width);
    let mut rows: [_; R] = from_fn(|_| {
        let (row, tail) = S::as_mut_simd_f32s(rows.next().expect("R rows of sums"));
        let (row, last) = row.as_chunks_mut::<2>();
        (&mut row[..pairs], last, tail)
    });
    let weights = weights.map(|row| {
        let (row, tail) = S::as_simd_f32s(row);
        let (row, last) = row.as_chunks::<2>();
        (&row[..pairs], last, tail)
    });
    for j in 0..pairs {
        for row in fetched {
            for j in [2 * j, 2 * j + 1] {
                simd::fetch_ahead(simd, &row[j * S::F32_LANES], ahead);
            }
        }
        let weights = weights.each_ref().map(|(row, ..)| &row[j]);
        add_vectors(
            simd,
            &factors,
            weights,
            rows.each_mut().map(|(row, ..)| &mut row[j]),
        );
    }
    if width / S::F32_LANES > 2 * pairs {
        const ODD: &str = "a vector beside the pairs";
        let weights = weights.map(|(_, last, _)| last.first_chunk::<1>().expect(ODD));
        let sums = rows
            .each_mut()
            .map(|(_, last, _)| last.first_chunk_mut::<1>().expect(ODD));
        add_vectors(simd, &factors, weights, sums);
    }
    for (r, (.., tail)) in rows.into_iter().enumerate() {
        for (j, sum) in tail.iter_mut().enumerate() {
            for (u, (.., weight)) in weights.iter().enumerate() {
                *sum += x[r * pitch + u] * weight[j];
            }
        }
    }
}

/// `sums[r] += Σ_u factors[u][r] · weights[u]`, of K neighbouring vectors.
#[inline(always)]
fn add_vectors<S: Simd, const R: usize, const K: usize>(
    simd: S,
    factors: &[[S::f32s; R]; UNROLL],
    weights: [&[S::f32s; K]; UNROLL],
    sums: [&mut [S::f32s; K]; R],
) {
    let mut added = sums.each_ref().map(|sum| **sum);
    for (factors, weights) in factors.iter().zip(&weights) {
        for (added, &factor) in added.iter_mut().zip(factors) {
            for (added, &weight) in added.iter_mut().zip(*weights) {
                *added = simd.mul_add_f32s(factor, weight, *added);
            }
        }
    }
    for (sum, added) in sums.into_iter().zip(added) {
        *sum = added;
    }
}

/// x[row] · weight[j] for all rows and some j.
struct Products<'a> {
    x: &'a [f32],
    weight: Rows<'a>,
    outputs: Range<usize>,
    products: &'a mut [f32],
}

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let pitch = self.outputs.len();
        (self.weight).add_products(simd, self.x, self.outputs, self.products, pitch);
    }
}

/// The same in groups: a group's scale is taken times the product of its codes, its offset times the
/// sum of x.
struct GroupProducts<'a> {
    x: &'a X<'a>,
    weight: Groups<'a>,
    outputs: Range<usize>,
    products: &'a mut [f32],
}

impl WithSimd for GroupProducts<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.weight.codes() {
            Codes::Int8 => self.coded::<S, Int8>(simd),
            Codes::Int4 => self.coded::<S, Int4>(simd),
        }
    }
}

impl GroupProducts<'_> {
    #[inline(always)]
    fn coded<S: Simd, C: Coded>(self, simd: S) {
        let (width, per_row) = (self.outputs.len(), self.weight.per_row());
        let Self { x, weight, .. } = self;
        let at_once = (SCALES / per_row).clamp(1, width);
        let groups = SideBySide::new::<S>(&x.groups, per_row);
        let mut buffers = [(); 2].map(|()| vec![0.0; at_once * per_row]);
        let [scales, offsets] = &mut buffers;
        for first in (0..width).step_by(at_once) {
            let last = (first + at_once).min(width);
            let outputs = self.outputs.start + first..self.outputs.start + last;
            // Of several rows in one go, which has hardly an end that fills no vector.
            let scales = &mut scales[..(last - first) * per_row];
            f16::widened(simd, weight.scales(outputs.clone()), scales);
            let offsets = match weight.offsets(outputs.clone()) {
                None => None,
                Some(numbers) => {
                    let offsets = &mut offsets[..numbers.len()];
                    f16::widened(simd, numbers, offsets);
                    Some(&*offsets)
                }
            };
            let bytes = weight.bytes(outputs);
            let bytes = bytes.chunks_exact(per_row * C::CODES.bytes());
            let products = self.products.chunks_mut(floats_at_once::<S>() * width);
            for ((rows, x), products) in groups.groups::<S>().zip(products) {
                let (bytes, products) = (bytes.clone(), &mut products[first..]);
                of_floats!(
                    rows,
                    products_of::<S, C>(simd, x, bytes, scales, products, width)
                );
            }
            if let Some(offsets) = offsets {
                for (j, offsets) in (first..last).zip(offsets.chunks(per_row)) {
                    for (row, sums) in x.sums.chunks(per_row).enumerate() {
                        self.products[row * width + j] += simd::dot(simd, offsets, sums);
                    }
                }
            }
        }
    }
}

/// Rows of codes with their scales, times R rows x side by side: the products `[rows, pitch]`.
#[inline(always)]
fn products_of<S: Simd, C: Coded, const R: usize>(
    simd: S,
    x: &[Group],
    bytes: ChunksExact<i8>,
    scales: &[f32],
    products: &mut [f32],
    pitch: usize,
) {
    let (x, _) = x.as_chunks::<R>();
    for (j, (bytes, scales)) in bytes.zip(scales.chunks(x.len())).enumerate() {
        let found = dot_codes::<S, C, R>(simd, bytes, x, scales);
        for (r, found) in found.into_iter().enumerate() {
            products[r * pitch + j] = found;
        }
    }
}

/// Σ_g scales[g] · (codes of g · x_g), for R rows x.
#[inline(always)]
fn dot_codes<S: Simd, C: Coded, const R: usize>(
    simd: S,
    bytes: &[i8],
    x: &[[Group; R]],
    scales: &[f32],
) -> [f32; R] {
    let width = C::CODES.bytes();
    // Groups take turns, because each waits for the last addition to its sum.
    let (mut even, mut odd) = ([simd.splat_f32s(0.0); R], [simd.splat_f32s(0.0); R]);
    let (x_pairs, x_last) = x.as_chunks::<2>();
    let (pairs, last) = scales.as_chunks::<2>();
    let (bytes, bytes_last) = bytes.split_at(2 * pairs.len() * width);
    for ((bytes, x), scales) in bytes.chunks_exact(2 * width).zip(x_pairs).zip(pairs) {
        let (first, second) = bytes.split_at(width);
        simd::fetch_ahead(simd, &first[0], AHEAD);
        add_group::<S, C, R>(simd, first, &x[0], scales[0], &mut even);
        add_group::<S, C, R>(simd, second, &x[1], scales[1], &mut odd);
    }
    if let ([x], [scale]) = (x_last, last) {
        add_group::<S, C, R>(simd, bytes_last, x, *scale, &mut even);
    }
    let mut found = [0.0; R];
    for ((found, even), odd) in found.iter_mut().zip(even).zip(odd) {
        *found = simd.reduce_sum_f32s(simd.add_f32s(even, odd));
    }
    found
}

/// Adds the codes of a group times R rows x and their scale.
#[inline(always)]
fn add_group<S: Simd, C: Coded, const R: usize>(
    simd: S,
    bytes: &[i8],
    x: &[Group; R],
    scale: f32,
    sums: &mut [S::f32s; R],
) {
    let scale = simd.splat_f32s(scale);
    let mut products = [simd.splat_f32s(0.0); R];
    for i in 0..GROUP / S::F32_LANES {
        let codes = C::vector(simd, bytes, i * S::F32_LANES);
        for (product, x) in products.iter_mut().zip(x) {
            let (x, _) = S::as_simd_f32s(&x.0);
            *product = match i {
                0 => simd.mul_f32s(codes, x[0]),
                _ => simd.mul_add_f32s(codes, x[i], *product),
            };
        }
    }
    for (sum, product) in sums.iter_mut().zip(products) {
        *sum = simd.mul_add_f32s(product, scale, *sum);
    }
}
