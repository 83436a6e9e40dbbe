//! The float types of weights, in files and in memory.

use burn::tensor::{DType, Element, bf16, f16};
use bytemuck::Zeroable;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

/// The float type of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightDtype {
    /// 4 bytes.
    #[default]
    F32,
    /// 2 bytes, IEEE half precision: up to 65504.
    F16,
    /// 2 bytes, the upper half of an f32.
    Bf16,
}

impl WeightDtype {
    /// Its name in a safetensors header, as in "F32".
    pub(super) fn stored(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    pub(super) fn from_stored(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Its name in `config.json`.
    pub(super) fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The type a model's tensors of `dtype` are saved in without loss; f64 loses.
    pub(super) fn of_model(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::Bf16,
            _ => Self::F32,
        }
    }

    pub(super) fn in_memory(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A finite number that the type asked for is too small for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Overflow(pub f64);

/// A number of one of the [`WeightDtype`]s.
pub(super) trait Number: Element + Zeroable {
    const DTYPE: WeightDtype;

    /// The memory of numbers, for the bytes of a file; [`from_file`](Self::from_file) makes them
    /// numbers.
    fn bytes_mut(numbers: &mut [Self]) -> &mut [u8];

    /// As many numbers, or twice as many, in the memory of others.
    fn in_f32s(numbers: &mut [f32]) -> &mut [Self];

    /// Numbers of this machine from the little-endian ones of a file.
    fn from_file(numbers: &mut [Self]);

    fn write_le(self, bytes: &mut Vec<u8>);

    /// Rounds to nearest, ties to even.
    fn round(x: f32) -> Self;

    /// [`round`](Self::round) of as many numbers.
    fn round_all(from: &[f32], to: &mut [Self]);

    fn is_finite(self) -> bool;
}

macro_rules! number {
    ($type:ty, $dtype:ident, $bits:ty, $round:expr, $round_all:expr) => {
        impl Number for $type {
            const DTYPE: WeightDtype = WeightDtype::$dtype;

            fn bytes_mut(numbers: &mut [Self]) -> &mut [u8] {
                bytemuck::cast_slice_mut(numbers)
            }

            fn in_f32s(numbers: &mut [f32]) -> &mut [Self] {
                bytemuck::cast_slice_mut(numbers)
            }

            fn from_file(numbers: &mut [Self]) {
                if cfg!(target_endian = "big") {
                    for number in numbers {
                        *number = Self::from_bits(<$bits>::from_le(number.to_bits()));
                    }
                }
            }

            fn write_le(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_bits().to_le_bytes());
            }

            fn round(x: f32) -> Self {
                $round(x)
            }

            fn round_all(from: &[f32], to: &mut [Self]) {
                $round_all(from, to)
            }

            fn is_finite(self) -> bool {
                <$type>::is_finite(self)
            }
        }
    };
}

number!(f32, F32, u32, |x| x, |from, to: &mut [f32]| to
    .copy_from_slice(from));
number!(f16, F16, u16, f16::from_f32, |from, to: &mut [f16]| to
    .convert_from_f32_slice(from));
number!(bf16, Bf16, u16, bf16::from_f32, |from, to: &mut [bf16]| to
    .convert_from_f32_slice(from));

/// Numbers that are converted at a time: they stay in the first-level cache.
const AT_ONCE: usize = 1024;

/// Widens little-endian numbers of type `source`.
pub(super) fn widen(source: WeightDtype, bytes: &[u8], to: &mut [f32]) {
    let each = bytes.chunks(AT_ONCE * source.bytes());
    for (bytes, to) in each.zip(to.chunks_mut(AT_ONCE)) {
        match source {
            WeightDtype::F32 => {
                f32::bytes_mut(to).copy_from_slice(bytes);
                f32::from_file(to);
            }
            WeightDtype::F16 => {
                // Where they are aligned.
                let mut halves = [f16::ZERO; AT_ONCE];
                let halves = &mut halves[..to.len()];
                f16::bytes_mut(halves).copy_from_slice(bytes);
                f16::from_file(halves);
                halves.convert_to_f32_slice(to);
            }
            WeightDtype::Bf16 => {
                for (to, &bytes) in to.iter_mut().zip(bytes.as_chunks().0) {
                    *to = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
                }
            }
        }
    }
}

/// Rounds numbers to another type, if none is too large for it.
pub(super) fn round_all<T: Number>(from: &[f32], to: &mut [T]) -> Result<(), Overflow> {
    for (from, to) in from.chunks(AT_ONCE).zip(to.chunks_mut(AT_ONCE)) {
        T::round_all(from, to);
        let lost = |x: f32, rounded: T| x.is_finite() & !rounded.is_finite();
        let pairs = || from.iter().zip(&*to);
        // Without an early end, so that it is done in vectors.
        if pairs().fold(false, |any, (&x, &rounded)| any | lost(x, rounded)) {
            let first = pairs().find(|&(&x, &rounded)| lost(x, rounded));
            return first.map_or(Ok(()), |(&x, _)| Err(Overflow(x.into())));
        }
    }
    Ok(())
}

/// `x` as another type, if it is not too large for it.
fn converted<T: Number>(x: f64) -> Result<T, Overflow> {
    let rounded = T::round(x as f32);
    if x.is_finite() && !Number::is_finite(rounded) {
        return Err(Overflow(x));
    }
    Ok(rounded)
}

/// Appends numbers as little-endian bytes of type `target`.
pub(super) fn encode(
    numbers: impl Iterator<Item = f64>,
    target: WeightDtype,
    bytes: &mut Vec<u8>,
) -> Result<(), Overflow> {
    match target {
        WeightDtype::F32 => encode_to::<f32>(numbers, bytes),
        WeightDtype::F16 => encode_to::<f16>(numbers, bytes),
        WeightDtype::Bf16 => encode_to::<bf16>(numbers, bytes),
    }
}

fn encode_to<T: Number>(
    numbers: impl Iterator<Item = f64>,
    bytes: &mut Vec<u8>,
) -> Result<(), Overflow> {
    for number in numbers {
        converted::<T>(number)?.write_le(bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number of 16 bits, and what makes a piece that is no whole one.
    fn all_halves() -> Vec<u8> {
        let all = (0..=u16::MAX).chain([0x3c00; 3]);
        all.flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn every_half_is_widened_to_itself() {
        let bytes = all_halves();
        let numbers = bytes.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b));
        let mut wide = vec![0.0; bytes.len() / 2];
        widen(WeightDtype::F16, &bytes, &mut wide);
        for (bits, x) in numbers.clone().zip(&wide) {
            let expected = f16::from_bits(bits).to_f64();
            assert!(f64::from(*x) == expected || (x.is_nan() && expected.is_nan()));
        }
        widen(WeightDtype::Bf16, &bytes, &mut wide);
        for (bits, x) in numbers.zip(&wide) {
            let expected = bf16::from_bits(bits).to_f64();
            assert!(f64::from(*x) == expected || (x.is_nan() && expected.is_nan()));
        }
    }

    #[test]
    fn many_are_rounded_as_each_by_itself() {
        // Of every exponent, with mantissas around those half way between two.
        let mantissas = [
            0, 1, 0x7fff, 0x8000, 0x8001, 0x1000, 0x0fff, 0x3000, 0x7f_ffff,
        ];
        let from: Vec<f32> = (0..=255u32)
            .flat_map(|exponent| mantissas.map(|m| f32::from_bits(exponent << 23 | m)))
            .flat_map(|x| [x, -x])
            .filter(|x| x.abs() < 65504.0)
            .collect();
        fn check<T: Number>(from: &[f32]) {
            let mut to = vec![T::zeroed(); from.len()];
            round_all(from, &mut to).unwrap();
            for (&x, to) in from.iter().zip(to) {
                let (mut found, mut expected) = (Vec::new(), Vec::new());
                to.write_le(&mut found);
                T::round(x).write_le(&mut expected);
                assert_eq!(found, expected, "{x}");
            }
        }
        check::<f32>(&from);
        check::<f16>(&from);
        check::<bf16>(&from);
    }

    #[test]
    fn narrowing_rounds_to_even_and_refuses_what_does_not_fit() {
        let narrowed = |x: f32, target| {
            let mut bytes = Vec::new();
            encode([f64::from(x)].into_iter(), target, &mut bytes)
                .map(|()| u16::from_le_bytes([bytes[0], bytes[1]]))
        };
        // Half way between two bf16: to the even one, down and up.
        let (down, up) = (f32::from_bits(0x3f80_8000), f32::from_bits(0x3f81_8000));
        assert_eq!(narrowed(down, WeightDtype::Bf16), Ok(0x3f80));
        assert_eq!(narrowed(up, WeightDtype::Bf16), Ok(0x3f82));
        assert_eq!(narrowed(65504.0, WeightDtype::F16), Ok(0x7bff));
        assert_eq!(narrowed(1e5, WeightDtype::F16), Err(Overflow(1e5)));
        assert_eq!(narrowed(f32::INFINITY, WeightDtype::F16), Ok(0x7c00));
        // The first of several, and not what was infinite before.
        let mut to = vec![bf16::ZERO; 3000];
        let mut from = vec![1.0; 3000];
        from[7] = f32::INFINITY;
        assert_eq!(round_all(&from, &mut to), Ok(()));
        (from[2000], from[2900]) = (f32::MAX, f32::MIN);
        let found = round_all(&from, &mut to);
        assert_eq!(found, Err(Overflow(f32::MAX.into())));
    }
}
