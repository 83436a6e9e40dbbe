//! Choosing a Burn backend and a float type by name, shared by the examples.

use std::error::Error;
use std::process::ExitCode;

use burn::tensor::backend::Backend;
#[cfg(feature = "cuda")]
use burn::tensor::{DType, set_default_dtypes};
use clap::ValueEnum;
use fusedkv::backend::Flex;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use fusedkv::backend::{Dispatch, DispatchDevice};
use fusedkv::checkpoint::WeightDtype;

/// The backends this crate has features for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// CPU, pure Rust.
    Flex,
    /// CPU, ndarray.
    Ndarray,
    /// GPU through Vulkan, Metal, DirectX or WebGPU.
    Wgpu,
    /// NVIDIA GPU.
    Cuda,
    /// NVIDIA GPU, computing in bf16.
    CudaBf16,
}

/// A backend the example was built without.
#[derive(Debug, thiserror::Error)]
#[error("backend `{name}` is not compiled in, run with `--features {name}` to add it")]
pub struct NotCompiledIn {
    name: &'static str,
}

/// A program that runs on any backend.
pub trait Program {
    /// Runs on the backend's default device.
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>>;
}

impl BackendName {
    /// Runs `program` on this backend.
    pub fn run(self, program: impl Program) -> Result<(), Box<dyn Error>> {
        keep_freed_memory();
        match self {
            Self::Flex => program.run::<Flex>(&Default::default()),
            #[cfg(feature = "ndarray")]
            Self::Ndarray => program.run::<fusedkv::backend::NdArray>(&Default::default()),
            #[cfg(not(feature = "ndarray"))]
            Self::Ndarray => Err(NotCompiledIn { name: "ndarray" }.into()),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => program.run::<Dispatch>(&DispatchDevice::Wgpu(Default::default())),
            #[cfg(not(feature = "wgpu"))]
            Self::Wgpu => Err(NotCompiledIn { name: "wgpu" }.into()),
            #[cfg(feature = "cuda")]
            Self::Cuda => program.run::<Dispatch>(&DispatchDevice::Cuda(Default::default())),
            #[cfg(feature = "cuda")]
            Self::CudaBf16 => {
                let device = DispatchDevice::Cuda(Default::default());
                set_default_dtypes::<Dispatch>(&device, DType::BF16, DType::I32)?;
                program.run::<Dispatch>(&device)
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda | Self::CudaBf16 => Err(NotCompiledIn { name: "cuda" }.into()),
        }
    }
}

/// Has mimalloc keep what is freed, which is soon taken again: given back to the system every second, as
/// mimalloc does by itself, a training took a tenth longer (docs/decisions/products.md).
fn keep_freed_memory() {
    /// `mi_option_purge_delay`, for which the crate has no name.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: sets a number that mimalloc knows, before there are other threads.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) }
}

/// What a program returns to the shell; an error is printed.
pub fn exit_code(result: Result<(), Box<dyn Error>>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The float types of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeName {
    F32,
    F16,
    Bf16,
}

impl From<DtypeName> for WeightDtype {
    fn from(name: DtypeName) -> Self {
        match name {
            DtypeName::F32 => Self::F32,
            DtypeName::F16 => Self::F16,
            DtypeName::Bf16 => Self::Bf16,
        }
    }
}
