//! The ways to start a training.

use std::sync::Arc;

use burn::tensor::backend::AutodiffBackend;

use super::config::TrainingConfig;
use super::data::{TokenWindows, Windows, check_vocabulary};
use super::error::TrainError;
use super::learning::{Models, run_training};
use super::objective::Distillation;
use super::run::{Run, Trained};
use crate::decoder::FusedKvDecoder;

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
