//! Sums of stored rows, each times a number.

use std::borrow::Cow;

use pulp::bytemuck::cast_slice_mut;
use pulp::{Simd, WithSimd};

use super::super::widen::Number;
use super::tile::Tile;
use super::{AT_ONCE, SideBySide, floats_at_once, of_floats};

impl<N: Number> Tile<'_, N> {
    /// What `Rows::add_sums` adds, by factors from the `first` on.
    #[inline(always)]
    pub fn add_sums<S: Simd>(
        mut self,
        simd: S,
        factors: &SideBySide<f32>,
        first: usize,
        sums: &mut [S::f32s],
    ) {
        let n_rows = self.numbers.len() / self.width;
        let vectors = self.width.div_ceil(S::F32_LANES);
        let sums = sums.chunks_mut(floats_at_once::<S>() * vectors);
        for ((rows, factors), sums) in factors.groups::<S>().zip(sums) {
            let factors = &factors[first * rows..][..n_rows * rows];
            of_floats!(rows, sums_of::<S, N>(simd, self, factors, sums));
            self.ahead = self.ahead.once();
        }
    }
}

/// What `per_row` rows are times in sums, by each row of `x` `[rows, pitch]`: their scales included.
#[inline(always)]
pub(super) fn factors<S: Simd>(
    simd: S,
    x: &[f32],
    pitch: usize,
    per_row: usize,
    scales: Option<&[f32]>,
) -> SideBySide<'static, f32> {
    let at_once = floats_at_once::<S>();
    let mut factors = vec![0.0; x.len() / pitch * per_row];
    let groups = factors.chunks_mut(at_once * per_row);
    for (group, x) in groups.zip(x.chunks(at_once * pitch)) {
        let rows = group.len() / per_row;
        of_floats!(rows, factors_of::<S>(simd, x, pitch, scales, group));
    }
    SideBySide {
        numbers: Cow::Owned(factors),
        per_row,
    }
}

/// Of R rows of floats; `factors` are side by side.
#[inline(always)]
fn sums_of<S: Simd, N: Number, const R: usize>(
    simd: S,
    tile: Tile<N>,
    factors: &[f32],
    sums: &mut [S::f32s],
) {
    let (factors, _) = factors.as_chunks();
    simd.vectorize(Sums::<N, R> {
        tile,
        factors,
        sums: cast_slice_mut(sums),
    });
}

/// R rows of `x`, `pitch` from one to the next, times `scales`: of a row of each side by side, as many as fit.
#[inline(always)]
fn factors_of<S: Simd, const R: usize>(
    _: S,
    x: &[f32],
    pitch: usize,
    scales: Option<&[f32]>,
    to: &mut [f32],
) {
    let (to, _) = to.as_chunks_mut::<R>();
    for (r, x) in x.chunks(pitch).enumerate() {
        match scales {
            Some(scales) => {
                for ((to, x), scale) in to.iter_mut().zip(x).zip(scales) {
                    to[r] = x * scale;
                }
            }
            None => {
                for (to, x) in to.iter_mut().zip(x) {
                    to[r] = *x;
                }
            }
        }
    }
}

/// By itself, so that the compiler has all registers for its loops.
struct Sums<'a, N, const R: usize> {
    tile: Tile<'a, N>,
    factors: &'a [[f32; R]],
    /// Whole vectors.
    sums: &'a mut [f32],
}

impl<N: Number, const R: usize> WithSimd for Sums<'_, N, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            mut tile,
            factors,
            sums,
        } = self;
        let (sums, _) = S::as_mut_simd_f32s(sums);
        let vectors = sums.len() / R;
        let whole = tile.width / S::F32_LANES;
        // Of one row the sums of eight vectors have registers.
        let eights = if R == 1 { whole / 8 * 8 } else { 0 };
        for first in (0..eights).step_by(8) {
            columns_of::<S, N, R, 8>(simd, tile, factors, sums, first);
            tile.ahead = tile.ahead.once();
        }
        for first in (eights..whole / 4 * 4).step_by(4) {
            columns_of::<S, N, R, 4>(simd, tile, factors, sums, first);
            tile.ahead = tile.ahead.once();
        }
        for first in whole / 4 * 4..vectors {
            columns_of::<S, N, R, 1>(simd, tile, factors, sums, first);
            tile.ahead = tile.ahead.once();
        }
    }
}

/// Those of the columns of V vectors from vector `first`; the last one of a row may be filled up.
#[inline(always)]
fn columns_of<S: Simd, N: Number, const R: usize, const V: usize>(
    simd: S,
    tile: Tile<N>,
    factors: &[[f32; R]],
    sums: &mut [S::f32s],
    first: usize,
) {
    let lanes = S::F32_LANES;
    let per_row = sums.len() / R;
    let mut added = [[simd.splat_f32s(0.0); V]; R];
    for (added, sums) in added.iter_mut().zip(sums.chunks_exact(per_row)) {
        added.copy_from_slice(&sums[first..][..V]);
    }
    let width = tile.width;
    let columns = first * lanes..((first + V) * lanes).min(width);
    let (blocks, last) = factors.as_chunks::<AT_ONCE>();
    let rows = tile.numbers.chunks_exact(AT_ONCE * width);
    let rest = rows.remainder();
    for (block, (rows, factors)) in rows.zip(blocks).enumerate() {
        tile.ahead.fetch(simd, block);
        for (k, factors) in factors.iter().enumerate() {
            let values = values_of::<S, N, V>(simd, &rows[k * width..][columns.clone()]);
            add_scaled(simd, factors, values, &mut added);
        }
    }
    for (row, factors) in rest.chunks_exact(width).zip(last) {
        let values = values_of::<S, N, V>(simd, &row[columns.clone()]);
        add_scaled(simd, factors, values, &mut added);
    }
    for (added, sums) in added.iter().zip(sums.chunks_exact_mut(per_row)) {
        sums[first..][..V].copy_from_slice(added);
    }
}

/// V vectors; a single one may have to be filled up.
#[inline(always)]
fn values_of<S: Simd, N: Number, const V: usize>(simd: S, numbers: &[N]) -> [S::f32s; V] {
    let lanes = S::F32_LANES;
    let mut values = [simd.splat_f32s(0.0); V];
    if V == 1 {
        values[0] = N::padded(simd, numbers);
    } else {
        // Of a length that the compiler knows.
        let numbers = numbers[..V * lanes].chunks_exact(lanes);
        for (value, numbers) in values.iter_mut().zip(numbers) {
            *value = N::vector(simd, numbers);
        }
    }
    values
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
