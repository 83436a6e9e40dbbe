//! The float types of weights, in files and in memory.

use burn::tensor::{DType, Element, bf16, f16};
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
pub(super) trait Number: Element {
    const DTYPE: WeightDtype;

    /// From as many little-endian bytes as the type has.
    fn from_le(bytes: &[u8]) -> Self;

    fn write_le(self, bytes: &mut Vec<u8>);

    /// Rounds to nearest, ties to even.
    fn round(x: f32) -> Self;

    fn widen(self) -> f32;
}

macro_rules! number {
    ($type:ty, $dtype:ident, $bits:ty, $round:expr, $widen:expr) => {
        impl Number for $type {
            const DTYPE: WeightDtype = WeightDtype::$dtype;

            fn from_le(bytes: &[u8]) -> Self {
                let mut bits = [0; size_of::<$bits>()];
                bits.copy_from_slice(bytes);
                Self::from_bits(<$bits>::from_le_bytes(bits))
            }

            fn write_le(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_bits().to_le_bytes());
            }

            fn round(x: f32) -> Self {
                $round(x)
            }

            fn widen(self) -> f32 {
                $widen(self)
            }
        }
    };
}

number!(f32, F32, u32, |x| x, |x| x);
number!(f16, F16, u16, f16::from_f32, f16::to_f32);
number!(bf16, Bf16, u16, bf16::from_f32, bf16::to_f32);

/// `x` as another type, if it is not too large for it.
fn converted<T: Number>(x: f64) -> Result<T, Overflow> {
    let rounded = T::round(x as f32);
    if x.is_finite() && !rounded.widen().is_finite() {
        return Err(Overflow(x));
    }
    Ok(rounded)
}

/// Reads little-endian numbers of type `source` as `T`s; the same bits where the types are one.
pub(super) fn decode<T: Number>(
    source: WeightDtype,
    bytes: &[u8],
    out: impl FnMut(T),
) -> Result<(), Overflow> {
    match source {
        WeightDtype::F32 => decode_from::<f32, T>(bytes, out),
        WeightDtype::F16 => decode_from::<f16, T>(bytes, out),
        WeightDtype::Bf16 => decode_from::<bf16, T>(bytes, out),
    }
}

fn decode_from<S: Number, T: Number>(bytes: &[u8], mut out: impl FnMut(T)) -> Result<(), Overflow> {
    for number in bytes.chunks_exact(S::DTYPE.bytes()) {
        out(if S::DTYPE == T::DTYPE {
            // Not through f32, which would make signalling NaNs quiet.
            T::from_le(number)
        } else {
            converted(S::from_le(number).widen().into())?
        });
    }
    Ok(())
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

    fn decoded<T: Number>(source: WeightDtype, bytes: &[u8]) -> Result<Vec<u8>, Overflow> {
        let mut out = Vec::new();
        decode::<T>(source, bytes, |x| x.write_le(&mut out))?;
        Ok(out)
    }

    #[test]
    fn the_same_type_is_the_same_bits() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        assert_eq!(decoded::<f16>(WeightDtype::F16, &all), Ok(all.clone()));
        assert_eq!(decoded::<bf16>(WeightDtype::Bf16, &all), Ok(all));
        let signalling = 0x7f80_0001_u32.to_le_bytes();
        assert_eq!(
            decoded::<f32>(WeightDtype::F32, &signalling),
            Ok(signalling.to_vec())
        );
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
        let largest = f32::MAX.to_le_bytes();
        let found = decoded::<bf16>(WeightDtype::F32, &largest);
        assert_eq!(found, Err(Overflow(f32::MAX.into())));
    }
}
