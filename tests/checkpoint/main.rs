//! Checkpoint directories: what comes back, what others write, what is refused.

mod broken;
mod golden;
#[path = "../suite/models.rs"]
#[allow(dead_code)]
mod models;
mod round_trip;
mod saving;
mod scoring;

use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData, backend::Backend};
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{CheckpointError, LoadedCheckpoint, WeightDtype, load_checkpoint};
use fusedkv::{FusedKvDecoder, FusedKvDecoderConfig, KvPlan};

/// A decoder of 4 layers that reads tokens below 11.
pub fn decoder(plan: KvPlan) -> FusedKvDecoderConfig {
    FusedKvDecoderConfig::new(models::VOCAB, 12, 4, 4, 2, 6, 10, plan)
        .with_rope_theta(1e4)
        .with_max_positions(64)
}

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
