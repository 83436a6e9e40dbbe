//! Numbers of half the bits: parameters may be, sums and updates must not.

use burn::tensor::DType;

/// The type to compute in for numbers of `dtype`: f32 where that has less precision.
pub(super) fn at_least_f32(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    }
}
