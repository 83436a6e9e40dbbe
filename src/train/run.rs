//! What a training is asked for, and what it gives.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::backend::{AutodiffBackend, Backend};

use super::checkpoint::{EpochLosses, RunDirectory};
use super::config::TrainingConfig;
use super::data::{TokenWindows, Windows, check_vocabulary};
use super::error::TrainError;
use super::learning::{Models, run_training};
use super::metrics::perplexity;
use super::objective::Distillation;
use super::progress::{Observer, Progress, StepReport};
use super::routing::RoutingError;
use super::saved::load_model;
use super::trainable::Trainable;
use super::trainee::Trainee;
use crate::config::FusedKvDecoderConfig;
use crate::decoder::FusedKvDecoder;
use crate::plan::KvPlan;

/// Where a training keeps its checkpoints, and how it is watched.
#[derive(Clone, Debug)]
pub struct Run {
    pub(super) directory: PathBuf,
    pub(super) resume: bool,
    pub(super) progress: Progress,
    pub(super) observer: Option<Observer>,
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

    /// Goes on from the last checkpoint in the directory, if `resume` is set; one of the same
    /// configuration, data and teacher.
    ///
    /// The run ends as it would have without the interruption: the windows read, the optimizer's
    /// moments and the learning rate are those of the step. The one exception is dropout, whose
    /// randomness starts over.
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
    /// the numbers of the run's own. Of a [routed](super::Routing) training it is the decoder of the first
    /// plan.
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
    /// [`TrainError::NoCheckpoint`] if no epoch is finished, [`TrainError::NeedsBase`] if the run has
    /// adapters alone, [`TrainError::Unreadable`] if a file of the run is damaged.
    pub fn best<B: Backend>(
        &self,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        self.model(lowest, None, None, device)
    }

    /// [`best`](Self::best) under a plan of the run's [routing](super::Routing). The epoch is that of the
    /// lowest mean over the plans, whatever plan is asked for.
    ///
    /// # Errors
    /// As [`best`](Self::best), and [`TrainError::Routing`] if the run was not trained under the plan.
    pub fn best_under<B: Backend>(
        &self,
        plan: &KvPlan,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        self.model(lowest, Some(plan), None, device)
    }

    /// [`best`](Self::best) of a training of [adapters](Trainable::Lora), beside the model that it
    /// began with.
    ///
    /// # Errors
    /// As [`best`](Self::best), [`TrainError::OtherBase`] if the model is another one, and those of
    /// [`train_from`].
    pub fn best_with_base<B: Backend>(
        &self,
        base: FusedKvDecoder<B>,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        let device = base.device();
        self.model(lowest, None, Some(base), &device)
    }

    /// The model of the last epoch that was finished, and its losses.
    ///
    /// # Errors
    /// As [`best`](Self::best).
    pub fn last<B: Backend>(
        &self,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        self.model(|mut epochs| epochs.pop(), None, None, device)
    }

    /// [`last`](Self::last) under a plan of the run's [routing](super::Routing).
    ///
    /// # Errors
    /// As [`best_under`](Self::best_under).
    pub fn last_under<B: Backend>(
        &self,
        plan: &KvPlan,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        self.model(|mut epochs| epochs.pop(), Some(plan), None, device)
    }

    /// [`last`](Self::last) of a training of adapters, as [`best_with_base`](Self::best_with_base).
    ///
    /// # Errors
    /// As [`best_with_base`](Self::best_with_base).
    pub fn last_with_base<B: Backend>(
        &self,
        base: FusedKvDecoder<B>,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        let device = base.device();
        self.model(|mut epochs| epochs.pop(), None, Some(base), &device)
    }

    /// The model of an epoch chosen among those with a checkpoint, in order; under one of the plans it was
    /// trained for, or the first.
    fn model<B: Backend>(
        &self,
        choose: impl FnOnce(Vec<EpochLosses>) -> Option<EpochLosses>,
        plan: Option<&KvPlan>,
        base: Option<FusedKvDecoder<B>>,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        let (directory, config, epochs) = RunDirectory::saved(&self.directory)?;
        let none = || TrainError::NoCheckpoint(self.directory.clone());
        let losses = choose(epochs).ok_or_else(none)?;
        if matches!(config.trainable, Some(Trainable::Lora(_))) && base.is_none() {
            return Err(TrainError::NeedsBase(self.directory.clone()));
        }
        let model = Trainee::to_load(&config, base, device)?;
        let place = match plan {
            Some(plan) => {
                let of_plan = FusedKvDecoderConfig {
                    plan: plan.clone(),
                    ..config.model.clone()
                };
                let layout = of_plan.validate()?;
                let place = model.layouts().iter().position(|of| *of == layout);
                place.ok_or_else(|| RoutingError::NotTrained {
                    plan: plan.clone(),
                    plans: match &config.routing {
                        Some(routing) => routing.plans.clone(),
                        None => vec![config.model.plan.clone()],
                    },
                })?
            }
            None => 0,
        };
        let model = load_model(&directory, losses.epoch, model, device)?;
        Ok((model.decoders().swap_remove(place), losses))
    }
}

fn lowest(epochs: Vec<EpochLosses>) -> Option<EpochLosses> {
    let by_loss = |a: &EpochLosses, b: &EpochLosses| a.valid.total_cmp(&b.valid);
    epochs.into_iter().min_by(by_loss)
}

/// A model that was trained for several plans, under one of them.
#[derive(Clone, Debug)]
pub struct TrainedPlan<B: Backend> {
    /// The decoder of the plan. It shares the parameters that it has in common with the others in memory,
    /// and is saved by itself as any other.
    pub model: FusedKvDecoder<B>,
    /// Mean loss of the held-out windows under the plan, in nats per token.
    pub valid_loss: f64,
}

/// What a training gives.
#[derive(Clone, Debug)]
pub struct Trained<B: Backend> {
    /// The model after the last step, without autodiff; of a [routed](super::Routing) training under the
    /// first plan.
    pub model: FusedKvDecoder<B>,
    /// The model under every plan of a routing, in its order; empty in a training without.
    pub plans: Vec<TrainedPlan<B>>,
    /// The losses of every epoch, those before a resumption included.
    pub epochs: Vec<EpochLosses>,
    /// Mean loss of the last epoch's batches, in nats per token.
    pub train_loss: f64,
    /// Mean loss of the held-out windows, in nats per token; with a routing the mean over its plans by
    /// their weights.
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
/// [`TrainError`] for a configuration, tokens or a directory that do not fit or that another training
/// uses, before anything is trained, and for a training that is stopped, loses its files or diverges.
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

/// The windows of a text to train on, and those held out.
fn split(
    config: &TrainingConfig,
    tokens: impl Into<Arc<[u32]>>,
) -> Result<(TokenWindows, TokenWindows), TrainError> {
    let tokens = tokens.into();
    check_vocabulary(&tokens, config.model.vocab_size)?;
    TokenWindows::split(tokens, config.context, config.valid_fraction)
}
