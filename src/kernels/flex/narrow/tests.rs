//! Products and sums by every instruction set, against loops over whole numbers.

use proptest::prelude::*;
use pulp::{WithSimd, bytemuck::cast_slice};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::kernels::flex::simd::maximum;
use crate::kernels::flex::tests::by_each_instruction_set;

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
        width in prop_oneof![1usize..140, 250usize..340],
        // One behind the other as in a cache, or overlapping, one and the same, or apart.
        stride in prop_oneof![
            4 => Just(None),
            1 => Just(Some(0)),
            1 => (1usize..80).prop_map(Some),
            1 => Just(Some(usize::MAX)),
        ],
        first in 0usize..7,
        // Of one tile and of several.
        n_rows in prop_oneof![8 => 1usize..11, 1 => 100usize..180, 1 => 300usize..330],
        n_floats in 1usize..19,
        seed in any::<u64>(),
    ) -> Case {
        let stride = stride.map_or(width, |stride| stride.min(width + 1));
        let mut rng = StdRng::seed_from_u64(seed);
        // The last row ends where the numbers do.
        let len = (first + n_rows - 1) * stride + width;
        let numbers = (0..len).map(|_| rng.random_range(-9..10)).collect();
        let floats = (0..n_floats * width.max(n_rows)).map(|_| rng.random_range(-9..10)).collect();
        Case { width, stride, rows: first..first + n_rows, n_floats, numbers, floats }
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

    /// Of rows that are these numbers times their scales.
    fn check<S: Simd>(&self, simd: S, rows: Rows, scales: &[f32]) {
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
                assert_eq!(*found, 1.0 + scales[row] * terms.sum::<f32>());
            }
        }

        let vectors = width.div_ceil(S::F32_LANES);
        let mut sums = vec![simd.splat_f32s(1.0); self.n_floats * vectors];
        let mut factors = vec![7.0; self.n_floats * pitch];
        for (to, x) in factors.chunks_mut(pitch).zip(x.chunks(range.len())) {
            to[..range.len()].copy_from_slice(x);
        }
        rows.add_sums(simd, &factors, pitch, range.clone(), &mut sums);
        rows.add_sums(simd, &factors, pitch, range.start..range.start, &mut sums);
        for (i, sums) in sums.chunks(vectors).enumerate() {
            let sums: &[f32] = cast_slice(sums);
            for (column, found) in sums[..width].iter().enumerate() {
                let terms = range.clone().enumerate().map(|(at, row)| {
                    self.number(row, column) * scales[row] * self.float(i, at, range.len())
                });
                assert_eq!(*found, 1.0 + terms.sum::<f32>());
            }
        }

        let mut wide = vec![0.0; range.len() * width];
        rows.widen(simd, range.clone(), &mut wide);
        for (row, wide) in range.zip(wide.chunks(width)) {
            let numbers = wide.iter().enumerate();
            numbers.for_each(|(c, x)| assert_eq!(*x, self.number(row, c) * scales[row]));
        }
    }
}

/// A case whose numbers are of no order: sums in another order are others.
struct OneByOne<'a>(&'a Case);

impl OneByOne<'_> {
    /// Of all rows of floats, and of each by itself, to the bit.
    fn check<S: Simd>(&self, simd: S, rows: Rows) {
        let Self(case) = self;
        let (range, width) = (case.rows.clone(), case.width);
        let x: Vec<f32> = (case.floats.iter().enumerate())
            .map(|(i, &x)| (f32::from(x) + i as f32).sin())
            .collect();
        let floats = &x[..case.n_floats * width];
        let mut products = vec![0.0; case.n_floats * range.len()];
        rows.add_products(simd, floats, range.clone(), &mut products, range.len());
        let factors = &x[..case.n_floats * range.len()];
        let vectors = width.div_ceil(S::F32_LANES);
        let mut sums = vec![simd.splat_f32s(0.0); case.n_floats * vectors];
        rows.add_sums(simd, factors, range.len(), range.clone(), &mut sums);
        for i in 0..case.n_floats {
            let mut alone = vec![0.0; range.len()];
            let floats = &floats[i * width..][..width];
            rows.add_products(simd, floats, range.clone(), &mut alone, range.len());
            assert_eq!(alone, products[i * range.len()..][..range.len()]);
            let mut alone = vec![simd.splat_f32s(0.0); vectors];
            let factors = &factors[i * range.len()..][..range.len()];
            rows.add_sums(simd, factors, range.len(), range.clone(), &mut alone);
            let sums: &[f32] = cast_slice(&sums[i * vectors..][..vectors]);
            assert_eq!(cast_slice::<_, f32>(&alone)[..width], sums[..width]);
        }
    }
}

impl WithSimd for &OneByOne<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let case = self.0;
        let wide: Vec<f32> = (case.numbers.iter().enumerate())
            .map(|(i, &x)| (f32::from(x) + i as f32).cos())
            .collect();
        let f16s: Vec<f16> = wide.iter().map(|x| f16::from_f32(*x)).collect();
        let bf16s: Vec<bf16> = wide.iter().map(|x| bf16::from_f32(*x)).collect();
        let scales: Vec<f32> = (0..case.rows.end).map(|row| (row as f32).cos()).collect();
        for numbers in [
            Numbers::F32(&wide),
            Numbers::F16(&f16s),
            Numbers::Bf16(&bf16s),
            Numbers::Int8(&case.numbers, &scales),
        ] {
            self.check(simd, Rows::new(numbers, case.stride, case.width));
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
        let ones = vec![1.0; self.rows.end];
        let scales: Vec<f32> = (0..self.rows.end).map(|row| row as f32 + 1.0).collect();
        for (numbers, scales) in [
            (Numbers::F32(&f32s), &ones),
            (Numbers::F16(&f16s), &ones),
            (Numbers::Bf16(&bf16s), &ones),
            (Numbers::Int8(&self.numbers, &scales), &scales),
        ] {
            let rows = Rows::new(numbers, self.stride, self.width);
            self.check(simd, rows, scales);
        }

        let largest = f32s.iter().copied().fold(-3.0, f32::max);
        assert_eq!(maximum(simd, &f32s, -3.0), largest);
        assert_eq!(maximum(simd, &f32s, 10.0), 10.0);
    }
}

proptest! {
    #[test]
    fn rows_are_multiplied_as_what_they_are(case in any_case()) {
        by_each_instruction_set(&case);
    }

    #[test]
    fn what_a_row_of_floats_gives_is_its_own(case in any_case()) {
        by_each_instruction_set(&OneByOne(&case));
    }
}
