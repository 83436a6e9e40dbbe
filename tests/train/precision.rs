//! Training parameters of half the bits.

use std::fs;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use fusedkv::backend::{Autodiff, Flex, FlexDevice};
use fusedkv::checkpoint::{SaveOptions, WeightDtype, load_checkpoint, save_checkpoint};
use fusedkv::train::{Progress, Run, Trained, TrainingConfig, train_from};
use fusedkv::{FusedKvDecoder, KvPlan};
use tempfile::tempdir;

use super::{config, decoder, in_turn, tokens};

fn save(path: &Path) {
    let model = decoder(KvPlan::FusedKv { storage_layers: 2 });
    in_turn(|| {
        let model = model.init::<Flex>(&FlexDevice).unwrap();
        save_checkpoint(path, &model, &SaveOptions::new()).unwrap();
    });
}

fn run(
    config: &TrainingConfig,
    model: &Path,
    dtype: WeightDtype,
    directory: &Path,
    resume: bool,
) -> Trained<Flex> {
    let model = load_checkpoint::<Autodiff<Flex>>(model, dtype, &FlexDevice);
    let model = model.unwrap().model;
    let run = Run::new(directory)
        .with_resume(resume)
        .with_progress(Progress::Quiet);
    in_turn(|| train_from(config, model, tokens(), &run, &FlexDevice)).unwrap()
}

/// All parameters' numbers.
#[derive(Default)]
struct Numbers(Vec<f64>);

impl<B: Backend> ModuleVisitor<B> for Numbers {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        assert_eq!(param.val().dtype(), DType::BF16);
        self.0.extend(param.val().into_data().iter::<f64>());
    }
}

fn numbers(model: &FusedKvDecoder<Flex>) -> Vec<f64> {
    let mut numbers = Numbers::default();
    model.visit(&mut numbers);
    numbers.0
}

#[test]
fn bf16_learns_what_f32_does_by_updates_it_does_not_resolve() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("model");
    save(&path);
    // Gains start at 1, where numbers are 1/256 apart; together they move by a tenth of that.
    for (rate, least) in [(1e-2, 0.9), (1e-5, 0.5)] {
        let config = config().with_learning_rate(rate).with_warmup_steps(0);
        let learned = |dtype, name: &str| {
            let trained = run(&config, &path, dtype, &directory.path().join(name), false);
            trained.epochs[0].valid - trained.epochs[3].valid
        };
        let expected = learned(WeightDtype::F32, "f32");
        let found = learned(WeightDtype::Bf16, "bf16");
        assert!(found > least * expected, "{rate}: {found} {expected}");
    }
}

#[test]
fn a_resumed_bf16_run_ends_like_one_that_was_not_interrupted() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("model");
    save(&path);
    let config = config();
    let directory = directory.path().join("run");
    let go = |resume| run(&config, &path, WeightDtype::Bf16, &directory, resume);
    let whole = go(false);
    fs::remove_file(directory.join("checkpoint/optim-4.mpk")).unwrap();
    let resumed = go(true);
    assert_eq!(resumed.epochs, whole.epochs);
    assert_eq!(numbers(&resumed.model), numbers(&whole.model));
    assert_eq!(numbers(&go(true).model), numbers(&whole.model));
}
