//! Narrow numbers as vectors of f32, from one register to another where the processor can.

use std::any::Any;

use half::{bf16, f16};
use pulp::Simd;
#[cfg(test)]
use pulp::bytemuck::cast_slice;
use pulp::bytemuck::{cast, cast_slice_mut};
#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3, V4};

use crate::kernels::packed::{Codes, GROUP};

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

/// Numbers as f32; as many of both.
#[inline(always)]
pub(super) fn f16s<S: Simd>(simd: S, numbers: &[f16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = is::<S, V4>(simd) {
        let (vectors, tail) = numbers.as_chunks::<16>();
        let (to, to_tail) = to.as_chunks_mut::<16>();
        for (to, numbers) in to.iter_mut().zip(vectors) {
            let mut bits = [0; 16];
            (bits.iter_mut().zip(numbers)).for_each(|(bits, x)| *bits = x.to_bits());
            *to = cast(simd.avx512f._mm512_cvtph_ps(cast(bits)));
        }
        (to_tail.iter_mut().zip(tail)).for_each(|(to, x)| *to = widen_f16(*x));
        return;
    }
    let _ = simd;
    (to.iter_mut().zip(numbers)).for_each(|(to, x)| *to = widen_f16(*x));
}

/// Numbers as f32; as many of both.
#[inline(always)]
pub(super) fn bf16s(numbers: &[bf16], to: &mut [f32]) {
    (to.iter_mut().zip(numbers)).for_each(|(to, x)| *to = widen_bf16(*x));
}

/// 8-bit codes times their scale as f32; as many of both.
#[inline(always)]
pub(super) fn scaled<S: Simd>(simd: S, codes: &[i8], scale: f32, to: &mut [f32]) {
    let (to, to_tail) = S::as_mut_simd_f32s(to);
    let (codes, tail) = codes.split_at(to.len() * S::F32_LANES);
    let factor = simd.splat_f32s(scale);
    for (to, codes) in to.iter_mut().zip(codes.chunks_exact(S::F32_LANES)) {
        *to = simd.mul_f32s(signed(simd, codes), factor);
    }
    (to_tail.iter_mut().zip(tail)).for_each(|(to, x)| *to = f32::from(*x) * scale);
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

/// The instruction set as what it is, which the compiler knows.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn is<S: Simd, T: Simd>(simd: S) -> Option<T> {
    (&simd as &dyn Any).downcast_ref::<T>().copied()
}

/// The number itself, by arithmetic that compilers turn into vectors: the exponent is moved to its
/// place and its bias corrected by a product, which is exact and also right for subnormal numbers.
/// What is not finite has all bits of the exponent set in both.
#[inline(always)]
pub(super) fn widen_f16(x: f16) -> f32 {
    /// 2^112: biases of 127 against 15.
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(x.to_bits());
    let not_finite = if bits & 0x7c00 == 0x7c00 {
        0xff << 23
    } else {
        0
    };
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * BIAS;
    f32::from_bits(magnitude.to_bits() | not_finite | (bits & 0x8000) << 16)
}

/// The number itself.
#[inline(always)]
pub(super) fn widen_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

#[cfg(test)]
mod tests {
    use pulp::{Scalar, WithSimd};

    use super::*;

    /// Every byte as codes and as halves, and f16 of every 97th pattern.
    struct Widened;

    impl WithSimd for Widened {
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
            // Of a length that fills no vector.
            let halves: Vec<f16> = (0..0x7c00).step_by(97).map(f16::from_bits).collect();
            let mut wide = vec![0.0; halves.len()];
            f16s(simd, &halves, &mut wide);
            assert!(
                wide.iter()
                    .zip(&halves)
                    .all(|(wide, x)| *wide == x.to_f32())
            );
            let bytes = &bytes[..201];
            let mut wide = vec![0.0; bytes.len()];
            scaled(simd, bytes, 0.5, &mut wide);
            assert!(
                wide.iter()
                    .zip(bytes)
                    .all(|(wide, x)| *wide == f32::from(*x) * 0.5)
            );
        }
    }

    /// By each of the processor's instruction sets, not only the one that is taken.
    #[test]
    fn instruction_sets_widen_alike() {
        Simd::vectorize(Scalar::new(), Widened);
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = V3::try_new() {
                Simd::vectorize(simd, Widened);
            }
            if let Some(simd) = V4::try_new() {
                Simd::vectorize(simd, Widened);
            }
        }
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
