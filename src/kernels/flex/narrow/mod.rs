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

use super::widen::{Number, widened};
use products::products_of;
use sums::sums_of;

/// Stored rows that are multiplied at a time.
pub(super) const AT_ONCE: usize = 4;

/// Rows of floats that they are multiplied with at a time, so that the sums stay in registers.
#[inline(always)]
pub(super) const fn floats_at_once<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 4 } else { 2 }
}

/// Bytes of stored rows that are multiplied with some rows of floats before the next are: they stay in
/// the second-level cache. With an eighth of it, putting rows of floats side by side anew for every block took
/// a quarter of the time of a token in a batch of 8.
const BLOCK: usize = 1 << 18;

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

    /// A row as f32.
    #[inline(always)]
    pub fn widen<S: Simd>(&self, simd: S, row: usize, to: &mut [f32]) {
        of_lines!(self, widen(simd, row, to));
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
    fn line(&self, row: usize) -> &'a [N] {
        &self.numbers[row * self.stride..][..self.width]
    }

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, row: usize, to: &mut [f32]) {
        let scale = match self.scales {
            Some(scales) => scales[row],
            None => 1.0,
        };
        widened(simd, self.line(row), scale, to);
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
        let (lines, at_once) = (*self, floats_at_once::<S>());
        let block = match x.len() > at_once * self.width {
            true => (BLOCK / (self.width * size_of::<N>())).next_multiple_of(AT_ONCE),
            false => range.len(),
        };
        for start in range.clone().step_by(block.max(AT_ONCE)) {
            let (block, at) = (start..(start + block).min(range.end), start - range.start);
            let of = x.chunks(at_once * self.width);
            for (x, products) in of.zip(products.chunks_mut(at_once * pitch)) {
                let (rows, block) = (x.len() / self.width, block.clone());
                let products = &mut products[at..];
                of_floats!(
                    rows,
                    products_of::<S, N>(simd, lines, x, block, products, pitch)
                );
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
        let (at_once, vectors) = (floats_at_once::<S>(), self.width.div_ceil(S::F32_LANES));
        let of = x.chunks(at_once * pitch);
        for (x, sums) in of.zip(sums.chunks_mut(at_once * vectors)) {
            let (lines, range, rows) = (*self, range.clone(), sums.len() / vectors);
            of_floats!(rows, sums_of::<S, N>(simd, lines, x, pitch, range, sums));
        }
    }
}

/// Of R rows of `per_row`, the first of each side by side, the second of each, and so on.
#[inline(always)]
pub(super) fn side_by_side<T: Copy, const R: usize>(
    rows: &[T],
    per_row: usize,
) -> Cow<'_, [[T; R]]> {
    if R == 1 {
        return Cow::Borrowed(rows.as_chunks().0);
    }
    let mut columns = vec![[rows[0]; R]; per_row];
    for (r, row) in rows.chunks_exact(per_row).enumerate() {
        for (to, x) in columns.iter_mut().zip(row) {
            to[r] = *x;
        }
    }
    Cow::Owned(columns)
}
