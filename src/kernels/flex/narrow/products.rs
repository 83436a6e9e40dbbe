//! Products of rows of floats with stored rows.

use std::array::from_fn;

use pulp::bytemuck::cast_slice;
use pulp::{Simd, WithSimd};

use super::super::simd::{fetch_ahead, sums_of_each};
use super::super::widen::Number;
use super::tile::{Ahead, Tile};
use super::{AHEAD, AT_ONCE, LINE, LONG, SideBySide, floats_at_once, of_floats};

impl<N: Number> Tile<'_, N> {
    /// What `Rows::add_products` adds, of vectors of floats.
    #[inline(always)]
    pub fn add_products<S: Simd>(
        mut self,
        simd: S,
        x: &SideBySide<S::f32s>,
        products: &mut [f32],
        pitch: usize,
    ) {
        let products = products.chunks_mut(floats_at_once::<S>() * pitch);
        for ((rows, x), products) in x.groups::<S>().zip(products) {
            of_floats!(rows, products_of::<S, N>(simd, self, x, products, pitch));
            self.ahead = self.ahead.once();
        }
    }
}

/// Of the vectors of R rows of floats side by side.
#[inline(always)]
fn products_of<S: Simd, N: Number, const R: usize>(
    simd: S,
    tile: Tile<N>,
    x: &[S::f32s],
    products: &mut [f32],
    pitch: usize,
) {
    simd.vectorize(Products::<N, R> {
        tile,
        x: cast_slice(x),
        products,
        pitch,
    });
}

/// By itself, so that the compiler has all registers for its loops.
struct Products<'a, N, const R: usize> {
    tile: Tile<'a, N>,
    /// Whole vectors.
    x: &'a [f32],
    products: &'a mut [f32],
    pitch: usize,
}

impl<N: Number, const R: usize> WithSimd for Products<'_, N, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (x, _) = S::as_simd_f32s(self.x);
        let (x, _) = x.as_chunks::<R>();
        add_dots(simd, self.tile, x, self.products, self.pitch);
    }
}

#[inline(always)]
fn add_dots<S: Simd, N: Number, const R: usize>(
    simd: S,
    tile: Tile<N>,
    x: &[[S::f32s; R]],
    products: &mut [f32],
    pitch: usize,
) {
    let Tile {
        numbers,
        width,
        scales,
        ahead,
    } = tile;
    let blocks = numbers.chunks_exact(AT_ONCE * width);
    let rest = blocks.remainder();
    let whole = blocks.len() * AT_ONCE;
    let mut of_rows = products.chunks_mut(pitch);
    let mut of_rows: [_; R] = from_fn(|_| {
        let row = of_rows.next().expect("R rows of products");
        row.split_at_mut(whole)
    });
    for (block, rows) in blocks.enumerate() {
        ahead.fetch(simd, block);
        let (ab, cd) = rows.split_at(2 * width);
        let ((a, b), (c, d)) = (ab.split_at(width), cd.split_at(width));
        let found = dots_of_four(simd, x, [a, b, c, d], ahead);
        let first = block * AT_ONCE;
        let scales = scales_of(scales, first);
        for ((products, _), found) in of_rows.iter_mut().zip(&found) {
            let products = products[first..].first_chunk_mut::<AT_ONCE>();
            add_scaled(products.expect("a product of each row"), found, scales);
        }
    }
    if !rest.is_empty() {
        // Behind the last row comes the last again.
        let last = rest.len() / width - 1;
        let mut rows = [&rest[..width]; AT_ONCE];
        for (k, row) in rows.iter_mut().enumerate() {
            *row = &rest[k.min(last) * width..][..width];
        }
        let found = dots_of_four(simd, x, rows, ahead);
        let scales = scales_of(scales, whole);
        for ((_, products), found) in of_rows.iter_mut().zip(&found) {
            add_scaled(&mut products[..=last], found, scales);
        }
    }
}

/// What the products of a block's rows are times, from row `first` on.
#[inline(always)]
fn scales_of(scales: Option<&[f32]>, first: usize) -> [f32; AT_ONCE] {
    let mut of_block = [1.0; AT_ONCE];
    if let Some(scales) = scales {
        for (to, scale) in of_block.iter_mut().zip(&scales[first..]) {
            *to = *scale;
        }
    }
    of_block
}

/// Of as many rows as there are products.
#[inline(always)]
fn add_scaled(products: &mut [f32], found: &[f32; AT_ONCE], scales: [f32; AT_ONCE]) {
    for ((product, found), scale) in products.iter_mut().zip(found).zip(scales) {
        *product += found * scale;
    }
}

/// x[i] · row j.
#[inline(always)]
fn dots_of_four<S: Simd, N: Number, const R: usize>(
    simd: S,
    x: &[[S::f32s; R]],
    rows: [&[N]; AT_ONCE],
    ahead: Ahead,
) -> [[f32; AT_ONCE]; R] {
    match rows[0].len() < LONG {
        true => dots(simd, x, rows),
        false => dots_of_long(simd, x, rows, matches!(ahead, Ahead::Lines)),
    }
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
    fetches: bool,
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
            if fetches {
                for line in row.chunks(LINE / size_of::<N>()) {
                    fetch_ahead(simd, &line[0], AHEAD);
                }
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
