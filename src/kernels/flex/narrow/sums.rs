//! Sums of stored rows, each times a number.

use std::ops::Range;

use pulp::Simd;

use super::super::widen::Number;
use super::Lines;

/// What `Rows::add_sums` adds, of R rows of floats.
#[inline(always)]
pub(super) fn sums_of<S: Simd, N: Number, const R: usize>(
    simd: S,
    lines: Lines<N>,
    x: &[f32],
    pitch: usize,
    range: Range<usize>,
    sums: &mut [S::f32s],
) {
    let mut factors = vec![[0.0; R]; range.len()];
    for (r, x) in x.chunks(pitch).enumerate() {
        for (factors, x) in factors.iter_mut().zip(x) {
            factors[r] = *x;
        }
    }
    if let Some(scales) = lines.scales {
        for (factors, scale) in factors.iter_mut().zip(&scales[range.clone()]) {
            for factor in factors {
                *factor *= scale;
            }
        }
    }
    let (lanes, width) = (S::F32_LANES, lines.width);
    let vectors = sums.len() / R;
    let whole = width / lanes;
    let mut first = 0;
    while first + 4 <= whole {
        let columns = first * lanes..(first + 4) * lanes;
        let mut block = [[simd.splat_f32s(0.0); 4]; R];
        for (row, factors) in range.clone().zip(&factors) {
            let mut values = [simd.splat_f32s(0.0); 4];
            let row = lines.line(row)[columns.clone()].chunks_exact(lanes);
            for (value, row) in values.iter_mut().zip(row) {
                *value = N::vector(simd, row);
            }
            add_scaled(simd, factors, values, &mut block);
        }
        add_block(simd, block, sums, vectors, first);
        first += 4;
    }
    for first in first..vectors {
        let columns = first * lanes..((first + 1) * lanes).min(width);
        let mut block = [[simd.splat_f32s(0.0); 1]; R];
        for (row, factors) in range.clone().zip(&factors) {
            let value = N::padded(simd, &lines.line(row)[columns.clone()]);
            add_scaled(simd, factors, [value], &mut block);
        }
        add_block(simd, block, sums, vectors, first);
    }
}

/// `sums[r] += factors[r] · values`.
#[inline(always)]
fn add_scaled<S: Simd, const R: usize, const V: usize>(
    simd: S,
    factors: &[f32; R],
    values: [S::f32s; V],
    sums: &mut [[S::f32s; V]; R],
) {
    for (&factor, sums) in factors.iter().zip(sums) {
        let factor = simd.splat_f32s(factor);
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum = simd.mul_add_f32s(factor, value, *sum);
        }
    }
}

/// Adds the sums of some columns, from vector `first`, to those of R rows of `vectors` vectors.
#[inline(always)]
fn add_block<S: Simd, const R: usize, const V: usize>(
    simd: S,
    block: [[S::f32s; V]; R],
    sums: &mut [S::f32s],
    vectors: usize,
    first: usize,
) {
    for (block, sums) in block.iter().zip(sums.chunks_exact_mut(vectors)) {
        for (sum, &x) in sums[first..][..V].iter_mut().zip(block) {
            *sum = simd.add_f32s(*sum, x);
        }
    }
}
