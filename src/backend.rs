//! The Burn backends this crate has features for, under one roof.
//!
//! Everything here is generic over [`Backend`](burn::tensor::backend::Backend) and takes any other
//! as well; these are the ones the examples and tests run on.
//!
//! A program that names `Wgpu` or `Cuda` as its backend compiles all of their operations anew, which
//! takes minutes. `Dispatch` has them compiled already, in a crate of its own, and chooses by the
//! device: `DispatchDevice::Wgpu(Default::default())`. Training wraps it as any other,
//! `Autodiff<Dispatch>`.

#[cfg(feature = "train")]
pub use burn::backend::Autodiff;
#[cfg(feature = "train")]
pub use burn::backend::autodiff::checkpoint::strategy::BalancedCheckpointing;
#[cfg(feature = "cuda")]
pub use burn_cuda::{Cuda, CudaDevice};
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub use burn_dispatch::{Dispatch, DispatchDevice};
#[cfg(feature = "flex")]
pub use burn_flex::{Flex, FlexDevice};
#[cfg(feature = "ndarray")]
pub use burn_ndarray::{NdArray, NdArrayDevice};
#[cfg(feature = "wgpu")]
pub use burn_wgpu::{Wgpu, WgpuDevice};
