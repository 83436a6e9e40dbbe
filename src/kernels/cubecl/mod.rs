//! Kernels for Burn's GPU backends, written in CubeCL; feature `cubecl-attention`.
//!
//! They serve `Dispatch`, `Wgpu` and `Cuda`, which fuse operations. Under autodiff the backend is
//! another type, and Burn's operations are taken.

mod attention;
mod kernel;
mod queue;
#[cfg(test)]
mod tests;

use std::any::{Any, TypeId};

use burn::tensor::{Tensor, backend::Backend};
#[cfg(feature = "cuda")]
use burn_cubecl::cubecl::cuda::CudaRuntime;
use burn_dispatch::{Dispatch, DispatchDevice};
#[cfg(feature = "wgpu")]
use burn_wgpu::WgpuRuntime;

use super::operands::{Term, Visibility};
use super::table::Kernels;
use attention::{Visible, attention};

/// The kernels for CubeCL's backends.
pub(super) struct CubeclKernels;

impl Kernels for CubeclKernels {
    fn attention<B: Backend>(
        query: &Tensor<B, 4>,
        keys: &[Term<B>],
        values: &[Term<B>],
        visibility: &Visibility<B>,
    ) -> Option<Tensor<B, 4>> {
        let device = query.device();
        let gpu = Gpu::of::<B>(&device)?;
        let ([_, _, queries, _], [_, _, n_keys, _]) = (query.dims(), keys[0].source.dims());
        let visible = Visible::of(visibility, [queries, n_keys], &device);
        match gpu {
            #[cfg(feature = "wgpu")]
            Gpu::Wgpu(device) => {
                attention::<WgpuRuntime, B>(&device, query, keys, values, &visible)
            }
            #[cfg(feature = "cuda")]
            Gpu::Cuda(device) => {
                attention::<CudaRuntime, B>(&device, query, keys, values, &visible)
            }
        }
    }
}

/// Where a backend computes.
enum Gpu {
    #[cfg(feature = "wgpu")]
    Wgpu(burn_wgpu::WgpuDevice),
    #[cfg(feature = "cuda")]
    Cuda(burn_cuda::CudaDevice),
}

impl Gpu {
    /// The GPU that `device` of the backend `B` is, if it is one.
    fn of<B: Backend>(device: &B::Device) -> Option<Self> {
        let backend = TypeId::of::<B>();
        let device = device as &dyn Any;
        if backend == TypeId::of::<Dispatch>() {
            return match device.downcast_ref::<DispatchDevice>()? {
                #[cfg(feature = "wgpu")]
                DispatchDevice::Wgpu(device) => Some(Self::Wgpu(device.clone())),
                #[cfg(feature = "cuda")]
                DispatchDevice::Cuda(device) => Some(Self::Cuda(device.clone())),
                #[allow(
                    unreachable_patterns,
                    reason = "other crates may turn other backends on"
                )]
                _ => None,
            };
        }
        #[cfg(feature = "wgpu")]
        if backend == TypeId::of::<burn_wgpu::Wgpu>() {
            return device.downcast_ref().cloned().map(Self::Wgpu);
        }
        #[cfg(feature = "cuda")]
        if backend == TypeId::of::<burn_cuda::Cuda>() {
            return device.downcast_ref().cloned().map(Self::Cuda);
        }
        None
    }
}
