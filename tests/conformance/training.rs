//! What a backend must learn, against NdArray and Flex in f32, and files between backends.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Tensor, TensorData};
use burn_ndarray::NdArray;
use fusedkv::backend::{Autodiff, Flex, FlexDevice};
use fusedkv::checkpoint::{SaveOptions, WeightDtype, load_checkpoint, save_checkpoint};
use fusedkv::train::{Progress, Run, Trainable, TrainingConfig, train_from};
use fusedkv::{
    CacheDtype, FusedKvDecoder, FusedKvDecoderConfig, KvPlan, LoraConfig, TokenBatch, WeightFormat,
};
use tempfile::tempdir;

use crate::checks::{Subject, tokens};
use crate::formula::{apart, model_on, off, values};

const SEED: u64 = 3;
const VOCAB: usize = 50;

fn decoder(plan: KvPlan) -> FusedKvDecoderConfig {
    FusedKvDecoderConfig::new(VOCAB, plan)
        .with_hidden_size(64)
        .with_n_layers(4)
        .with_n_heads(4)
        .with_n_kv_heads(2)
        .with_head_dim(32)
        .with_ffn_size(96)
        .with_max_positions(64)
}

/// A mean of the logits, weighted so that every one matters, and its gradients by every parameter,
/// with their names.
fn step<B: AutodiffBackend>(
    plan: &KvPlan,
    device: &B::Device,
) -> (Vec<f64>, Vec<(String, Vec<f64>)>) {
    let model = model_on::<B>(&decoder(plan.clone()), SEED, device);
    let rows = [tokens(24, 0), tokens(24, 1), tokens(15, 2)];
    let batch = TokenBatch::from_rows(&rows, VOCAB, device).unwrap();
    let logits = model.forward(batch).unwrap();
    // Of the last 15 positions, which are no row's padding.
    let logits = logits.narrow(1, 9, 15);
    let weights: Vec<f64> = (0..3 * 15 * VOCAB)
        .map(|i| (i as f64 * 0.37).sin())
        .collect();
    let weights = Tensor::<B, 3>::from_data(TensorData::new(weights, [3, 15, VOCAB]), device);
    let loss = (logits.tanh() * weights).mean();
    let gradients = loss.backward();
    let mut named = Gradients::<B> {
        of: &gradients,
        path: Vec::new(),
        found: Vec::new(),
    };
    model.visit(&mut named);
    (values(&loss), named.found)
}

struct Gradients<'g, B: AutodiffBackend> {
    of: &'g B::Gradients,
    path: Vec<String>,
    found: Vec<(String, Vec<f64>)>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Gradients<'_, B> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let gradient = param.val().grad(self.of).expect("every parameter matters");
        self.found.push((self.path.join("."), values(&gradient)));
    }
}

/// Every gradient is NdArray's.
pub fn gradients<B: Backend>(subject: &Subject<B>) {
    let [allowed_loss, allowed] = if subject.tf32 {
        [1e-3, 3e-2]
    } else {
        [1e-4, 1e-3]
    };
    for plan in [
        KvPlan::Standard,
        KvPlan::FusedKv { storage_layers: 2 },
        KvPlan::DenseFusion { storage_layers: 2 },
        KvPlan::YocoPlusPlus { storage_layers: 3 },
        apart(4),
    ] {
        let (loss, found) = step::<Autodiff<B>>(&plan, &subject.device);
        let (expected_loss, expected) = step::<Autodiff<NdArray>>(&plan, &Default::default());
        assert!(
            (loss[0] - expected_loss[0]).abs() <= allowed_loss,
            "{loss:?} {expected_loss:?}"
        );
        assert_eq!(found.len(), expected.len());
        let mut wrong = Vec::new();
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            let off = off(found, expected);
            if off > allowed {
                wrong.push(format!("{name} by {off:.1e}"));
            }
        }
        assert!(wrong.is_empty(), "{}, off are {wrong:?}", plan.method());
    }
}

/// Ten optimizer steps from the same model have Flex's losses: of all its parameters, and of adapters
/// beside matrices of 8 bits, where the backend has them.
pub fn ten_steps<B: Backend>(subject: &Subject<B>) {
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let packed = subject.cache_dtypes.contains(&CacheDtype::Int8);
    let packed = packed.then_some(Some(WeightFormat::Int8));
    let allowed = if subject.tf32 { 1e-2 } else { 1e-3 };
    for adapters in [None].into_iter().chain(packed) {
        let found = losses::<B>(&plan, adapters, &subject.device);
        let expected = losses::<Flex>(&plan, adapters, &FlexDevice);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= allowed * expected,
                "{found} for {expected}, adapters beside {adapters:?}"
            );
        }
    }
}

fn losses<B: Backend>(
    plan: &KvPlan,
    adapters: Option<WeightFormat>,
    device: &B::Device,
) -> Vec<f64> {
    let directory = tempdir().unwrap();
    let config = TrainingConfig::new(decoder(plan.clone()), 24, 4, 10)
        .with_epochs(5)
        .with_warmup_steps(2)
        .with_valid_fraction(0.2)
        .with_learning_rate(3e-3);
    let model = model_on::<Autodiff<B>>(&config.model, SEED, device);
    let (config, model) = match adapters {
        None => (config, model),
        Some(format) => {
            let lora = LoraConfig::new(4, 8.0);
            let model = model.with_weights(format).unwrap();
            let model = model.with_lora(&lora).unwrap().map(&mut SameAdapters);
            (config.with_trainable(Some(Trainable::Lora(lora))), model)
        }
    };
    let run = Run::new(directory.path()).with_progress(Progress::Quiet);
    let trained = train_from(&config, model, tokens(1500, 0), &run, device).unwrap();
    let epochs = trained.epochs.iter();
    epochs
        .flat_map(|epoch| [epoch.train, epoch.valid])
        .collect()
}

/// Backends draw random numbers of their own.
struct SameAdapters;

impl<B: Backend> ModuleMapper<B> for SameAdapters {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let dims = param.dims();
        // Of all matrices, those of rank 4 by the width that they read.
        if D != 2 || dims[1] != 4 {
            return param;
        }
        let number = |i: usize| (i as f64 * 0.71).sin() * 0.1;
        let numbers: Vec<f64> = (0..dims[0] * 4).map(number).collect();
        param.map(|tensor| Tensor::from_data(TensorData::new(numbers, dims), &tensor.device()))
    }
}

/// A directory that one backend wrote is read by the other, to the last bit of f32.
pub fn checkpoints<B: Backend>(subject: &Subject<B>) {
    let plan = KvPlan::YocoPlusPlus { storage_layers: 2 };
    let directory = tempdir().unwrap();
    let path = directory.path().join("model");
    let flex = model_on::<Flex>(&decoder(plan.clone()), SEED, &FlexDevice);
    save_checkpoint(&path, &flex, &SaveOptions::new()).unwrap();
    let read = load_checkpoint::<B>(&path, WeightDtype::F32, &subject.device)
        .unwrap()
        .model;
    assert_eq!(parameters(&read), parameters(&flex));
    let again = directory.path().join("again");
    save_checkpoint(&again, &read, &SaveOptions::new()).unwrap();
    let back = load_checkpoint::<Flex>(&again, WeightDtype::F32, &FlexDevice)
        .unwrap()
        .model;
    assert_eq!(parameters(&back), parameters(&flex));
}

fn parameters<B: Backend>(model: &FusedKvDecoder<B>) -> Vec<Vec<f64>> {
    struct Parameters(Vec<Vec<f64>>);
    impl<B: Backend> ModuleVisitor<B> for Parameters {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.0.push(values(&param.val()));
        }
    }
    let mut parameters = Parameters(Vec::new());
    model.visit(&mut parameters);
    parameters.0
}
