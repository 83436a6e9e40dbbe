//! wgpu: kernels of CubeCL, fused and tuned as users have them, on whatever device there is. A
//! software one will do: Debian's `mesa-vulkan-drivers`.

mod burn_faults;

use burn::tensor::DType;
use fusedkv::CacheDtype;
use fusedkv::backend::{Dispatch, DispatchDevice};

use crate::checks::Subject;

fn subject() -> Subject<Dispatch> {
    Subject {
        device: DispatchDevice::Wgpu(Default::default()),
        dtype: DType::F32,
        cache_dtypes: &[CacheDtype::Model, CacheDtype::F32, CacheDtype::F16],
        tf32: false,
    }
}

conformance!(Dispatch, subject());
conformance!(training Dispatch, subject());
