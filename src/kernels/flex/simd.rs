//! What the kernels do with vectors of whatever length the processor has.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::_MM_HINT_T0;

use pulp::Simd;
#[cfg(target_arch = "x86_64")]
use pulp::bytemuck::cast;
#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3, V4};

#[cfg(target_arch = "x86_64")]
use super::widen::is;

/// Σ a·b. Both slices have the same length.
#[inline(always)]
pub(super) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (a, a_tail) = S::as_simd_f32s(a);
    let (b, b_tail) = S::as_simd_f32s(b);
    // Four sums side by side: each waits for its last addition.
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (a4, a) = a.as_chunks::<4>();
    let (b4, b) = b.as_chunks::<4>();
    for (a, b) in a4.iter().zip(b4) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum = simd.mul_add_f32s(a, b, *sum);
        }
    }
    for (&a, &b) in a.iter().zip(b) {
        sums[0] = simd.mul_add_f32s(a, b, sums[0]);
    }
    let sum = simd.add_f32s(
        simd.add_f32s(sums[0], sums[1]),
        simd.add_f32s(sums[2], sums[3]),
    );
    let tail = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum::<f32>();
    simd.reduce_sum_f32s(sum) + tail
}

/// `y += a·x`. Both slices have the same length.
#[inline(always)]
pub(super) fn axpy<S: Simd>(simd: S, a: f32, x: &[f32], y: &mut [f32]) {
    let (x, x_tail) = S::as_simd_f32s(x);
    let (y, y_tail) = S::as_mut_simd_f32s(y);
    let factor = simd.splat_f32s(a);
    for (y, &x) in y.iter_mut().zip(x) {
        *y = simd.mul_add_f32s(factor, x, *y);
    }
    for (y, x) in y_tail.iter_mut().zip(x_tail) {
        *y += a * x;
    }
}

/// Asks for the line of memory that lies `bytes` after a number, as of [`fetch`].
#[inline(always)]
pub(super) fn fetch_ahead<S: Simd, T>(simd: S, of: &T, bytes: usize) {
    fetch(
        simd,
        std::ptr::from_ref(of).cast::<i8>().wrapping_add(bytes),
    );
}

/// Asks for the line of memory at a place, whether anything is there or not: what is read
/// while much is computed of every line then comes in time. Does nothing without AVX2 or AVX-512.
#[inline(always)]
pub(super) fn fetch<S: Simd>(simd: S, place: *const i8) {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = match is::<S, V4>(simd) {
            Some(simd) => Some(*simd),
            None => is::<S, V3>(simd),
        };
        if let Some(simd) = avx2 {
            simd.sse._mm_prefetch::<_MM_HINT_T0>(place);
        }
    }
    let _ = (simd, place);
}

/// The sums of the numbers of four vectors each: together they take a third of what each by itself does.
#[inline(always)]
pub(super) fn sums_of_each<S: Simd>(simd: S, vectors: [S::f32s; 4]) -> [f32; 4] {
    // Each step has half the vectors, with sums of pairs of numbers in them.
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = is::<S, V4>(simd) {
            let (avx, [a, b, c, d]) = (simd.avx512f, cast(vectors));
            let ab = avx._mm512_add_ps(avx._mm512_unpacklo_ps(a, b), avx._mm512_unpackhi_ps(a, b));
            let cd = avx._mm512_add_ps(avx._mm512_unpacklo_ps(c, d), avx._mm512_unpackhi_ps(c, d));
            let low = avx._mm512_unpacklo_pd(cast(ab), cast(cd));
            let high = avx._mm512_unpackhi_pd(cast(ab), cast(cd));
            let quarters = avx._mm512_add_ps(cast(low), cast(high));
            let low = avx._mm512_castps512_ps256(quarters);
            let high = avx._mm512_extractf64x4_pd::<1>(cast(quarters));
            return halves_added(*simd, simd.avx._mm256_add_ps(low, cast(high)));
        }
        if let Some(simd) = is::<S, V3>(simd) {
            let (avx, [a, b, c, d]) = (simd.avx, cast(vectors));
            let ab = avx._mm256_add_ps(avx._mm256_unpacklo_ps(a, b), avx._mm256_unpackhi_ps(a, b));
            let cd = avx._mm256_add_ps(avx._mm256_unpacklo_ps(c, d), avx._mm256_unpackhi_ps(c, d));
            let low = avx._mm256_unpacklo_pd(cast(ab), cast(cd));
            let high = avx._mm256_unpackhi_pd(cast(ab), cast(cd));
            return halves_added(simd, avx._mm256_add_ps(cast(low), cast(high)));
        }
    }
    let mut sums = [0.0; 4];
    for (sum, vector) in sums.iter_mut().zip(vectors) {
        *sum = simd.reduce_sum_f32s(vector);
    }
    sums
}

/// Both halves of a vector, added.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn halves_added(simd: V3, vector: std::arch::x86_64::__m256) -> [f32; 4] {
    let low = simd.avx._mm256_castps256_ps128(vector);
    let high = simd.avx._mm256_extractf128_ps::<1>(vector);
    cast(simd.sse._mm_add_ps(low, high))
}

/// The largest of some numbers, and of `least`. What is no number may or may not be.
#[inline(always)]
pub(super) fn maximum<S: Simd>(simd: S, numbers: &[f32], least: f32) -> f32 {
    let (vectors, tail) = S::as_simd_f32s(numbers);
    let mut most = simd.splat_f32s(least);
    for &vector in vectors {
        most = simd.max_f32s(most, vector);
    }
    tail.iter()
        .copied()
        .fold(simd.reduce_max_f32s(most), f32::max)
}

/// 2^x to a relative error of 2e-7, for x up to 127; below −126 it is 2^−126, and NaN stays NaN.
///
/// x = n + f with n whole and f in [−1/2, 1/2]: 2^f is a polynomial, and n is added to its exponent.
#[inline(always)]
pub(super) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5 · 2^23 leaves no room for a fraction, and n in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // Taylor's coefficients of 2^f = e^(f ln 2): ln(2)^k / k!.
    const C: [f32; 7] = [
        1.0,
        std::f32::consts::LN_2,
        0.240_226_5,
        0.055_504_11,
        0.009_618_129,
        0.001_333_355_8,
        0.000_154_035_3,
    ];
    let splat = |value| simd.splat_f32s(value);
    // In this order x86 returns x if it is NaN.
    let x = simd.min_f32s(splat(127.0), simd.max_f32s(splat(-126.0), x));
    let shifted = simd.add_f32s(x, splat(ROUND));
    let f = simd.sub_f32s(x, simd.sub_f32s(shifted, splat(ROUND)));
    let mut power = splat(C[6]);
    for &c in C[..6].iter().rev() {
        power = simd.mul_add_f32s(power, f, splat(c));
    }
    let n = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(power), n))
}
