//! Running a job on the backend named on the command line.

use std::error::Error;

use burn::tensor::backend::Backend;
use clap::ValueEnum;

/// The backends the crate has features for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// CPU, fast
    Flex,
    /// CPU, portable
    Ndarray,
    /// GPU through Vulkan, Metal or DirectX (cargo feature `wgpu`)
    Wgpu,
    /// NVIDIA GPU (cargo feature `cuda`)
    Cuda,
}

/// Something to do on any backend.
pub trait Job {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>>;
}

/// Runs `job` on the backend's default device, or says which cargo feature the backend needs.
pub fn run(backend: BackendName, job: impl Job) -> Result<(), Box<dyn Error>> {
    match backend {
        BackendName::Flex => job.run::<fusedkv::backend::Flex>(&Default::default()),
        BackendName::Ndarray => job.run::<fusedkv::backend::NdArray>(&Default::default()),
        #[cfg(feature = "wgpu")]
        BackendName::Wgpu => job.run::<fusedkv::backend::Wgpu>(&Default::default()),
        #[cfg(feature = "cuda")]
        BackendName::Cuda => job.run::<fusedkv::backend::Cuda>(&Default::default()),
        #[cfg(not(all(feature = "wgpu", feature = "cuda")))]
        missing => {
            let feature = format!("{missing:?}").to_lowercase();
            Err(format!("backend {feature} is not compiled in: add `--features {feature}`").into())
        }
    }
}
