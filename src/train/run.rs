//! A training from configuration and tokens to a model.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::lr_scheduler::LrScheduler;
use burn::module::{Module, ModuleMapper, Param};
use burn::optim::Optimizer;
use burn::record::{Record, Recorder};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend, BackendTypes};
use burn_train::metric::LearningRateMetric;
use burn_train::{
    ExecutionStrategy, Interrupter, Learner, LearningComponentsTypes, MultiDeviceOptim,
    SupervisedTraining, TrainingStrategy,
};

use super::checkpoint::{
    CompleteFileRecorder, EpochEnd, EpochLosses, History, KeepLastAndBest, Patience, RunDirectory,
    Unwritten,
};
use super::config::TrainingConfig;
use super::data::{TokenWindows, Windows, check_vocabulary, read_window};
use super::error::TrainError;
use super::learning_rate::WarmupCosine;
use super::loader::{Failure, Schedule, TrainLoader, ValidLoader};
use super::log::JsonLines;
use super::metrics::{
    DivergenceMetric, GradientNormMetric, LossMetric, MemoryMetric, PerplexityMetric,
    TokenRateMetric, perplexity,
};
use super::objective::{Distillation, Teacher};
use super::optimizer::optimizer;
use super::precision::at_least_f32;
use super::progress::{Observer, PlainRenderer, Progress, StepReport};
use super::trainable::choose;
use crate::decoder::{DecoderRecord, FusedKvDecoder};

/// How often plain progress is printed.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Where a training keeps its checkpoints, and how it is watched.
#[derive(Clone, Debug)]
pub struct Run {
    directory: PathBuf,
    resume: bool,
    progress: Progress,
    observer: Option<Observer>,
}

impl Run {
    /// A training that starts over in `directory`, a new or empty one or that of an earlier run,
    /// whose files are then deleted.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            resume: false,
            progress: Progress::Auto,
            observer: None,
        }
    }

    /// Goes on from the last checkpoint in the directory, if `resume` is set.
    ///
    /// The run ends as it would have without the interruption: the windows read, the optimizer's
    /// moments and the learning rate are those of the step, given the same tokens. The one
    /// exception is dropout, whose randomness starts over.
    #[must_use]
    pub fn with_resume(self, resume: bool) -> Self {
        Self { resume, ..self }
    }

    /// Shows progress elsewhere.
    #[must_use]
    pub fn with_progress(self, progress: Progress) -> Self {
        Self { progress, ..self }
    }

    /// Calls `observer` after every step, from another thread; not while Burn draws its own
    /// interface.
    #[must_use]
    pub fn with_observer(self, observer: impl Fn(StepReport) + Send + Sync + 'static) -> Self {
        Self {
            observer: Some(Observer(Arc::new(observer))),
            ..self
        }
    }

    /// The model of the epoch with the lowest validation loss, and the losses of that epoch. Its
    /// checkpoint is kept whatever comes after it. Parameters are in the backend's float type, with
    /// the numbers of the run's own.
    ///
    /// ```no_run
    /// use fusedkv::backend::{Flex, FlexDevice};
    /// use fusedkv::train::Run;
    ///
    /// let (model, losses) = Run::new("target/run").best::<Flex>(&FlexDevice)?;
    /// # Ok::<(), fusedkv::train::TrainError>(())
    /// ```
    ///
    /// # Errors
    /// [`TrainError::NoCheckpoint`] if no epoch is finished, [`TrainError::Unreadable`] if a file
    /// of the run is damaged.
    pub fn best<B: Backend>(
        &self,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        let lowest = |a: &EpochLosses, b: &EpochLosses| a.valid.total_cmp(&b.valid);
        self.model(|epochs| epochs.into_iter().min_by(lowest), device)
    }

    /// The model of the last epoch that was finished, and its losses.
    ///
    /// # Errors
    /// As [`best`](Self::best).
    pub fn last<B: Backend>(
        &self,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        self.model(|mut epochs| epochs.pop(), device)
    }

    /// The model of an epoch chosen among those with a checkpoint, in order.
    fn model<B: Backend>(
        &self,
        choose: impl FnOnce(Vec<EpochLosses>) -> Option<EpochLosses>,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        let (directory, config, epochs) = RunDirectory::saved(&self.directory)?;
        let none = || TrainError::NoCheckpoint(self.directory.clone());
        let losses = choose(epochs).ok_or_else(none)?;
        let model = config.model.init::<B>(device)?;
        let record = read_part(&directory, "model", losses.epoch, device)?;
        check_record(&directory, losses.epoch, &model, &record)?;
        Ok((model.load_record(record), losses))
    }
}

/// What a training gives.
#[derive(Clone, Debug)]
pub struct Trained<B: Backend> {
    /// The model after the last step, without autodiff.
    pub model: FusedKvDecoder<B>,
    /// The losses of every epoch, those before a resumption included.
    pub epochs: Vec<EpochLosses>,
    /// Mean loss of the last epoch's batches, in nats per token.
    pub train_loss: f64,
    /// Mean loss of the held-out windows, in nats per token.
    pub valid_loss: f64,
    /// Tokens read since the training's first step, repetitions included.
    pub tokens: usize,
    /// Time this call took; the part before a resumption is not known.
    pub elapsed: Duration,
}

impl<B: Backend> Trained<B> {
    /// Perplexity of the held-out windows: e to the [`valid_loss`](Self::valid_loss).
    pub fn perplexity(&self) -> f64 {
        perplexity(self.valid_loss)
    }
}

/// Trains a decoder of random weights, or goes on with one, until the configured number of steps.
///
/// AdamW with gradients clipped to a norm, linear warmup and cosine decay. The last windows of the
/// text are held out; after each of the epochs the model is validated on them and a checkpoint
/// written. The checkpoints of the last two and of the best epoch are kept.
///
/// The same configuration, tokens and backend give the same model, as far as the backend's own
/// arithmetic does and nothing else draws from its random numbers meanwhile.
///
/// # Errors
/// [`TrainError`] for a configuration, tokens or a directory that do not fit, before anything is
/// trained, and for a training that is stopped, loses its files or diverges.
pub fn train<B: AutodiffBackend>(
    config: &TrainingConfig,
    tokens: impl Into<Arc<[u32]>>,
    run: &Run,
    device: &B::Device,
) -> Result<Trained<B::InnerBackend>, TrainError> {
    config.validate()?;
    let (train_windows, valid_windows) = split(config, tokens)?;
    let devices = std::slice::from_ref(device);
    let models = Models::<B>::starting_with(None);
    run_training(config, models, train_windows, valid_windows, run, devices)
}

/// [`train`] that starts with a model: one that was [loaded](crate::checkpoint::load_checkpoint) or
/// [converted](crate::convert).
///
/// A run that is resumed goes on from its checkpoint, whatever the model.
///
/// # Errors
/// As [`train`], and [`TrainError::OtherModel`] if the model has another configuration.
pub fn train_from<B: AutodiffBackend>(
    config: &TrainingConfig,
    model: FusedKvDecoder<B>,
    tokens: impl Into<Arc<[u32]>>,
    run: &Run,
    device: &B::Device,
) -> Result<Trained<B::InnerBackend>, TrainError> {
    config.validate()?;
    let (train_windows, valid_windows) = split(config, tokens)?;
    let models = Models::starting_with(Some(model));
    let devices = std::slice::from_ref(device);
    run_training(config, models, train_windows, valid_windows, run, devices)
}

/// [`train`] on windows of any kind, validated on others, by one or several devices; the
/// configuration's `valid_fraction` does not matter.
///
/// Several devices train data-parallel by Burn's multi-device strategy: each takes an equal share
/// of every batch, and the first updates the weights by the mean of all gradients. The result is
/// that of one device but for rounding. A device may be named more than once, which gives it as
/// many threads of work.
///
/// # Errors
/// As [`train`], [`TrainError::MissingWindow`], [`TrainError::Window`] or
/// [`TrainError::NoTargets`] for windows that are not what they say or in which nothing counts,
/// when they are read, and [`TrainError::Setting`] if the windows' length is not the configured context
/// or a data set or the list of devices is empty, or `batch_size` cannot be divided among the devices.
pub fn train_on<B: AutodiffBackend>(
    config: &TrainingConfig,
    train_windows: impl Windows + 'static,
    valid_windows: impl Windows + 'static,
    run: &Run,
    devices: &[B::Device],
) -> Result<Trained<B::InnerBackend>, TrainError> {
    let models = Models::<B>::starting_with(None);
    run_training(config, models, train_windows, valid_windows, run, devices)
}

/// [`train_on`] that starts with a model, as [`train_from`] does.
///
/// # Errors
/// As [`train_on`] and [`train_from`].
pub fn train_from_on<B: AutodiffBackend>(
    config: &TrainingConfig,
    model: FusedKvDecoder<B>,
    train_windows: impl Windows + 'static,
    valid_windows: impl Windows + 'static,
    run: &Run,
    devices: &[B::Device],
) -> Result<Trained<B::InnerBackend>, TrainError> {
    let models = Models::starting_with(Some(model));
    run_training(config, models, train_windows, valid_windows, run, devices)
}

/// [`train_from_on`] that has `student` follow a `teacher`, any decoder that knows the same tokens, as
/// the configuration's [`distillation`](TrainingConfig::distillation) says, or its defaults: towards the
/// teacher's distribution of the next token.
///
/// The teacher reads every batch once, without gradients. Where its bottom layers are those of the
/// student and [do not train](TrainingConfig::trainable), as after a [conversion](crate::convert), they
/// are kept, and computed, once for both. The losses reported are cross-entropies, as those of any
/// training are, with the divergence from the teacher beside them in the log.
///
/// ```
/// use fusedkv::backend::{Autodiff, Flex, FlexDevice};
/// use fusedkv::convert::convert;
/// use fusedkv::train::{
///     Distillation, Progress, Run, TokenWindows, Trainable, TrainingConfig, distill,
/// };
/// use fusedkv::{FusedKvDecoderConfig, KvPlan};
///
/// # let directory = tempfile::tempdir()?;
/// # let directory = directory.path();
/// let device = FlexDevice::default();
/// let teacher = FusedKvDecoderConfig::tiny(64, KvPlan::Standard).init::<Flex>(&device)?;
/// let plan = KvPlan::FusedKv { storage_layers: 3 };
/// let student = FusedKvDecoderConfig::tiny(64, KvPlan::Standard).init(&device)?;
/// let student = convert::<Autodiff<Flex>>(&student, &plan)?;
///
/// let config = TrainingConfig::new(student.config().clone(), 16, 2, 4)
///     .with_epochs(1)
///     .with_trainable(Some(Trainable::Reusing))
///     .with_distillation(Some(Distillation::new().with_temperature(2.0)));
/// let tokens: Vec<u32> = (0..500).map(|i| i * i % 61).collect();
/// let (train, valid) = TokenWindows::split(tokens, 16, 0.1)?;
/// let run = Run::new(directory.join("run")).with_progress(Progress::Quiet);
/// let trained = distill(&config, student, teacher, train, valid, &run, &[device])?;
/// assert!(trained.valid_loss.is_finite());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`train_from_on`], and [`TrainError::Teacher`] if the teacher has another vocabulary or, where
/// hidden states are matched, another number of layers or width.
pub fn distill<B: AutodiffBackend>(
    config: &TrainingConfig,
    student: FusedKvDecoder<B>,
    teacher: FusedKvDecoder<B::InnerBackend>,
    train_windows: impl Windows + 'static,
    valid_windows: impl Windows + 'static,
    run: &Run,
    devices: &[B::Device],
) -> Result<Trained<B::InnerBackend>, TrainError> {
    let distillation = config.distillation.unwrap_or_else(Distillation::new);
    let config = TrainingConfig {
        distillation: Some(distillation),
        ..config.clone()
    };
    let models = Models {
        start: Some(student),
        teacher: Some(teacher),
    };
    run_training(&config, models, train_windows, valid_windows, run, devices)
}

/// The models of a training.
struct Models<B: AutodiffBackend> {
    /// What it starts with; none: random weights.
    start: Option<FusedKvDecoder<B>>,
    teacher: Option<FusedKvDecoder<B::InnerBackend>>,
}

impl<B: AutodiffBackend> Models<B> {
    /// Without a teacher.
    fn starting_with(start: Option<FusedKvDecoder<B>>) -> Self {
        Self {
            start,
            teacher: None,
        }
    }
}

/// The windows of a text to train on, and those held out.
fn split(
    config: &TrainingConfig,
    tokens: impl Into<Arc<[u32]>>,
) -> Result<(TokenWindows, TokenWindows), TrainError> {
    let tokens = tokens.into();
    check_vocabulary(&tokens, config.model.vocab_size)?;
    TokenWindows::split(tokens, config.context, config.valid_fraction)
}

fn run_training<B: AutodiffBackend>(
    config: &TrainingConfig,
    Models {
        start: model,
        teacher,
    }: Models<B>,
    train_windows: impl Windows + 'static,
    valid_windows: impl Windows + 'static,
    run: &Run,
    devices: &[B::Device],
) -> Result<Trained<B::InnerBackend>, TrainError> {
    let start = Instant::now();
    config.validate()?;
    let taught = teacher.zip(config.distillation);
    match (&taught, config.distillation) {
        (None, Some(_)) => return Err(TrainError::NoTeacher),
        (Some((teacher, distillation)), _) => Teacher::check(teacher, config, *distillation)?,
        (None, None) => {}
    }
    if let Some(model) = &model
        && *model.config() != config.model
    {
        return Err(TrainError::OtherModel {
            found: Box::new(model.config().clone()),
            expected: Box::new(config.model.clone()),
        });
    }
    let parts = devices.len() * config.accumulation;
    let device = match devices {
        [first, ..] if config.batch_size.is_multiple_of(parts) => first,
        _ => {
            return Err(TrainError::Setting {
                field: "devices",
                value: devices.len() as f64,
                expected: "1 or more, among which batch_size can be divided, accumulation included",
            });
        }
    };
    for windows in [&train_windows as &dyn Windows, &valid_windows] {
        windows.check_vocabulary(config.model.vocab_size)?;
        for (field, value, fits, expected) in [
            (
                "context of the data",
                windows.context(),
                windows.context() == config.context,
                "the configuration's context",
            ),
            ("windows", windows.len(), !windows.is_empty(), "1 or more"),
        ] {
            if !fits {
                return Err(TrainError::Setting {
                    field,
                    value: value as f64,
                    expected,
                });
            }
        }
    }
    check_targets(&valid_windows)?;

    B::seed(device, config.seed);
    let model = match model {
        Some(model) => model,
        // Parameters draw their values when first used; a fork uses them all, in order.
        None => config.model.init::<B>(device)?.fork(device),
    };
    let mut model = choose(model.map(&mut KeepPrecision), config.trainable.as_ref())?;
    let (squares, squares_of_steps) = channel();
    let optimizer = optimizer::<B, FusedKvDecoder<B>>(config, devices.len(), squares);
    let scheduler = WarmupCosine::new(config);

    let (directory, done, losses) = if run.resume {
        let (directory, epoch, losses) = RunDirectory::resume(&run.directory, config)?;
        model = load_checked(&directory, epoch, model, &optimizer, &scheduler, device)?;
        (directory, epoch, losses)
    } else {
        (RunDirectory::start(&run.directory, config)?, 0, Vec::new())
    };

    let teacher = taught.map(|(teacher, of)| Arc::new(Teacher::new(teacher, &model, of)));

    let history: History = Arc::new(Mutex::new(losses));
    let patience = config.patience.map(|epochs| Patience {
        history: history.clone(),
        epochs,
    });
    // A run that ended early has nothing left to do.
    let ended = patience.as_ref().is_some_and(Patience::is_over);
    let last_epoch = if ended { done } else { config.epochs };
    let interrupter = Interrupter::new();
    let unwritten = Unwritten::default();
    let (train_report, train_losses) = channel();
    let (valid_report, valid_losses) = channel();
    let (norm_report, gradient_norms) = channel();
    let strategy = KeepLastAndBest::new(
        directory.clone(),
        history.clone(),
        train_losses,
        valid_losses,
        gradient_norms,
        interrupter.clone(),
        unwritten.clone(),
    );
    let log = JsonLines::open(&directory.log(), config, done, parts, interrupter.clone());
    let log = log.map_err(|source| TrainError::Write {
        path: directory.log(),
        source,
    })?;
    let schedule = Schedule::new(config);
    let failure = Failure::new(interrupter.clone());
    let train_windows = Arc::new(train_windows);
    let (first, distilled) = (done + 1, teacher.is_some());
    let train_loader = TrainLoader::new(
        train_windows,
        schedule,
        first,
        teacher,
        failure.clone(),
        device,
    );
    let valid_loader = ValidLoader::<B::InnerBackend>::new(
        Arc::new(valid_windows),
        config.batch_size,
        failure.clone(),
        device,
    );
    let mut training = SupervisedTraining::new(
        directory.path(),
        Arc::new(train_loader),
        Arc::new(valid_loader),
    )
    .metric_train_numeric(LossMetric::reporting(train_report))
    .metric_valid_numeric(LossMetric::reporting(valid_report))
    .metrics((PerplexityMetric::new(),))
    .metric_train_numeric(LearningRateMetric::new())
    .metric_train_numeric(TokenRateMetric::new(config.tokens_per_step(), parts))
    .metric_train_numeric(GradientNormMetric::new(
        squares_of_steps,
        parts,
        norm_report,
    ))
    .with_metric_logger(log)
    .with_file_checkpointer(CompleteFileRecorder::telling(unwritten.clone()))
    .with_checkpointing_strategy(strategy)
    .early_stopping(EpochEnd {
        unwritten,
        interrupter: interrupter.clone(),
        patience,
    })
    .with_interrupter(interrupter.clone())
    // A library does not install a logger, nor a panic hook.
    .with_application_logger(None)
    .with_training_strategy(strategy_of(devices))
    .grads_accumulation(config.accumulation)
    .num_epochs(last_epoch);
    if distilled {
        training = training.metric_train_numeric(DivergenceMetric::new());
    }
    if let Some(memory) = MemoryMetric::new() {
        training = training.metric_train_numeric(memory);
    }
    if done > 0 {
        training = training.checkpoint(done);
    }
    training = match run.progress {
        Progress::Auto if cfg!(feature = "tui") && io::stdout().is_terminal() => training,
        Progress::Auto | Progress::Plain => training.renderer(
            PlainRenderer::new(io::stdout(), config, parts, LINE_INTERVAL)
                .with_observer(run.observer.clone()),
        ),
        Progress::Quiet => training.renderer(
            PlainRenderer::new(io::sink(), config, parts, LINE_INTERVAL)
                .with_observer(run.observer.clone()),
        ),
    };
    let result = training.launch(Learner::new(model, optimizer, scheduler));

    if let Some(error) = failure.take() {
        return Err(error);
    }
    let epochs = history
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    for losses in &epochs {
        for loss in [losses.train, losses.valid] {
            if !loss.is_finite() {
                return Err(TrainError::Diverged {
                    epoch: losses.epoch,
                    loss,
                });
            }
        }
    }
    let interrupted = || {
        let message = interrupter.get_message();
        TrainError::Interrupted(message.unwrap_or_else(|| "no reason given".to_owned()))
    };
    if interrupter.should_stop() {
        return Err(interrupted());
    }
    let last = epochs.last().ok_or_else(interrupted)?;
    Ok(Trained {
        model: result.model,
        train_loss: last.train,
        valid_loss: last.valid,
        tokens: Schedule::new(config).steps_until(last.epoch) * config.tokens_per_step(),
        epochs,
        elapsed: start.elapsed(),
    })
}

/// One device by itself; several with the weights updated on the first. Burn's sharded optimizer
/// could not clip by the norm of all gradients.
fn strategy_of<LC: LearningComponentsTypes>(
    devices: &[<LC::Backend as BackendTypes>::Device],
) -> TrainingStrategy<LC> {
    let main = MultiDeviceOptim::OptimMainDevice;
    TrainingStrategy::Default(ExecutionStrategy::multi(devices.to_vec(), main))
}

/// Checks that there is a target to validate with.
fn check_targets(windows: &impl Windows) -> Result<(), TrainError> {
    let has_answers = windows.has_answers();
    for index in 0..windows.len() {
        if read_window(windows, index, has_answers)?.counted() > 0 {
            return Ok(());
        }
    }
    Err(TrainError::NoTargets { step: None })
}

/// Has parameters of less precision than f32 stay so when a checkpoint is loaded, whose numbers are
/// f32.
struct KeepPrecision;

impl<B: Backend> ModuleMapper<B> for KeepPrecision {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let dtype = param.val().dtype();
        if at_least_f32(dtype) == dtype {
            return param;
        }
        param.load_mapper(move |tensor| tensor.cast(dtype).detach())
    }
}

/// The model of a checkpoint, all of whose files are read: Burn's learner panics where it cannot, or
/// where they are of another decoder.
fn load_checked<B: AutodiffBackend, O, S: LrScheduler>(
    directory: &RunDirectory,
    epoch: usize,
    model: FusedKvDecoder<B>,
    _optimizer: &O,
    _scheduler: &S,
    device: &B::Device,
) -> Result<FusedKvDecoder<B>, TrainError>
where
    O: Optimizer<FusedKvDecoder<B>, B>,
{
    let record = read_part(directory, "model", epoch, device)?;
    check_record(directory, epoch, &model, &record)?;
    read_part::<B, O::Record>(directory, "optim", epoch, device)?;
    read_part::<B, S::Record<B>>(directory, "scheduler", epoch, device)?;
    Ok(model.load_record(record))
}

fn check_record<B: Backend>(
    directory: &RunDirectory,
    epoch: usize,
    model: &FusedKvDecoder<B>,
    record: &DecoderRecord<B>,
) -> Result<(), TrainError> {
    let checked = model.check_record(record);
    checked.map_err(|error| TrainError::Unreadable {
        path: directory.part("model", epoch).with_extension("mpk"),
        reason: error.to_string(),
    })
}

fn read_part<B: Backend, R: Record<B>>(
    directory: &RunDirectory,
    part: &str,
    epoch: usize,
    device: &B::Device,
) -> Result<R, TrainError> {
    let path = directory.part(part, epoch);
    let recorder = CompleteFileRecorder::default();
    Recorder::<B>::load(&recorder, path.clone(), device).map_err(|error| TrainError::Unreadable {
        path: path.with_extension("mpk"),
        reason: error.to_string(),
    })
}
