//! CUDA: kernels of CubeCL, fused and tuned as users have them. Needs an NVIDIA GPU.

use burn::tensor::DType;
use fusedkv::CacheDtype;
use fusedkv::backend::{Dispatch, DispatchDevice};

use crate::checks::Subject;

fn subject(dtype: DType) -> Subject<Dispatch> {
    Subject {
        device: DispatchDevice::Cuda(Default::default()),
        dtype,
        cache_dtypes: &[
            CacheDtype::Model,
            CacheDtype::F32,
            CacheDtype::F16,
            CacheDtype::Bf16,
            CacheDtype::Int8,
        ],
        tf32: true,
    }
}

mod f32 {
    use super::*;

    conformance!(Dispatch, subject(DType::F32));
    conformance!(training Dispatch, subject(DType::F32));
}

mod bf16 {
    use super::*;

    conformance!(Dispatch, subject(DType::BF16));
}
