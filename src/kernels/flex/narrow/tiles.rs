//! Stored rows of one type by tiles, each of which is multiplied with all rows of floats before the next is.

use std::borrow::Cow;
use std::ops::Range;

use pulp::Simd;

use super::super::simd::fetch;
use super::super::widen::{Number, has_avx2_alone, scaled};
use super::products::products_of;
use super::sums::{factors_of, sums_of};
use super::{AHEAD, AT_ONCE, LINE, LONG, SideBySide, floats_at_once, of_floats};

/// Bytes of stored rows that are multiplied with some rows of floats before the next are: they stay in the
/// second-level cache.
const BLOCK: usize = 1 << 18;

/// [`Rows`] of one type of numbers.
#[derive(Clone, Copy)]
pub(super) struct Lines<'a, N> {
    numbers: &'a [N],
    stride: usize,
    width: usize,
    /// What each row is times.
    scales: Option<&'a [f32]>,
}

/// Some rows one behind the other, which are multiplied with all rows of floats before the next are.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a, N> {
    pub numbers: &'a [N],
    pub width: usize,
    /// What each row's product is times. In sums the factors have it.
    pub scales: Option<&'a [f32]>,
    pub ahead: Ahead,
}

/// Memory that is fetched while a tile is gone through.
#[derive(Clone, Copy)]
pub(super) enum Ahead {
    Nothing,
    /// Some bytes for every [`AT_ONCE`] rows, one piece behind the other from a place that may be behind all there
    /// is.
    Tile {
        start: *const i8,
        bytes: usize,
    },
    /// What lies [`AHEAD`] of each line of a row.
    Lines,
}

impl Ahead {
    /// What is due with the tile's `block` of rows.
    #[inline(always)]
    pub fn fetch<S: Simd>(self, simd: S, block: usize) {
        if let Self::Tile { start, bytes } = self {
            let start = start.wrapping_add(block * bytes);
            for byte in (0..bytes).step_by(LINE) {
                fetch(simd, start.wrapping_add(byte));
            }
        }
    }

    /// What is left to fetch when a tile was gone through.
    #[inline(always)]
    fn once(self) -> Self {
        match self {
            Self::Tile { .. } => Self::Nothing,
            Self::Nothing | Self::Lines => self,
        }
    }
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
            let ahead = match self.width < LONG {
                _ if is_tiled => self.behind(&rows),
                true => Ahead::Nothing,
                false => Ahead::Lines,
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
        let factors = self.factors(simd, x, pitch, range.clone());
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

    /// What rows are times in sums, their scales included.
    #[inline(always)]
    fn factors<S: Simd>(
        &self,
        simd: S,
        x: &[f32],
        pitch: usize,
        range: Range<usize>,
    ) -> SideBySide<'static, f32> {
        let (per_row, at_once) = (range.len(), floats_at_once::<S>());
        let mut factors = vec![0.0; x.len() / pitch * per_row];
        let groups = factors.chunks_mut(at_once * per_row);
        for (group, x) in groups.zip(x.chunks(at_once * pitch)) {
            let scales = self.scales.map(|scales| &scales[range.clone()]);
            let rows = group.len() / per_row;
            of_floats!(rows, factors_of::<S>(simd, x, pitch, scales, group));
        }
        SideBySide {
            numbers: Cow::Owned(factors),
            per_row,
            at_once,
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
        let rows = match n_rows > at_once {
            _ if is_tiled => AHEAD / bytes,
            true => BLOCK / bytes,
            false => range.len(),
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

impl<N: Number> Tile<'_, N> {
    #[inline(always)]
    fn add_products<S: Simd>(
        mut self,
        simd: S,
        x: &SideBySide<S::f32s>,
        products: &mut [f32],
        pitch: usize,
    ) {
        let products = products.chunks_mut(floats_at_once::<S>() * pitch);
        for ((rows, x), products) in x.groups().zip(products) {
            of_floats!(rows, products_of::<S, N>(simd, self, x, products, pitch));
            self.ahead = self.ahead.once();
        }
    }

    /// By factors from the `first` on.
    #[inline(always)]
    fn add_sums<S: Simd>(
        mut self,
        simd: S,
        factors: &SideBySide<f32>,
        first: usize,
        sums: &mut [S::f32s],
    ) {
        let n_rows = self.numbers.len() / self.width;
        let vectors = self.width.div_ceil(S::F32_LANES);
        let sums = sums.chunks_mut(floats_at_once::<S>() * vectors);
        for ((rows, factors), sums) in factors.groups().zip(sums) {
            let factors = &factors[first * rows..][..n_rows * rows];
            of_floats!(rows, sums_of::<S, N>(simd, self, factors, sums));
            self.ahead = self.ahead.once();
        }
    }
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
