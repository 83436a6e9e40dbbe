//! Narrow numbers as vectors of f32, from one register to another where the processor can.

use std::any::Any;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::Simd;
#[cfg(target_arch = "x86_64")]
use pulp::bytemuck::cast;
use pulp::bytemuck::{cast_slice, cast_slice_mut};
#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3, V4};
use rten_simd::ops::{BitOps, Extend};
use rten_simd::{Isa, Simd as _, SimdOp};

use crate::kernels::packed::{Codes, GROUP};

/// No vector has more numbers, and every vector's length divides it.
pub(super) const MOST_LANES: usize = 16;

/// Stored numbers, a vector of which becomes floats in a register.
pub(super) trait Number: Copy + Default {
    /// Whether [`Self::widened`] takes fewer instructions for a vector than [`Self::vector`].
    #[inline(always)]
    fn widens_slices_faster<S: Simd>(_: S) -> bool {
        false
    }

    /// Numbers as f32; as many of both.
    #[inline(always)]
    fn widened<S: Simd>(simd: S, numbers: &[Self], to: &mut [f32]) {
        scaled(simd, numbers, 1.0, to);
    }

    /// As many numbers as a vector has.
    fn vector<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s;

    /// As many or fewer, and zeros behind.
    #[inline(always)]
    fn padded<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s {
        if numbers.len() == S::F32_LANES {
            return Self::vector(simd, numbers);
        }
        let mut all = [Self::default(); MOST_LANES];
        all[..numbers.len()].copy_from_slice(numbers);
        Self::vector(simd, &all[..S::F32_LANES])
    }
}

impl Number for f32 {
    #[inline(always)]
    fn vector<S: Simd>(_: S, numbers: &[Self]) -> S::f32s {
        S::as_simd_f32s(numbers).0[0]
    }
}

impl Number for f16 {
    /// With AVX2 alone: of the processor's own conversion `pulp` has AVX-512's for vectors, and `rten-simd` both
    /// for slices.
    #[inline(always)]
    fn widens_slices_faster<S: Simd>(simd: S) -> bool {
        has_avx2_alone(simd)
    }

    #[inline(always)]
    fn widened<S: Simd>(simd: S, numbers: &[Self], to: &mut [f32]) {
        if !Self::widens_slices_faster(simd) {
            return scaled(simd, numbers, 1.0, to);
        }
        let rest = Halves(numbers.reinterpret_cast(), to).dispatch();
        let done = numbers.len() - rest;
        scaled(simd, &numbers[done..], 1.0, &mut to[done..]);
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s {
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = is::<S, V4>(simd) {
            return cast(
                simd.avx512f
                    ._mm512_cvtph_ps(cast(bits::<16>(numbers.reinterpret_cast()))),
            );
        }
        // As `widen_f16`, the sign at its place from the start.
        let bits = halves(simd, numbers.reinterpret_cast());
        let bits = simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(13));
        let bits = simd.and_u32s(bits, simd.splat_u32s(1 << 31 | 0x7fff << 13));
        let finite = simd.mul_f32s(simd.transmute_f32s_u32s(bits), simd.splat_f32s(F16_BIAS));
        let exponent = simd.splat_u32s(0x7c00 << 13);
        let not_finite = simd.equal_u32s(simd.and_u32s(bits, exponent), exponent);
        let ones = simd.select_u32s(not_finite, simd.splat_u32s(0xff << 23), simd.splat_u32s(0));
        simd.transmute_f32s_u32s(simd.or_u32s(simd.transmute_u32s_f32s(finite), ones))
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn vector<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s {
        let bits = halves(simd, numbers.reinterpret_cast());
        simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(16)))
    }
}

impl Number for i8 {
    #[inline(always)]
    fn vector<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s {
        signed(simd, numbers)
    }
}

/// Numbers times a scale as f32, in registers; as many of both.
#[inline(always)]
pub(super) fn scaled<S: Simd, N: Number>(simd: S, numbers: &[N], scale: f32, to: &mut [f32]) {
    let scale = simd.splat_f32s(scale);
    let (to, to_tail) = S::as_mut_simd_f32s(to);
    let numbers = numbers.chunks_exact(S::F32_LANES);
    let tail = numbers.remainder();
    for (to, numbers) in to.iter_mut().zip(numbers) {
        *to = simd.mul_f32s(N::vector(simd, numbers), scale);
    }
    if !tail.is_empty() {
        let tail = [simd.mul_f32s(N::padded(simd, tail), scale)];
        to_tail.copy_from_slice(&cast_slice(&tail)[..to_tail.len()]);
    }
}

/// The bits of f16 and the f32 that they become. What fills no vector is left: how many that are is returned.
struct Halves<'a>(&'a [u16], &'a mut [f32]);

impl SimdOp for Halves<'_> {
    type Output = usize;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) -> usize {
        let Self(bits, to) = self;
        let lanes = isa.f32().len();
        let bits = bits.chunks_exact(2 * lanes);
        let rest = bits.remainder().len();
        for (bits, to) in bits.zip(to.chunks_exact_mut(2 * lanes)) {
            let halves: I::F16 = isa.u16().load(bits).reinterpret_cast();
            let (low, high) = to.split_at_mut(lanes);
            isa.f32().store(isa.f16().extend_low(halves), low);
            isa.f32().store(isa.f16().extend_high(halves), high);
        }
        rest
    }
}

/// As many numbers of 16 bits as a vector has, the highest bit of each in all bits above it as well.
#[inline(always)]
fn halves<S: Simd>(simd: S, numbers: &[u16]) -> S::u32s {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = is::<S, V4>(simd) {
            return cast(simd.convert_i16x16_to_i32x16(cast(bits::<16>(numbers))));
        }
        if let Some(simd) = is::<S, V3>(simd) {
            return cast(simd.convert_i16x8_to_i32x8(cast(bits::<8>(numbers))));
        }
    }
    let mut vector = [simd.splat_u32s(0)];
    let words: &mut [i32] = cast_slice_mut(&mut vector);
    (words.iter_mut().zip(numbers)).for_each(|(to, x)| *to = i32::from(x.cast_signed()));
    let [vector] = vector;
    vector
}

/// The first N of some numbers.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn bits<const N: usize>(numbers: &[u16]) -> [u16; N] {
    let mut all = [0; N];
    all.copy_from_slice(&numbers[..N]);
    all
}

/// How the codes of a group become numbers: known to the compiler, unlike [`Codes`].
pub(super) trait Coded {
    const CODES: Codes;

    /// The vector that begins with code `start` of a group's bytes.
    fn vector<S: Simd>(simd: S, bytes: &[i8], start: usize) -> S::f32s;
}

/// [`Codes::Int8`].
pub(super) struct Int8;

/// [`Codes::Int4`].
pub(super) struct Int4;

impl Coded for Int8 {
    const CODES: Codes = Codes::Int8;

    #[inline(always)]
    fn vector<S: Simd>(simd: S, bytes: &[i8], start: usize) -> S::f32s {
        signed(simd, &bytes[start..][..S::F32_LANES])
    }
}

impl Coded for Int4 {
    const CODES: Codes = Codes::Int4;

    #[inline(always)]
    fn vector<S: Simd>(simd: S, bytes: &[i8], start: usize) -> S::f32s {
        // No vector is longer than half a group.
        let bytes = unsigned(simd, &bytes[start % (GROUP / 2)..][..S::F32_LANES]);
        let codes = match start < GROUP / 2 {
            true => simd.and_u32s(bytes, simd.splat_u32s(15)),
            false => simd.wrapping_dyn_shr_u32s(bytes, simd.splat_u32s(4)),
        };
        // A small number in the lowest bits of 2^23 is that much more.
        const BASE: f32 = 8_388_608.0;
        let above = simd.or_u32s(codes, simd.splat_u32s(BASE.to_bits()));
        simd.sub_f32s(simd.transmute_f32s_u32s(above), simd.splat_f32s(BASE))
    }
}

/// As many bytes as a vector has numbers, −128 to 127.
#[inline(always)]
pub(super) fn signed<S: Simd>(simd: S, bytes: &[i8]) -> S::f32s {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = is::<S, V4>(simd) {
            let wide = simd.convert_i8x16_to_i32x16(cast(first::<16>(bytes)));
            return cast(simd.convert_i32x16_to_f32x16(wide));
        }
        if let Some(simd) = is::<S, V3>(simd) {
            let wide = simd.convert_i8x16_to_i32x8(cast(first::<8>(bytes)));
            return cast(simd.convert_i32x8_to_f32x8(wide));
        }
    }
    let mut vector = [simd.splat_f32s(0.0)];
    let numbers: &mut [f32] = cast_slice_mut(&mut vector);
    (numbers.iter_mut().zip(bytes)).for_each(|(to, x)| *to = f32::from(*x));
    let [vector] = vector;
    vector
}

/// As many bytes as a vector has numbers, 0 to 255.
#[inline(always)]
fn unsigned<S: Simd>(simd: S, bytes: &[i8]) -> S::u32s {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = is::<S, V4>(simd) {
            return cast(simd.convert_u8x16_to_i32x16(cast(first::<16>(bytes))));
        }
        if let Some(simd) = is::<S, V3>(simd) {
            return cast(simd.convert_u8x16_to_u32x8(cast(first::<8>(bytes))));
        }
    }
    let mut vector = [simd.splat_u32s(0)];
    let numbers: &mut [u32] = cast_slice_mut(&mut vector);
    (numbers.iter_mut().zip(bytes)).for_each(|(to, x)| *to = u32::from(*x as u8));
    let [vector] = vector;
    vector
}

/// The first N bytes, and as many zeros as make them 16.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn first<const N: usize>(bytes: &[i8]) -> [i8; 16] {
    let mut all = [0; 16];
    all[..N].copy_from_slice(&bytes[..N]);
    all
}

/// Whether the instruction set is AVX2 and no more, which the compiler knows.
#[inline(always)]
pub(super) fn has_avx2_alone<S: Simd>(simd: S) -> bool {
    #[cfg(target_arch = "x86_64")]
    return is::<S, V3>(simd).is_some();
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = simd;
        false
    }
}

/// The instruction set as what it is, which the compiler knows.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn is<S: Simd, T: Simd>(simd: S) -> Option<T> {
    (&simd as &dyn Any).downcast_ref::<T>().copied()
}

/// 2^112: biases of 127 against 15.
const F16_BIAS: f32 = f32::from_bits((127 + 112) << 23);

/// The number itself, by arithmetic that compilers turn into vectors: the exponent is moved to its
/// place and its bias corrected by a product, which is exact and also right for subnormal numbers.
/// What is not finite has all bits of the exponent set in both.
#[inline(always)]
pub(super) fn widen_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let not_finite = if bits & 0x7c00 == 0x7c00 {
        0xff << 23
    } else {
        0
    };
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * F16_BIAS;
    f32::from_bits(magnitude.to_bits() | not_finite | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use pulp::WithSimd;

    use super::*;
    use crate::kernels::flex::tests::by_each_instruction_set;

    /// Every byte as codes and as halves, and every f16 and bf16.
    struct Widened;

    impl WithSimd for &Widened {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let bytes: Vec<i8> = (i8::MIN..=i8::MAX).collect();
            let halves = |byte: i8| [f32::from(byte as u8 & 15), f32::from(byte as u8 >> 4)];
            for bytes in bytes.chunks(GROUP / 2) {
                let group = [bytes, bytes].concat();
                for start in (0..GROUP).step_by(S::F32_LANES) {
                    let at = |i: usize| group[(start + i) % (GROUP / 2)];
                    let codes = [Int8::vector(simd, &group, start)];
                    let quarters = [Int4::vector(simd, bytes, start)];
                    let (codes, quarters): (&[f32], &[f32]) =
                        (cast_slice(&codes), cast_slice(&quarters));
                    for i in 0..S::F32_LANES {
                        assert_eq!(codes[i], f32::from(at(i)));
                        assert_eq!(quarters[i], halves(at(i))[start / (GROUP / 2)]);
                    }
                }
            }
            // Every half there is, in a length that fills no vector; what is no number stays none.
            let halves: Vec<f16> = (1..=u16::MAX).map(f16::from_bits).collect();
            let mut wide = vec![0.0; halves.len()];
            f16::widened(simd, &halves, &mut wide);
            for (wide, x) in wide.iter().zip(&halves) {
                assert!(wide.to_bits() == x.to_f32().to_bits() || wide.is_nan() && x.is_nan());
            }
            let halves: Vec<bf16> = (1..=u16::MAX).map(bf16::from_bits).collect();
            bf16::widened(simd, &halves, &mut wide);
            for (wide, x) in wide.iter().zip(&halves) {
                assert!(wide.to_bits() == x.to_f32().to_bits() || wide.is_nan() && x.is_nan());
            }
        }
    }

    #[test]
    fn instruction_sets_widen_alike() {
        by_each_instruction_set(&Widened);
    }

    #[test]
    fn every_half_is_widened_to_itself() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            if x.is_nan() {
                assert!(widen_f16(x).is_nan(), "{bits:#x}");
            } else {
                assert_eq!(widen_f16(x).to_bits(), x.to_f32().to_bits(), "{bits:#x}");
            }
        }
    }
}
