//! Rows of stored numbers, multiplied where they lie, once for several rows of floats. [`products`] are theirs
//! with each stored row, [`sums`] are those of all stored rows, each times a number. Both go through [`lines`] by
//! a [`tile`] at a time, a vector of which becomes floats in a register, or all of which does in memory that is near.

mod lines;
mod products;
mod sums;
#[cfg(test)]
mod tests;
mod tile;

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use pulp::Simd;

use lines::Lines;

/// Stored rows that are multiplied at a time.
pub(super) const AT_ONCE: usize = 4;

/// Rows of floats that they are multiplied with at a time, so that the sums stay in registers.
#[inline(always)]
pub(super) const fn floats_at_once<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 4 } else { 2 }
}

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

/// Rows, in groups of those that are multiplied at a time: of a group the first of each row side by side, the
/// second of each, and so on.
pub(super) struct SideBySide<'a, T: Copy> {
    numbers: Cow<'a, [T]>,
    per_row: usize,
}

impl<'a, T: Copy> SideBySide<'a, T> {
    /// Of rows one behind the other.
    #[inline(always)]
    pub fn new<S: Simd>(rows: &'a [T], per_row: usize) -> Self {
        let numbers = match rows.len() == per_row {
            true => Cow::Borrowed(rows),
            false => {
                let mut numbers = Vec::with_capacity(rows.len());
                for group in rows.chunks(floats_at_once::<S>() * per_row) {
                    for i in 0..per_row {
                        numbers.extend(group[i..].iter().step_by(per_row));
                    }
                }
                Cow::Owned(numbers)
            }
        };
        Self { numbers, per_row }
    }

    fn n_rows(&self) -> usize {
        self.numbers.len() / self.per_row
    }

    /// How many rows each group has, and its numbers.
    #[inline(always)]
    pub fn groups<S: Simd>(&self) -> impl Iterator<Item = (usize, &[T])> {
        let groups = self.numbers.chunks(floats_at_once::<S>() * self.per_row);
        groups.map(|group| (group.len() / self.per_row, group))
    }
}
