//! Narrow numbers as vectors of f32, from one register to another where the processor can.

use std::any::Any;

use pulp::Simd;
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
