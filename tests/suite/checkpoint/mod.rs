//! Checkpoint directories: what comes back, what others write, what is refused.

mod adapters;
mod broken;
mod configuration;
mod families;
mod gguf;
mod gguf_decoder;
mod golden;
mod packed;
mod round_trip;
mod saving;
mod scoring;
mod smollm2;

use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData, backend::Backend};
use fusedkv::FusedKvDecoder;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{CheckpointError, LoadedCheckpoint, WeightDtype, load_checkpoint};

pub fn load(directory: &Path) -> Result<LoadedCheckpoint<Flex>, CheckpointError> {
    load_checkpoint(directory, WeightDtype::F32, &FlexDevice)
}

/// All parameters, in order.
pub fn parameters<B: Backend>(model: &FusedKvDecoder<B>) -> Vec<TensorData> {
    struct Collect(Vec<TensorData>);
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.0.push(param.val().into_data());
        }
    }
    let mut all = Collect(Vec::new());
    model.visit(&mut all);
    all.0
}
