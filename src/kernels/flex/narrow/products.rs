//! Products of rows of floats with stored rows.

use std::ops::Range;

use pulp::Simd;

use super::super::simd::{fetch_ahead, sums_of_each};
use super::super::widen::Number;
use super::{AHEAD, AT_ONCE, Lines, side_by_side};

/// Bytes that memory is fetched by.
const LINE: usize = 64;

/// Width from which one stored row is read after another, and not four side by side: pieces of memory
/// that are longer are read faster, and their products take longer than adding each up.
const LONG: usize = 256;

/// What `Rows::add_products` adds, of R rows of floats.
#[inline(always)]
pub(super) fn products_of<S: Simd, N: Number, const R: usize>(
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
            // Four at once wherever there are as many: their number is then known to the compiler.
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
            *to = f32::padded(simd, numbers);
        }
    }
    vectors
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
    added_up(simd, sums)
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
            for line in row.chunks(LINE / size_of::<N>()) {
                fetch_ahead(simd, &line[0], AHEAD);
            }
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
            let vector = N::padded(simd, row);
            for (&x, sums) in x.iter().zip(&mut sums) {
                sums[0] = simd.mul_add_f32s(x, vector, sums[0]);
            }
        }
        for (found, [a, b, c, d]) in found.iter_mut().zip(sums) {
            found[j] = simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d));
        }
    }
    added_up(simd, found)
}

#[inline(always)]
fn added_up<S: Simd, const R: usize>(
    simd: S,
    vectors: [[S::f32s; AT_ONCE]; R],
) -> [[f32; AT_ONCE]; R] {
    let mut sums = [[0.0; AT_ONCE]; R];
    for (sums, vectors) in sums.iter_mut().zip(vectors) {
        *sums = sums_of_each(simd, vectors);
    }
    sums
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
