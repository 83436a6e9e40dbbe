//! Rows of stored numbers, multiplied where they lie: a vector of them becomes floats in registers, once
//! for several rows of floats that it is multiplied with. [`products`] are theirs with each stored row,
//! [`sums`] are those of all stored rows, each times a number.

mod products;
mod sums;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use pulp::Simd;

use super::simd::fetch;
use super::widen::Number;
use products::products_of;
use sums::{scaled, sums_of};

/// Stored rows that are multiplied at a time.
pub(super) const AT_ONCE: usize = 4;

/// Rows of floats that they are multiplied with at a time, so that the sums stay in registers.
#[inline(always)]
pub(super) const fn floats_at_once<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 4 } else { 2 }
}

/// Bytes of stored rows that are multiplied with some rows of floats before the next are, where there are registers
/// for four: they stay in the second-level cache.
const BLOCK: usize = 1 << 18;

/// Width from which one stored row is read after another, and not four side by side: pieces of memory
/// that are longer are read faster, and their products take longer than adding each up.
const LONG: usize = 256;

/// Bytes that memory is fetched by.
const LINE: usize = 64;

/// How many bytes ahead of what is multiplied memory is fetched: in a weight the rows that follow. A line may be
/// asked for twice, where a step is shorter.
pub(super) const AHEAD: usize = 1 << 13;

/// Stored rows, each of neighbouring numbers.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    numbers: Numbers<'a>,
    /// From one row to the next.
    stride: usize,
    width: usize,
}

/// The numbers there are.
#[derive(Clone, Copy)]
pub(super) enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    /// Codes, and a scale per row.
    Int8(&'a [i8], &'a [f32]),
}

/// A method of the [`Lines`] that rows are.
macro_rules! of_lines {
    ($rows:expr, $method:ident($($argument:expr),*)) => {{
        let Rows { numbers, stride, width } = *$rows;
        match numbers {
            Numbers::F32(x) => Lines::new(x, stride, width, None).$method($($argument),*),
            Numbers::F16(x) => Lines::new(x, stride, width, None).$method($($argument),*),
            Numbers::Bf16(x) => Lines::new(x, stride, width, None).$method($($argument),*),
            Numbers::Int8(x, scales) => {
                Lines::new(x, stride, width, Some(scales)).$method($($argument),*)
            }
        }
    }};
}

impl<'a> Rows<'a> {
    pub fn new(numbers: Numbers<'a>, stride: usize, width: usize) -> Self {
        Self {
            numbers,
            stride,
            width,
        }
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows one behind the other, if they lie so and are f32.
    pub fn as_they_lie(&self, range: Range<usize>) -> Option<&'a [f32]> {
        match self.numbers {
            Numbers::F32(numbers) if self.stride == self.width => {
                Some(&numbers[range.start * self.stride..range.end * self.stride])
            }
            _ => None,
        }
    }

    /// Some rows as f32, one behind the other.
    #[inline(always)]
    pub fn widen<S: Simd>(&self, simd: S, rows: Range<usize>, to: &mut [f32]) {
        of_lines!(self, widen(simd, rows, to));
    }

    /// `products[i][j] += x[i] · row`, j being the row's place in `range`: x is `[rows, width]`, the products
    /// are `[rows, pitch]`.
    #[inline(always)]
    pub fn add_products<S: Simd>(
        &self,
        simd: S,
        x: &[f32],
        range: Range<usize>,
        products: &mut [f32],
        pitch: usize,
    ) {
        of_lines!(self, add_products(simd, x, range, products, pitch));
    }

    /// `sums[i] += Σ_j x[i][j] · row`, j being the row's place in `range`: x is `[rows, pitch]`. The sums are
    /// vectors, of which each row's last ends with zeros.
    #[inline(always)]
    pub fn add_sums<S: Simd>(
        &self,
        simd: S,
        x: &[f32],
        pitch: usize,
        range: Range<usize>,
        sums: &mut [S::f32s],
    ) {
        of_lines!(self, add_sums(simd, x, pitch, range, sums));
    }
}

/// A function of as many rows of floats as [`floats_at_once`] gives or fewer, which the compiler is told. It
/// makes none for more: they are the largest functions there are.
macro_rules! of_floats {
    ($rows:expr, $function:ident::<$S:ty $(, $N:ty)?>($($argument:expr),*)) => {
        match $rows {
            1 => $function::<$S, $($N,)? 1>($($argument),*),
            2 => $function::<$S, $($N,)? 2>($($argument),*),
            rows => {
                if const { floats_at_once::<$S>() < 4 } {
                    unreachable!("{rows} rows at once");
                }
                match rows {
                    3 => $function::<$S, $($N,)? 3>($($argument),*),
                    4 => $function::<$S, $($N,)? 4>($($argument),*),
                    rows => unreachable!("{rows} rows at once"),
                }
            }
        }
    };
}
pub(super) use of_floats;

/// [`Rows`] of one type of numbers.
#[derive(Clone, Copy)]
struct Lines<'a, N> {
    numbers: &'a [N],
    stride: usize,
    width: usize,
    /// What each row is times.
    scales: Option<&'a [f32]>,
}

/// Some rows one behind the other, which are multiplied with all rows of floats before the next are.
#[derive(Clone, Copy)]
struct Tile<'a, N> {
    numbers: &'a [N],
    width: usize,
    /// What each row is times.
    scales: Option<&'a [f32]>,
    ahead: Ahead,
}

/// Memory that is fetched while a tile is gone through, some for every [`AT_ONCE`] of its rows. It may end behind
/// all there is.
#[derive(Clone, Copy)]
struct Ahead {
    start: *const i8,
    bytes: usize,
}

impl Ahead {
    const NOTHING: Self = Self {
        start: std::ptr::null(),
        bytes: 0,
    };

    /// What is due with the tile's `block` of rows.
    #[inline(always)]
    fn fetch<S: Simd>(self, simd: S, block: usize) {
        let start = self.start.wrapping_add(block * self.bytes);
        for byte in (0..self.bytes).step_by(LINE) {
            fetch(simd, start.wrapping_add(byte));
        }
    }
}

impl<'a, N: Number> Lines<'a, N> {
    fn new(numbers: &'a [N], stride: usize, width: usize, scales: Option<&'a [f32]>) -> Self {
        Self {
            numbers,
            stride,
            width,
            scales,
        }
    }

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, rows: Range<usize>, to: &mut [f32]) {
        if self.stride == self.width && self.scales.is_none() {
            return N::widened(simd, self.numbers_of(&rows), 1.0, to);
        }
        for (to, row) in to.chunks_exact_mut(self.width).zip(rows) {
            let scale = match self.scales {
                Some(scales) => scales[row],
                None => 1.0,
            };
            let row = &self.numbers[row * self.stride..][..self.width];
            N::widened(simd, row, scale, to);
        }
    }

    /// Of rows one behind the other.
    fn numbers_of(&self, rows: &Range<usize>) -> &'a [N] {
        &self.numbers[rows.start * self.width..rows.end * self.width]
    }

    #[inline(always)]
    fn add_products<S: Simd>(
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
        let is_fetched = is_widened || is_fetched::<S>(self.width);
        let mut scratch = Vec::new();
        for rows in self.tiles::<S>(is_fetched, x.n_rows(), range.clone()) {
            let products = &mut products[rows.start - range.start..];
            match is_widened {
                true => {
                    let tile = self.widened(simd, rows, &mut scratch);
                    tile.add_products(simd, &x, products, pitch);
                }
                false => {
                    let tile = self.tile(rows, is_fetched);
                    tile.add_products(simd, &x, products, pitch);
                }
            }
        }
    }

    #[inline(always)]
    fn add_sums<S: Simd>(
        &self,
        simd: S,
        x: &[f32],
        pitch: usize,
        range: Range<usize>,
        sums: &mut [S::f32s],
    ) {
        let factors = self.factors::<S>(x, pitch, range.clone());
        let is_widened = self.is_widened(simd, factors.n_rows());
        // f32 gained nothing, and lost in wide rows.
        let is_narrow = size_of::<N>() < size_of::<f32>();
        let is_fetched = is_widened || is_narrow && is_fetched::<S>(self.width);
        let mut scratch = Vec::new();
        for rows in self.tiles::<S>(is_fetched, factors.n_rows(), range.clone()) {
            let first = rows.start - range.start;
            match is_widened {
                true => {
                    let tile = self.widened(simd, rows, &mut scratch);
                    tile.add_sums(simd, &factors, first, sums);
                }
                false => {
                    let tile = self.tile(rows, is_fetched);
                    tile.add_sums(simd, &factors, first, sums);
                }
            }
        }
    }

    /// What rows are times in sums, their scales included.
    #[inline(always)]
    fn factors<S: Simd>(
        &self,
        x: &[f32],
        pitch: usize,
        range: Range<usize>,
    ) -> SideBySide<'static, f32> {
        let (per_row, at_once) = (range.len(), floats_at_once::<S>());
        let mut factors = vec![0.0; x.len().div_ceil(pitch) * per_row];
        let groups = factors.chunks_mut(at_once * per_row);
        for (group, x) in groups.zip(x.chunks(at_once * pitch)) {
            let scales = self.scales.map(|scales| &scales[range.clone()]);
            of_floats!(group.len() / per_row, scaled::<S>(x, pitch, scales, group));
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
        self.stride != self.width || N::in_slices(simd) && (self.width < LONG || again)
    }

    /// The rows of each tile.
    #[inline(always)]
    fn tiles<S: Simd>(
        &self,
        is_fetched: bool,
        n_rows: usize,
        range: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> {
        let (at_once, bytes) = (floats_at_once::<S>(), self.width * size_of::<N>());
        let rows = match n_rows > at_once {
            _ if is_fetched => AHEAD / bytes,
            true => BLOCK / bytes,
            false => range.len(),
        };
        let rows = rows.next_multiple_of(AT_ONCE).max(AT_ONCE);
        let starts = range.clone().step_by(rows);
        starts.map(move |start| start..(start + rows).min(range.end))
    }

    /// Rows one behind the other as they lie.
    fn tile(&self, rows: Range<usize>, is_fetched: bool) -> Tile<'a, N> {
        Tile {
            numbers: self.numbers_of(&rows),
            width: self.width,
            ahead: match is_fetched {
                true => self.behind(&rows),
                false => Ahead::NOTHING,
            },
            scales: self.scales.map(|scales| &scales[rows]),
        }
    }

    /// Rows as f32.
    #[inline(always)]
    fn widened<'t, S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
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
            ahead: self.behind(&rows),
            scales: self.scales.map(|scales| &scales[rows]),
        }
    }

    /// The memory behind a tile, as much as is in it.
    #[inline(always)]
    fn behind(&self, rows: &Range<usize>) -> Ahead {
        let bytes = AT_ONCE * self.stride * size_of::<N>();
        let start = self.numbers[rows.start * self.stride..].as_ptr();
        Ahead {
            start: start
                .cast::<i8>()
                .wrapping_add(rows.len().div_ceil(AT_ONCE) * bytes),
            bytes,
        }
    }
}

/// Whether rows that are read where they lie are fetched a tile before: short ones, on processors where it was
/// measured to gain. [`products_of`] long ones fetches for itself.
#[inline(always)]
fn is_fetched<S: Simd>(width: usize) -> bool {
    floats_at_once::<S>() < 4 && width < LONG
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
            self.ahead = Ahead::NOTHING;
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
            self.ahead = Ahead::NOTHING;
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

/// Rows, in groups of those that are multiplied at a time: of a group the first of each row side by side, the
/// second of each, and so on.
pub(super) struct SideBySide<'a, T: Copy> {
    numbers: Cow<'a, [T]>,
    per_row: usize,
    at_once: usize,
}

impl<'a, T: Copy> SideBySide<'a, T> {
    /// Of rows one behind the other.
    #[inline(always)]
    pub fn new<S: Simd>(rows: &'a [T], per_row: usize) -> Self {
        let at_once = floats_at_once::<S>();
        let numbers = match rows.len() == per_row {
            true => Cow::Borrowed(rows),
            false => {
                let mut numbers = Vec::with_capacity(rows.len());
                for group in rows.chunks(at_once * per_row) {
                    for i in 0..per_row {
                        numbers.extend(group[i..].iter().step_by(per_row));
                    }
                }
                Cow::Owned(numbers)
            }
        };
        Self {
            numbers,
            per_row,
            at_once,
        }
    }

    fn n_rows(&self) -> usize {
        self.numbers.len() / self.per_row
    }

    /// How many rows each group has, and its numbers.
    #[inline(always)]
    pub fn groups(&self) -> impl Iterator<Item = (usize, &[T])> {
        let groups = self.numbers.chunks(self.at_once * self.per_row);
        groups.map(|group| (group.len() / self.per_row, group))
    }
}
