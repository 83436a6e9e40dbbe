//! wgpu: kernels of CubeCL, fused and tuned as users have them, on whatever device there is. A
//! software one will do: Debian's `mesa-vulkan-drivers`.

mod burn_faults;

use burn::tensor::DType;
use fusedkv::CacheDtype;
use fusedkv::backend::{Dispatch, DispatchDevice};

use crate::checks::Subject;

fn subject(dtype: DType) -> Subject<Dispatch> {
    Subject {
        device: DispatchDevice::Wgpu(Default::default()),
        dtype,
        cache_dtypes: &[CacheDtype::Model, CacheDtype::F32, CacheDtype::F16],
        tf32: false,
    }
}

mod f32 {
    use super::*;

    conformance!(Dispatch, subject(DType::F32));
    conformance!(training Dispatch, subject(DType::F32));
}

mod f16 {
    use super::*;

    conformance!(Dispatch, subject(DType::F16));
}
