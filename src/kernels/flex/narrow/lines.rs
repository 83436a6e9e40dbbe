//! Stored rows of one type, divided into tiles, each of which is multiplied with all rows of floats before the next
//! is.

use std::ops::Range;

use pulp::Simd;

use super::super::widen::{Number, has_avx2_alone, scaled};
use super::sums::factors;
use super::tile::{Ahead, Tile};
use super::{AHEAD, AT_ONCE, LONG, SideBySide, floats_at_once};

/// Bytes of stored rows that are multiplied with some rows of floats before the next are: they stay in the
/// second-level cache.
const BLOCK: usize = 1 << 18;

/// `Rows` of one type of numbers.
#[derive(Clone, Copy)]
pub(super) struct Lines<'a, N> {
    numbers: &'a [N],
    stride: usize,
    width: usize,
    /// What each row is times.
    scales: Option<&'a [f32]>,
}

impl<'a, N: Number> Lines<'a, N> {
    pub fn new(numbers: &'a [N], stride: usize, width: usize, scales: Option<&'a [f32]>) -> Self {
        Self {
            numbers,
            stride,
            width,
            scales,
        }
    }

    #[inline(always)]
    pub fn widen<S: Simd>(&self, simd: S, rows: Range<usize>, to: &mut [f32]) {
        if self.is_in_one_piece() && self.scales.is_none() {
            return N::widened(simd, self.numbers_of(&rows), to);
        }
        for (to, row) in to.chunks_exact_mut(self.width).zip(rows) {
            let numbers = &self.numbers[row * self.stride..][..self.width];
            match self.scales {
                Some(scales) => scaled(simd, numbers, scales[row], to),
                None => N::widened(simd, numbers, to),
            }
        }
    }

    fn is_in_one_piece(&self) -> bool {
        self.stride == self.width
    }

    /// Of rows one behind the other.
    fn numbers_of(&self, rows: &Range<usize>) -> &'a [N] {
        &self.numbers[rows.start * self.width..rows.end * self.width]
    }

    #[inline(always)]
    pub fn add_products<S: Simd>(
        &self,
        simd: S,
        x: &[f32],
        range: Range<usize>,
        products: &mut [f32],
        pitch: usize,
    ) {
        let x = vectors(simd, x, self.width);
        let x = SideBySide::new::<S>(&x, self.width.div_ceil(S::F32_LANES));
        let is_widened = self.is_widened(simd, x.n_rows());
        let is_tiled = is_widened || gains_by_tiles(simd, self.width);
        let mut scratch = Vec::new();
        for rows in self.tiles::<S>(is_tiled, x.n_rows(), range.clone()) {
            let products = &mut products[rows.start - range.start..];
            let ahead = if is_tiled {
                self.behind(&rows)
            } else if self.width < LONG {
                Ahead::Nothing
            } else {
                Ahead::Lines
            };
            match is_widened {
                true => {
                    let tile = self.widened(simd, rows, ahead, &mut scratch);
                    tile.add_products(simd, &x, products, pitch);
                }
                false => {
                    let tile = self.tile(rows, ahead);
                    tile.add_products(simd, &x, products, pitch);
                }
            }
        }
    }

    #[inline(always)]
    pub fn add_sums<S: Simd>(
        &self,
        simd: S,
        x: &[f32],
        pitch: usize,
        range: Range<usize>,
        sums: &mut [S::f32s],
    ) {
        if range.is_empty() {
            return;
        }
        let scales = self.scales.map(|scales| &scales[range.clone()]);
        let factors = factors(simd, x, pitch, range.len(), scales);
        let is_widened = self.is_widened(simd, factors.n_rows());
        // f32 gained nothing, and lost in wide rows.
        let is_narrow = size_of::<N>() < size_of::<f32>();
        let is_tiled = is_widened || is_narrow && gains_by_tiles(simd, self.width);
        let mut scratch = Vec::new();
        for rows in self.tiles::<S>(is_tiled, factors.n_rows(), range.clone()) {
            let first = rows.start - range.start;
            let ahead = match is_tiled {
                true => self.behind(&rows),
                false => Ahead::Nothing,
            };
            match is_widened {
                true => {
                    let tile = self.widened(simd, rows, ahead, &mut scratch);
                    tile.add_sums(simd, &factors, first, sums);
                }
                false => {
                    let tile = self.tile(rows, ahead);
                    tile.add_sums(simd, &factors, first, sums);
                }
            }
        }
    }

    /// Whether rows are widened to memory before they are multiplied, and not in registers: where that takes fewer
    /// instructions, unless long rows are read for one pass, and where rows do not lie one behind the other.
    #[inline(always)]
    fn is_widened<S: Simd>(&self, simd: S, n_rows: usize) -> bool {
        let again = n_rows > floats_at_once::<S>();
        !self.is_in_one_piece() || N::widens_slices_faster(simd) && (self.width < LONG || again)
    }

    /// The rows of each tile.
    #[inline(always)]
    fn tiles<S: Simd>(
        &self,
        is_tiled: bool,
        n_rows: usize,
        range: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> {
        let (at_once, bytes) = (floats_at_once::<S>(), self.width * size_of::<N>());
        let rows = if is_tiled {
            AHEAD / bytes
        } else if n_rows > at_once {
            BLOCK / bytes
        } else {
            range.len()
        };
        let rows = rows.next_multiple_of(AT_ONCE).max(AT_ONCE);
        let starts = range.clone().step_by(rows);
        starts.map(move |start| start..(start + rows).min(range.end))
    }

    /// Rows one behind the other as they lie.
    fn tile(&self, rows: Range<usize>, ahead: Ahead) -> Tile<'a, N> {
        Tile {
            numbers: self.numbers_of(&rows),
            width: self.width,
            scales: self.scales.map(|scales| &scales[rows]),
            ahead,
        }
    }

    /// Rows as f32.
    #[inline(always)]
    fn widened<'t, S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        ahead: Ahead,
        scratch: &'t mut Vec<f32>,
    ) -> Tile<'t, f32>
    where
        'a: 't,
    {
        scratch.resize(rows.len() * self.width, 0.0);
        let unscaled = Self {
            scales: None,
            ..*self
        };
        unscaled.widen(simd, rows.clone(), scratch);
        Tile {
            numbers: scratch,
            width: self.width,
            scales: self.scales.map(|scales| &scales[rows]),
            ahead,
        }
    }

    /// The memory behind a tile, as much as is in it, if rows lie one behind the other.
    #[inline(always)]
    fn behind(&self, rows: &Range<usize>) -> Ahead {
        if !self.is_in_one_piece() {
            return Ahead::Nothing;
        }
        let bytes = AT_ONCE * self.width * size_of::<N>();
        let start = self.numbers[rows.start * self.width..].as_ptr();
        Ahead::Tile {
            start: start
                .cast::<i8>()
                .wrapping_add(rows.len().div_ceil(AT_ONCE) * bytes),
            bytes,
        }
    }
}

/// Whether short rows are gone through by tiles, each fetched while the one before is: on processors where that was
/// measured to gain.
#[inline(always)]
fn gains_by_tiles<S: Simd>(simd: S, width: usize) -> bool {
    width < LONG && has_avx2_alone(simd)
}

/// The vectors of rows; each row's last ends with zeros.
#[inline(always)]
fn vectors<S: Simd>(simd: S, x: &[f32], width: usize) -> Vec<S::f32s> {
    let per_row = width.div_ceil(S::F32_LANES);
    let mut vectors = vec![simd.splat_f32s(0.0); x.len() / width * per_row];
    for (to, row) in vectors.chunks_exact_mut(per_row).zip(x.chunks_exact(width)) {
        for (to, numbers) in to.iter_mut().zip(row.chunks(S::F32_LANES)) {
            *to = f32::padded(simd, numbers);
        }
    }
    vectors
}
