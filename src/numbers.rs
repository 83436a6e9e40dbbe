//! A tensor's numbers on the host, and the types of them.

use burn::tensor::{DType, Tensor, backend::Backend};

/// All elements in order, as f32; not copied where they are that, and on the host, already.
pub(crate) fn numbers<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    data.into_vec().expect("converted to f32")
}

/// The type to compute in for numbers of `dtype`: f32 where that has less precision.
pub(crate) fn at_least_f32(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    }
}
