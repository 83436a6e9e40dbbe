//! Rows of stored numbers, multiplied where they lie: a vector of them becomes floats in registers, once
//! for several rows of floats that it is multiplied with.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use pulp::Simd;
#[cfg(target_arch = "x86_64")]
use pulp::x86::V3;

use super::simd::sums_of_each;
#[cfg(target_arch = "x86_64")]
use super::widen::is;
use super::widen::{Number, widened};

/// Stored rows that are multiplied at a time.
pub(super) const AT_ONCE: usize = 4;

/// Rows of floats that they are multiplied with at a time, so that the sums stay in registers.
#[inline(always)]
pub(super) fn floats_at_once<S: Simd>(simd: S) -> usize {
    #[cfg(target_arch = "x86_64")]
    if is::<S, V3>(simd).is_some() {
        return 2;
    }
    let _ = simd;
    4
}

/// Width from which one stored row is read after another, and not four side by side: pieces of memory
/// that are longer are read faster, and their products take longer than adding each up.
const LONG: usize = 256;

/// Bytes of stored rows that are multiplied with some rows of floats before the next are: they stay in
/// the second-level cache. An eighth of it, and putting rows of floats side by side for every block took a third
/// of a batch of 8's time.
const BLOCK: usize = 1 << 18;

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

    pub fn are_f32(&self) -> bool {
        matches!(self.numbers, Numbers::F32(_))
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

    /// `products[i][j] += x[i] · row j`, of the rows of `range`, of which the first is 0: x is
    /// `[rows, width]`, the products are `[rows, pitch]`.
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

    /// `sums[i] += Σ_j x[i][j] · row j`, over the rows of `range`, of which the first is 0: x is
    /// `[rows, pitch]`. The sums are vectors, of which each row's last ends with zeros.
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

/// A function of as many rows of floats as [`floats_at_once`] gives or fewer, which the compiler is told.
macro_rules! of_floats {
    ($rows:expr, $function:ident::<$S:ty, $N:ty>($($argument:expr),*)) => {
        match $rows {
            1 => $function::<$S, $N, 1>($($argument),*),
            2 => $function::<$S, $N, 2>($($argument),*),
            3 => $function::<$S, $N, 3>($($argument),*),
            4 => $function::<$S, $N, 4>($($argument),*),
            rows => unreachable!("{rows} rows at once"),
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
        let (lines, at_once) = (*self, floats_at_once(simd));
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
        let (at_once, vectors) = (floats_at_once(simd), self.width.div_ceil(S::F32_LANES));
        let of = x.chunks(at_once * pitch);
        for (x, sums) in of.zip(sums.chunks_mut(at_once * vectors)) {
            let (lines, range, rows) = (*self, range.clone(), sums.len() / vectors);
            of_floats!(rows, sums_of::<S, N>(simd, lines, x, pitch, range, sums));
        }
    }
}

/// [`Rows::add_products`] of R rows of floats.
#[inline(always)]
fn products_of<S: Simd, N: Number, const R: usize>(
    simd: S,
    lines: Lines<N>,
    x: &[f32],
    range: Range<usize>,
    products: &mut [f32],
    pitch: usize,
) {
    let x = vectors(simd, x, lines.width);
    let x = side_by_side::<_, R>(&x, lines.width.div_ceil(S::F32_LANES));
    let (end, last) = (range.end, range.end.saturating_sub(1));
    for (block, first) in range.step_by(AT_ONCE).enumerate() {
        // Behind the last row comes the last again.
        let mut rows = [lines.line(first); AT_ONCE];
        for (k, row) in rows.iter_mut().enumerate().skip(1) {
            *row = lines.line((first + k).min(last));
        }
        let mut scales = [1.0; AT_ONCE];
        if let Some(all) = lines.scales {
            for (k, scale) in scales.iter_mut().enumerate() {
                *scale = all[(first + k).min(last)];
            }
        }
        let found = match lines.width < LONG {
            true => dots(simd, &x, rows),
            false => dots_of_long(simd, &x, rows),
        };
        for (r, found) in found.iter().enumerate() {
            let products = &mut products[r * pitch + block * AT_ONCE..];
            match products.first_chunk_mut::<AT_ONCE>() {
                Some(products) if first + AT_ONCE <= end => {
                    for ((product, found), scale) in products.iter_mut().zip(found).zip(scales) {
                        *product += found * scale;
                    }
                }
                _ => {
                    let terms = products.iter_mut().zip(found).zip(scales);
                    for ((product, found), scale) in terms.take(end - first) {
                        *product += found * scale;
                    }
                }
            }
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
            *to = match numbers.len() == S::F32_LANES {
                true => f32::vector(simd, numbers),
                false => f32::padded(simd, numbers),
            };
        }
    }
    vectors
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

/// x[i] · row j.
#[inline(always)]
fn dots<S: Simd, N: Number, const R: usize>(
    simd: S,
    x: &[[S::f32s; R]],
    rows: [&[N]; AT_ONCE],
) -> [[f32; AT_ONCE]; R] {
    let lanes = S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); AT_ONCE]; R];
    let [a, b, c, d] = rows;
    let (a, b) = (a.chunks_exact(lanes), b.chunks_exact(lanes));
    let (c, d) = (c.chunks_exact(lanes), d.chunks_exact(lanes));
    let tails = [a.remainder(), b.remainder(), c.remainder(), d.remainder()];
    for ((((x, a), b), c), d) in x.iter().zip(a).zip(b).zip(c).zip(d) {
        let vectors = [
            N::vector(simd, a),
            N::vector(simd, b),
            N::vector(simd, c),
            N::vector(simd, d),
        ];
        add_products(simd, x, vectors, &mut sums);
    }
    if let (Some(x), [_, ..]) = (x.last(), tails[0]) {
        let mut vectors = [simd.splat_f32s(0.0); AT_ONCE];
        for (vector, tail) in vectors.iter_mut().zip(tails) {
            *vector = N::padded(simd, tail);
        }
        add_products(simd, x, vectors, &mut sums);
    }
    let mut found = [[0.0; AT_ONCE]; R];
    for (found, sums) in found.iter_mut().zip(sums) {
        *found = sums_of_each(simd, sums);
    }
    found
}

/// x[i] · row j, of one row after another.
#[inline(always)]
fn dots_of_long<S: Simd, N: Number, const R: usize>(
    simd: S,
    x: &[[S::f32s; R]],
    rows: [&[N]; AT_ONCE],
) -> [[f32; AT_ONCE]; R] {
    let lanes = S::F32_LANES;
    let zero = simd.splat_f32s(0.0);
    let mut found = [[zero; AT_ONCE]; R];
    for (j, row) in rows.into_iter().enumerate() {
        // Sums that take turns, because each waits for its last addition.
        let mut sums = [[zero; 4]; R];
        let (x4, x_rest) = x.as_chunks::<4>();
        let row4 = row.chunks_exact(4 * lanes);
        let rest = row4.remainder().chunks(lanes);
        // The last x is a tail's where there is one; then a quadruple of x may have no row.
        let x_rest = match x4.len() > row4.len() {
            true => x4[row4.len()..].as_flattened(),
            false => x_rest,
        };
        for (x4, row) in x4.iter().zip(row4) {
            let mut vectors = [zero; 4];
            for (vector, row) in vectors.iter_mut().zip(row.chunks_exact(lanes)) {
                *vector = N::vector(simd, row);
            }
            for ((turn, x), vector) in x4.iter().enumerate().zip(vectors) {
                for (&x, sums) in x.iter().zip(&mut sums) {
                    sums[turn] = simd.mul_add_f32s(x, vector, sums[turn]);
                }
            }
        }
        for (x, row) in x_rest.iter().zip(rest) {
            let vector = match row.len() == lanes {
                true => N::vector(simd, row),
                false => N::padded(simd, row),
            };
            for (&x, sums) in x.iter().zip(&mut sums) {
                sums[0] = simd.mul_add_f32s(x, vector, sums[0]);
            }
        }
        for (found, [a, b, c, d]) in found.iter_mut().zip(sums) {
            found[j] = simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d));
        }
    }
    let mut products = [[0.0; AT_ONCE]; R];
    for (products, found) in products.iter_mut().zip(found) {
        *products = sums_of_each(simd, found);
    }
    products
}

#[inline(always)]
fn add_products<S: Simd, const R: usize>(
    simd: S,
    x: &[S::f32s; R],
    vectors: [S::f32s; AT_ONCE],
    sums: &mut [[S::f32s; AT_ONCE]; R],
) {
    for (&x, sums) in x.iter().zip(sums) {
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            *sum = simd.mul_add_f32s(x, vector, *sum);
        }
    }
}

/// [`Rows::add_sums`] of R rows of floats.
#[inline(always)]
fn sums_of<S: Simd, N: Number, const R: usize>(
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
            let row = &lines.line(row)[columns.clone()];
            let value = match row.len() == lanes {
                true => N::vector(simd, row),
                false => N::padded(simd, row),
            };
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    #[cfg(target_arch = "x86_64")]
    use pulp::x86::V4;
    use pulp::{Scalar, WithSimd, bytemuck::cast_slice};

    use super::*;
    use crate::kernels::flex::simd::maximum;

    /// Rows of small whole numbers, so that every order of additions gives the same.
    #[derive(Clone, Debug)]
    struct Case {
        width: usize,
        stride: usize,
        rows: Range<usize>,
        n_floats: usize,
        numbers: Vec<i8>,
        /// By which rows, or columns, are multiplied.
        floats: Vec<i8>,
    }

    prop_compose! {
        fn any_case()(
            width in prop_oneof![1usize..70, 250usize..340],
            // Rows may overlap, or be one and the same.
            stride in prop_oneof![Just(0usize), 1usize..80, Just(usize::MAX)],
            first in 0usize..7,
            n_rows in 1usize..11,
            n_floats in 1usize..19,
        )(
            numbers in prop::collection::vec(-9i8..10, (first + n_rows) * stride.min(width + 1) + width),
            floats in prop::collection::vec(-9i8..10, n_floats * width.max(n_rows)),
            width in Just(width),
            stride in Just(stride.min(width + 1)),
            rows in Just(first..first + n_rows),
            n_floats in Just(n_floats),
        ) -> Case {
            Case { width, stride, rows, n_floats, numbers, floats }
        }
    }

    impl Case {
        fn number(&self, row: usize, column: usize) -> f32 {
            f32::from(self.numbers[row * self.stride + column])
        }

        /// Row i of the floats, of some length.
        fn float(&self, i: usize, at: usize, len: usize) -> f32 {
            f32::from(self.floats[i * len + at])
        }

        fn check<S: Simd>(&self, simd: S, rows: Rows, scale: impl Fn(usize) -> f32) {
            let (range, width) = (self.rows.clone(), self.width);
            let x: Vec<f32> = self.floats.iter().map(|&x| f32::from(x)).collect();

            let pitch = range.len() + self.n_floats % 3;
            let mut products = vec![1.0; self.n_floats * pitch];
            let floats = &x[..self.n_floats * width];
            rows.add_products(simd, floats, range.clone(), &mut products, pitch);
            for (i, products) in products.chunks(pitch).enumerate() {
                assert!(products[range.len()..].iter().all(|x| *x == 1.0));
                for (row, found) in range.clone().zip(products) {
                    let terms = (0..width).map(|c| self.number(row, c) * self.float(i, c, width));
                    assert_eq!(*found, 1.0 + scale(row) * terms.sum::<f32>());
                }
            }

            let vectors = width.div_ceil(S::F32_LANES);
            let mut sums = vec![simd.splat_f32s(1.0); self.n_floats * vectors];
            let factors = &x[..self.n_floats * range.len()];
            rows.add_sums(simd, factors, range.len(), range.clone(), &mut sums);
            for (i, sums) in sums.chunks(vectors).enumerate() {
                let sums: &[f32] = cast_slice(sums);
                for (column, found) in sums[..width].iter().enumerate() {
                    let terms = range.clone().enumerate().map(|(at, row)| {
                        self.number(row, column) * scale(row) * self.float(i, at, range.len())
                    });
                    assert_eq!(*found, 1.0 + terms.sum::<f32>());
                }
            }

            let mut wide = vec![0.0; width];
            for row in range {
                rows.widen(simd, row, &mut wide);
                let numbers = wide.iter().enumerate();
                numbers.for_each(|(c, x)| assert_eq!(*x, self.number(row, c) * scale(row)));
            }
        }
    }

    impl WithSimd for &Case {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let wide = self.numbers.iter().map(|&x| f32::from(x));
            let f32s: Vec<f32> = wide.clone().collect();
            let f16s: Vec<f16> = wide.clone().map(f16::from_f32).collect();
            let bf16s: Vec<bf16> = wide.map(bf16::from_f32).collect();
            let scales: Vec<f32> = (0..self.rows.end).map(|row| row as f32 + 1.0).collect();
            for numbers in [
                Numbers::F32(&f32s),
                Numbers::F16(&f16s),
                Numbers::Bf16(&bf16s),
            ] {
                let rows = Rows::new(numbers, self.stride, self.width);
                self.check(simd, rows, |_| 1.0);
            }
            let codes = Numbers::Int8(&self.numbers, &scales);
            let rows = Rows::new(codes, self.stride, self.width);
            self.check(simd, rows, |row| scales[row]);

            let largest = f32s.iter().copied().fold(-3.0, f32::max);
            assert_eq!(maximum(simd, &f32s, -3.0), largest);
            assert_eq!(maximum(simd, &f32s, 10.0), 10.0);
        }
    }

    proptest! {
        /// By each of the processor's instruction sets, not only the one that is taken.
        #[test]
        fn rows_are_multiplied_as_what_they_are(case in any_case()) {
            Simd::vectorize(Scalar::new(), &case);
            #[cfg(target_arch = "x86_64")]
            {
                if let Some(simd) = V3::try_new() {
                    Simd::vectorize(simd, &case);
                }
                if let Some(simd) = V4::try_new() {
                    Simd::vectorize(simd, &case);
                }
            }
        }
    }
}
