//! Training adapters: what learns, what stays, what a run keeps and how it is resumed.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use fusedkv::convert::convert;
use fusedkv::train::{Distillation, Trainable, distill, train_from_on};
use fusedkv::{LoraConfig, LoraError, WeightFormat};

use super::*;

type Train = Autodiff<Flex>;

fn lora() -> LoraConfig {
    let targets = ["q_proj", "v_proj", "o_proj", "down_proj"].map(str::to_owned);
    LoraConfig::new(4, 8.0).with_targets(targets.into())
}

fn adapting() -> TrainingConfig {
    config().with_trainable(Some(Trainable::Lora(lora())))
}

/// A decoder of the configuration that knows nothing, its matrices in a format.
fn base(config: &TrainingConfig, format: WeightFormat) -> FusedKvDecoder<Flex> {
    drawn(config, format, 1)
}

fn drawn(config: &TrainingConfig, format: WeightFormat, seed: u64) -> FusedKvDecoder<Flex> {
    in_turn(|| {
        Flex::seed(&FlexDevice, seed);
        let model = config.model.init::<Flex>(&FlexDevice).unwrap();
        // Parameters draw their values when first used.
        model.fork(&FlexDevice).with_weights(format).unwrap()
    })
}

fn start(base: &FusedKvDecoder<Flex>) -> FusedKvDecoder<Train> {
    burn::module::AutodiffModule::from_inner(base.clone())
}

fn go(
    config: &TrainingConfig,
    base: &FusedKvDecoder<Flex>,
    directory: &Path,
    resume: bool,
    devices: usize,
) -> Result<Trained<Flex>, TrainError> {
    let run = Run::new(directory)
        .with_resume(resume)
        .with_progress(Progress::Quiet);
    let (train, valid) = TokenWindows::split(tokens(), config.context, 0.2).unwrap();
    let devices = vec![FlexDevice; devices];
    in_turn(|| train_from_on(config, start(base), train, valid, &run, &devices))
}

/// All parameters by the modules they are in; those of adapters apart.
#[derive(Default)]
struct Numbers {
    path: Vec<String>,
    base: Vec<(String, TensorData)>,
    adapters: Vec<(String, TensorData)>,
}

impl<B: Backend> ModuleVisitor<B> for Numbers {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let numbers = (self.path.join("."), param.val().into_data());
        match self.path.contains(&"lora".to_owned()) {
            true => self.adapters.push(numbers),
            false => self.base.push(numbers),
        }
    }
}

fn numbers(model: &FusedKvDecoder<Flex>) -> Numbers {
    let mut numbers = Numbers::default();
    model.visit(&mut numbers);
    numbers
}

#[test]
fn adapters_learn_beside_a_base_that_stays_as_it_is_in_any_format() {
    for &(_, format) in WeightFormat::NAMES {
        let config = adapting();
        let base = base(&config, format);
        let directory = tempdir().unwrap();
        let trained = go(&config, &base, directory.path(), false, 1).unwrap();
        let (first, last) = (&trained.epochs[0], &trained.epochs[3]);
        assert!(
            last.valid < first.valid - 0.1,
            "{format}: {first:?} {last:?}"
        );

        let model = &trained.model;
        assert_eq!(numbers(model).base, numbers(&base).base, "{format}");
        assert_eq!(model.weight_bytes(), base.weight_bytes());
        // Queries, output and down of every layer; values of those that store them.
        let adapters = numbers(model).adapters;
        assert_eq!(adapters.len(), 2 * (4 * 3 + 2));
        for (name, data) in adapters {
            let moved = data.iter::<f32>().any(|x| x != 0.0);
            assert!(moved, "{name}");
        }
        assert_eq!(model.lora(), Some(&lora()));
    }
}

#[test]
fn a_run_keeps_adapters_alone_and_is_resumed_to_the_bit() {
    for format in [WeightFormat::Model, WeightFormat::Int8] {
        let directory = tempdir().unwrap();
        let path = directory.path();
        let config = adapting();
        let base = base(&config, format);
        let whole = go(&config, &base, path, false, 1).unwrap();
        let size = |part: &str| {
            let path = path.join(format!("checkpoint/{part}-4.mpk"));
            fs::metadata(path).unwrap().len()
        };
        let kept: usize = (numbers(&whole.model).adapters.iter())
            .map(|(_, data)| data.num_elements() * 4)
            .sum();
        // Names, and both moments.
        assert!(size("model") < kept as u64 + 8000, "{}", size("model"));
        assert!(size("optim") < 2 * kept as u64 + 16000, "{}", size("optim"));

        // New adapters are drawn before those of the run take their place.
        let best = in_turn(|| Run::new(path).best_with_base(base.clone())).unwrap();
        let lowest = whole.epochs.iter().map(|epoch| epoch.valid);
        assert_eq!(best.1.valid, lowest.fold(f64::INFINITY, f64::min));
        let (last, _) = in_turn(|| Run::new(path).last_with_base(base.clone())).unwrap();
        let of = |model| logits::<Flex>(model, &FlexDevice);
        assert_eq!(of(&last), of(&whole.model));
        assert_eq!(last.weight_bytes(), base.weight_bytes());

        fs::remove_file(path.join("checkpoint/optim-4.mpk")).unwrap();
        let resumed = go(&config, &base, path, true, 1).unwrap();
        assert_eq!(resumed.epochs, whole.epochs);
        assert_eq!(
            numbers(&resumed.model).adapters,
            numbers(&whole.model).adapters
        );

        let both = go(&config, &base, path, false, 2).unwrap();
        let off = (both.valid_loss - whole.valid_loss).abs();
        assert!(off < 1e-3, "{both:?}");
    }
}

#[test]
fn adapters_learn_under_every_method() {
    for method in KvPlan::methods() {
        let mut config = adapting();
        config.model.plan = KvPlan::from_method(method, 4).unwrap();
        let base = base(&config, WeightFormat::Model);
        let directory = tempdir().unwrap();
        let trained = go(&config, &base, directory.path(), false, 1).unwrap();
        let (first, last) = (&trained.epochs[0], &trained.epochs[3]);
        assert!(last.valid < first.valid, "{method}: {first:?} {last:?}");
        let merged = trained.model.clone().merge_lora().unwrap();
        let loss = |model| {
            let (_, valid) = TokenWindows::split(tokens(), 16, 0.2).unwrap();
            evaluate(model, &valid, 4, None).unwrap().loss
        };
        assert!((loss(&merged) - trained.valid_loss).abs() < 1e-4);
        assert!((loss(&trained.model) - trained.valid_loss).abs() < 1e-5);
    }
}

#[test]
fn adapters_are_trained_on_from_where_they_are() {
    let [first, second] = [(); 2].map(|()| tempdir().unwrap());
    let config = adapting();
    let base = base(&config, WeightFormat::Model);
    let trained = go(&config, &base, first.path(), false, 1).unwrap();
    let on = go(&config, &trained.model, second.path(), false, 1).unwrap();
    assert!(on.epochs[0].valid < trained.epochs[0].valid - 0.1);
    assert_eq!(numbers(&on.model).base, numbers(&base).base);
}

#[test]
fn a_student_follows_its_teacher_by_adapters() {
    let directory = tempdir().unwrap();
    let mut of_teacher = config();
    of_teacher.model.plan = KvPlan::Standard;
    let teacher = super::run(&of_teacher, directory.path(), false)
        .unwrap()
        .model;
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let student = in_turn(|| convert(&start(&teacher), &plan)).unwrap();
    let config = adapting().with_distillation(Some(Distillation::new()));
    let (train, valid) = TokenWindows::split(tokens(), 16, 0.2).unwrap();
    let run = Run::new(directory.path().join("run")).with_progress(Progress::Quiet);
    let devices = [FlexDevice];
    let distilled = || distill(&config, student, teacher, train, valid, &run, &devices);
    let trained = in_turn(distilled).unwrap();
    let (first, last) = (&trained.epochs[0], &trained.epochs[3]);
    // It is not far from what it follows.
    assert!(last.train < first.train - 0.02, "{first:?} {last:?}");
}

#[test]
fn adapters_and_bases_that_do_not_fit_are_refused() {
    let directory = tempdir().unwrap();
    let path = directory.path();
    let base = base(&config(), WeightFormat::Model);
    let refused = |config: &TrainingConfig, model: &FusedKvDecoder<Flex>| {
        go(config, model, path, false, 1).unwrap_err()
    };
    let asked = |lora| config().with_trainable(Some(Trainable::Lora(lora)));
    let unknown = lora().with_targets(vec!["lm_head".to_owned()]);
    let error = refused(&asked(unknown), &base);
    assert!(
        matches!(&error, TrainError::Lora(LoraError::UnknownTarget { .. })),
        "{error}"
    );
    let error = super::run(&adapting(), path, false).unwrap_err();
    assert!(matches!(error, TrainError::NoBase), "{error}");
    let adapted = in_turn(|| base.clone().with_lora(&lora())).unwrap();
    let wider = LoraConfig { rank: 5, ..lora() };
    for (config, expected) in [(config(), None), (asked(wider.clone()), Some(wider))] {
        let error = refused(&config, &adapted);
        assert!(
            matches!(&error, TrainError::OtherAdapters { found, expected: e }
                if *found == Some(lora()) && *e == expected),
            "{error}"
        );
    }
    // Refused before anything was made.
    assert_eq!(fs::read_dir(path).unwrap().count(), 0);

    go(&adapting(), &base, path, false, 1).unwrap();
    let error = Run::new(path).best::<Flex>(&FlexDevice).unwrap_err();
    assert!(matches!(error, TrainError::NeedsBase(_)), "{error}");
    let other = drawn(&config(), WeightFormat::Model, 2);
    let run = Run::new(path);
    let error = in_turn(|| run.last_with_base(other.clone())).unwrap_err();
    assert!(matches!(error, TrainError::OtherBase(_)), "{error}");
    let error = go(&adapting(), &other, path, true, 1).unwrap_err();
    assert!(matches!(error, TrainError::OtherBase(_)), "{error}");
    let stronger = LoraConfig {
        alpha: 9.0,
        ..lora()
    };
    let error = go(&asked(stronger), &base, path, true, 1).unwrap_err();
    assert!(
        matches!(&error, TrainError::OtherRun { field, .. } if field.contains("alpha")),
        "{error}"
    );
    // A whole decoder where adapters are expected.
    let whole = tempdir().unwrap();
    super::run(&config(), whole.path(), false).unwrap();
    let part = "checkpoint/model-4.mpk";
    fs::copy(whole.path().join(part), path.join(part)).unwrap();
    let error = in_turn(|| run.last_with_base(base)).unwrap_err();
    assert!(
        matches!(&error, TrainError::Unreadable { path, .. } if path.ends_with("model-4.mpk")),
        "{error}"
    );
}
