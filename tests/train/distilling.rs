//! Following a teacher, and parameters that stay as they are.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use fusedkv::backend::{Autodiff, Flex, FlexDevice};
use fusedkv::convert::convert;
use fusedkv::train::{
    Distillation, LogLine, Progress, Run, TokenWindows, TrainError, Trainable, Trained,
    TrainingConfig, distill, train_from,
};
use fusedkv::{FusedKvDecoder, FusedKvDecoderConfig, KvPlan, LoraConfig};
use tempfile::{TempDir, tempdir};

use super::{VOCAB, config, decoder, in_turn, tokens};

type Train = Autodiff<Flex>;

/// A teacher that has learned the text, and its conversion.
fn models() -> (FusedKvDecoder<Flex>, FusedKvDecoder<Train>) {
    let directory = tempdir().unwrap();
    let mut config = config();
    config.model.plan = KvPlan::Standard;
    let teacher = super::run(&config, directory.path(), false).unwrap().model;
    let standard = FusedKvDecoder::<Train>::from_inner(teacher.clone());
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let student = in_turn(|| convert(&standard, &plan));
    (teacher, student.unwrap())
}

fn distilling(trainable: Option<Trainable>, distillation: Distillation) -> TrainingConfig {
    config()
        .with_learning_rate(3e-3)
        .with_trainable(trainable)
        .with_distillation(Some(distillation))
}

fn run(
    config: &TrainingConfig,
    (teacher, student): (FusedKvDecoder<Flex>, FusedKvDecoder<Train>),
    directory: &Path,
    resume: bool,
    devices: usize,
) -> Result<Trained<Flex>, TrainError> {
    let run = Run::new(directory)
        .with_resume(resume)
        .with_progress(Progress::Quiet);
    let (train, valid) = TokenWindows::split(tokens(), 16, 0.2).unwrap();
    let devices = vec![FlexDevice; devices];
    in_turn(|| distill(config, student, teacher, train, valid, &run, &devices))
}

/// The divergence of every step.
fn divergences(directory: &TempDir) -> Vec<f64> {
    let log = fs::read_to_string(directory.path().join("metrics.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str(line).unwrap());
    lines
        .filter_map(|line| match line {
            LogLine::Train { divergence, .. } => Some(divergence.unwrap()),
            LogLine::Valid { .. } => None,
        })
        .collect()
}

/// All parameters by the modules they are in.
#[derive(Default)]
struct Numbers(Vec<String>, BTreeMap<String, TensorData>);

impl<B: Backend> ModuleVisitor<B> for Numbers {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.0.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.1.insert(self.0.join("."), param.val().into_data());
    }
}

fn numbers<B: Backend>(model: &FusedKvDecoder<B>) -> BTreeMap<String, TensorData> {
    let mut numbers = Numbers::default();
    model.visit(&mut numbers);
    numbers.1
}

#[test]
fn a_student_comes_closer_to_its_teacher_by_what_trains_alone() {
    let (teacher, student) = models();
    let before = numbers(&student);
    type Trains = fn(&str) -> bool;
    let all: Trains = |_| true;
    let fusion: Trains = |name| name.contains("kv_fusion");
    let reusing: Trains = |name| name.starts_with("layers.2.") || name.starts_with("layers.3.");
    let named: Trains = |name| name.contains("q_proj") || name == "norm.gamma";
    let patterns = ["*.q_proj.weight", "model.norm.weight"].map(str::to_owned);
    for (trainable, trains, left) in [
        (None, all, 0.5),
        (Some(Trainable::Fusion), fusion, 0.98),
        (Some(Trainable::Reusing), reusing, 0.5),
        (Some(Trainable::Named(patterns.into())), named, 0.9),
    ] {
        for distillation in [
            Distillation::new(),
            Distillation::new()
                .with_temperature(2.0)
                .with_target_share(0.2)
                .with_hidden_weight(0.5),
        ] {
            let directory = tempdir().unwrap();
            let config = distilling(trainable.clone(), distillation);
            let models = (teacher.clone(), student.clone());
            let trained = run(&config, models, directory.path(), false, 1).unwrap();
            let after = numbers(&trained.model);
            for (name, before) in &before {
                assert_eq!(after[name] != *before, trains(name), "{name} {trainable:?}");
            }
            let mean = |steps: &[f64]| steps.iter().sum::<f64>() / steps.len() as f64;
            let divergences = divergences(&directory);
            let (first, last) = (mean(&divergences[..4]), mean(&divergences[36..]));
            assert!(
                last < left * first,
                "{trainable:?} {distillation:?}: {first} {last}"
            );
            // Moments are kept of what trains; the model is kept whole.
            let size = |part| {
                let path = directory.path().join(format!("checkpoint/{part}-4.mpk"));
                fs::metadata(path).unwrap().len()
            };
            let trained = after.iter().filter(|(name, _)| trains(name));
            let trained: usize = trained.map(|(_, data)| data.num_elements()).sum();
            let whole: usize = after.values().map(TensorData::num_elements).sum();
            let share = trained as f64 / whole as f64;
            let moments = size("optim") as f64 / size("model") as f64;
            assert!(
                (moments - 2.0 * share).abs() < 0.35,
                "{trainable:?}: {moments} {share}"
            );
        }
    }
}

#[test]
fn a_resumed_distillation_ends_like_one_that_was_not_interrupted() {
    let (teacher, student) = models();
    for (trainable, hidden) in [
        (Some(Trainable::Reusing), 0.5),
        (Some(Trainable::Fusion), 0.0),
        (None, 0.1),
    ] {
        let directory = tempdir().unwrap();
        let config = distilling(trainable, Distillation::new().with_hidden_weight(hidden));
        let go = |resume, devices| {
            let models = (teacher.clone(), student.clone());
            run(&config, models, directory.path(), resume, devices).unwrap()
        };
        let whole = go(false, 1);
        let steps = divergences(&directory);
        fs::remove_file(directory.path().join("checkpoint/optim-4.mpk")).unwrap();
        let resumed = go(true, 1);
        assert_eq!(resumed.epochs, whole.epochs);
        assert_eq!(numbers(&resumed.model), numbers(&whole.model));
        assert_eq!(divergences(&directory), steps);
        // One with another teacher is not that run, were it other adapters alone.
        let lora = LoraConfig::new(2, 4.0);
        let adapted = in_turn(|| teacher.clone().with_lora(&lora)).unwrap();
        for other in [student.valid(), adapted] {
            let models = (other, student.clone());
            let error = run(&config, models, directory.path(), true, 1).unwrap_err();
            let refused =
                matches!(&error, TrainError::OtherRun { field, .. } if field == "teacher_hash");
            assert!(refused, "{error}");
        }
        // Several devices do what one does, but for rounding.
        let both = go(false, 2);
        assert!(
            (both.valid_loss - whole.valid_loss).abs() < 1e-3,
            "{both:?}"
        );
        for (found, expected) in divergences(&directory).iter().zip(steps) {
            assert!((found - expected).abs() < 1e-3, "{found} {expected}");
        }
    }
}

#[test]
fn teachers_and_parameters_that_do_not_fit_are_refused() {
    let directory = tempdir().unwrap();
    let teacher = |config: FusedKvDecoderConfig| config.init::<Flex>(&FlexDevice).unwrap();
    let standard = || decoder(KvPlan::Standard);
    let student = || config().model.init::<Train>(&FlexDevice).unwrap();
    let hidden = Distillation::new().with_hidden_weight(1.0);
    for (of, distillation, field) in [
        (
            FusedKvDecoderConfig {
                vocab_size: VOCAB + 1,
                ..standard()
            },
            Distillation::new(),
            "vocab_size",
        ),
        (standard().with_n_layers(3), hidden, "n_layers"),
        (standard().with_hidden_size(16), hidden, "hidden_size"),
    ] {
        let models = (teacher(of), student());
        let config = distilling(None, distillation);
        let error = run(&config, models, directory.path(), false, 1).unwrap_err();
        assert!(
            matches!(&error, TrainError::Teacher { field: found, .. } if *found == field),
            "{error}"
        );
    }
    let short = teacher(standard().with_max_positions(8));
    let error = run(
        &distilling(None, hidden),
        (short, student()),
        directory.path(),
        false,
        1,
    );
    let error = error.unwrap_err();
    assert!(
        matches!(error, TrainError::ContextTooLong { .. }),
        "{error}"
    );

    for (distillation, field) in [
        (Distillation::new().with_temperature(0.0), "temperature"),
        (Distillation::new().with_target_share(1.1), "target_share"),
        (
            Distillation::new().with_hidden_weight(f64::NAN),
            "hidden_weight",
        ),
    ] {
        let models = (teacher(standard()), student());
        let config = distilling(None, distillation);
        let error = run(&config, models, directory.path(), false, 1).unwrap_err();
        assert!(
            matches!(&error, TrainError::Setting { field: found, .. } if *found == field),
            "{error}"
        );
    }

    let quiet = Run::new(directory.path()).with_progress(Progress::Quiet);
    let from = |config: &TrainingConfig| {
        in_turn(|| train_from(config, student(), tokens(), &quiet, &FlexDevice)).unwrap_err()
    };
    let error = from(&distilling(None, hidden));
    assert!(matches!(error, TrainError::NoTeacher), "{error}");
    let named = Trainable::Named(vec!["model.layers.9.*".to_owned()]);
    let error = from(&config().with_trainable(Some(named)));
    assert!(matches!(error, TrainError::NothingTrains(_)), "{error}");
    // Refused before anything was made.
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}
