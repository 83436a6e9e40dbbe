//! Training on Burn's `Learner`: packed windows of any text, AdamW with warmup and cosine, file
//! checkpoints and resume.
//!
//! ```no_run
//! use fusedkv::backend::{Autodiff, Flex, FlexDevice};
//! use fusedkv::train::{TrainingConfig, encode, train, train_bpe};
//! use fusedkv::{FusedKvDecoderConfig, KvPlan};
//!
//! let text = std::fs::read_to_string("corpus.txt")?;
//! let tokenizer = train_bpe(&text, 1024)?;
//! let vocab_size = tokenizer.get_vocab_size(true);
//! let model = FusedKvDecoderConfig::tiny(vocab_size, KvPlan::FusedKv { storage_layers: 3 });
//! let config = TrainingConfig::new(model).with_steps(500);
//! let tokens = encode(&tokenizer, &text)?;
//! let trained = train::<Autodiff<Flex>>(&config, tokens, "run".as_ref(), &FlexDevice::default())?;
//! println!("perplexity {:.1}", trained.valid_loss.exp());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod data;
mod files;
mod metric;
mod model_dir;
mod progress;
mod step;
mod tokenizer;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use burn::config::Config;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::lr_scheduler::composed::{ComposedLrScheduler, ComposedLrSchedulerConfig};
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::optim::AdamWConfig;
use burn::record::DefaultRecorder;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn_train::metric::{LearningRateMetric, LossMetric};
use burn_train::{InferenceStep, ItemLazy, Learner, SupervisedTraining};
use thiserror::Error;
pub use tokenizers::Tokenizer;

pub use data::{LanguageBatch, LanguageBatcher, ShuffledEpochs, TokenWindow, TokenWindows};
pub use metric::{NllInput, PerplexityMetric};
pub use model_dir::{load_model, save_model};
pub use step::{LanguageModel, StepLoss, StepOutput};
pub use tokenizer::{
    END_OF_TEXT, MIN_VOCAB_SIZE, TextStream, encode, load_tokenizer, save_tokenizer, train_bpe,
};

use crate::backend::Flex;
use crate::{ConfigError, FusedKvDecoder, FusedKvDecoderConfig};

/// A training run. AdamW with the FusedKV paper's β = (0.9, 0.95); the learning rate warms up
/// linearly under a cosine from its peak to a tenth of it.
#[derive(Config, Debug, PartialEq)]
pub struct TrainingConfig {
    /// The decoder.
    pub model: FusedKvDecoderConfig,
    /// Tokens per window.
    #[config(default = 128)]
    pub context: usize,
    /// Windows per step.
    #[config(default = 16)]
    pub batch_size: usize,
    /// Optimiser steps, rounded up to whole epochs.
    #[config(default = 500)]
    pub steps: usize,
    /// Steps between validations, which is also between checkpoints: burn-train's epoch.
    #[config(default = 100)]
    pub epoch_steps: usize,
    /// Peak learning rate.
    #[config(default = 1e-3)]
    pub learning_rate: f64,
    /// Steps of linear warmup.
    #[config(default = 50)]
    pub warmup_steps: usize,
    /// AdamW's weight decay.
    #[config(default = 0.1)]
    pub weight_decay: f32,
    /// Largest norm of all gradients together; larger ones are scaled down.
    #[config(default = "Some(1.0)")]
    pub grad_clip: Option<f64>,
    /// Share of the tokens held out for validation.
    #[config(default = 0.1)]
    pub valid_fraction: f64,
    /// Decides the initial weights and the order of windows.
    #[config(default = 0)]
    pub seed: u64,
    /// Continue from the last checkpoint in the run's directory, if there is one.
    #[config(default = false)]
    pub resume: bool,
}

/// What a run ended with.
#[derive(Debug)]
pub struct Trained<B: Backend> {
    /// The decoder, ready for inference.
    pub model: FusedKvDecoder<B>,
    /// Mean negative log-likelihood in nats per token over training windows, as many as there are
    /// validation windows.
    pub train_loss: f64,
    /// The same over all validation windows.
    pub valid_loss: f64,
    /// Tokens trained on by this call, each counted as often as it was seen.
    pub tokens: usize,
    /// Seconds the `Learner` took: steps, validations and checkpoints.
    pub seconds: f64,
}

/// A run that cannot start or did not finish.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The decoder's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A number outside its range.
    #[error("{field} is {value}, expected {expected}")]
    Range {
        /// The field's name.
        field: &'static str,
        /// What it was.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// Windows longer than the decoder can read.
    #[error("context is {context}, expected at most max_positions ({max_positions})")]
    Context {
        /// Tokens per window.
        context: usize,
        /// What the decoder can read.
        max_positions: usize,
    },
    /// Not enough text.
    #[error("{found} tokens, expected at least {needed} for a training and a validation window")]
    TooFewTokens {
        /// Tokens there are.
        found: usize,
        /// Tokens that would do.
        needed: usize,
    },
    /// A token the decoder does not know.
    #[error("token {token} at position {position}, expected below vocab_size ({vocab_size})")]
    OutOfVocabulary {
        /// The token.
        token: u32,
        /// Where it stands.
        position: usize,
        /// Tokens the decoder knows.
        vocab_size: usize,
    },
    /// A vocabulary that cannot spell every text.
    #[error("a vocabulary of {vocab_size} tokens, expected at least {MIN_VOCAB_SIZE}")]
    VocabSize {
        /// The size asked for.
        vocab_size: usize,
    },
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(#[from] tokenizers::Error),
    /// A file or directory cannot be read or written.
    #[error("{}: {message}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// The run ended before its last step, e.g. because a checkpoint could not be written.
    #[error("training was interrupted: {0}")]
    Interrupted(String),
}

impl TrainError {
    fn file(path: &Path, error: impl std::fmt::Display) -> Self {
        Self::File {
            path: path.to_owned(),
            message: error.to_string(),
        }
    }
}

/// Trains a decoder on `tokens`, and keeps checkpoints, metrics and the configuration in
/// `directory`.
///
/// Shows burn-train's terminal UI where standard output is a terminal, plain lines elsewhere. The
/// weights, and the order of windows, follow from the seed; a resumed run sees the windows it would
/// have seen.
///
/// # Errors
/// [`TrainError`] if the configuration makes no sense or does not fit the tokens, before any work;
/// if the directory cannot be written; or if the run was interrupted.
pub fn train<B: AutodiffBackend>(
    config: &TrainingConfig,
    tokens: impl Into<Arc<[u32]>>,
    directory: &Path,
    device: &B::Device,
) -> Result<Trained<B::InnerBackend>, TrainError> {
    let tokens = tokens.into();
    let schedule = config.validate(&tokens)?;
    let (train, valid) = TokenWindows::split(tokens, config.context, config.valid_fraction)?;
    std::fs::create_dir_all(directory).map_err(|error| TrainError::file(directory, error))?;
    files::write_atomically(&directory.join("training.json"), |path| config.save(path))?;

    let checkpoint = match config.resume {
        true => last_checkpoint(directory),
        false => None,
    };
    let done_epochs = checkpoint.unwrap_or(0);
    let epochs = config.epochs();
    B::seed(device, config.seed);
    let model = LanguageModel::new(config.model.init::<B>(device)?, config.grad_clip);
    let model = step::initialised(model);
    let optimizer = AdamWConfig::new()
        .with_beta_1(0.9)
        .with_beta_2(0.95)
        .with_epsilon(1e-8)
        .with_weight_decay(config.weight_decay)
        .init();

    let train_loader: Arc<dyn DataLoader<B, LanguageBatch<B>>> = Arc::new(ShuffledEpochs::new(
        train.clone(),
        config.batch_size,
        config.epoch_steps,
        config.seed,
        done_epochs,
        device.clone(),
    ));
    let valid_loader = in_order::<B::InnerBackend>(valid.clone(), config.batch_size);
    let training = SupervisedTraining::new(directory, train_loader, valid_loader.clone())
        .metrics((LossMetric::<Flex>::new(), PerplexityMetric::new()))
        .metric_train_numeric(LearningRateMetric::new())
        .with_file_checkpointer(DefaultRecorder::new())
        .num_epochs(epochs)
        .with_application_logger(None);
    let training = match checkpoint {
        Some(epoch) => training.checkpoint(epoch),
        None => training,
    };
    let training = match std::io::stdout().is_terminal() {
        true => training,
        false => training.renderer(progress::PlainProgress::new(
            config.epoch_steps,
            epochs * config.epoch_steps,
            config.batch_size * config.context,
        )),
    };
    let interrupter = training.interrupter();
    let start = Instant::now();
    let trained = match done_epochs < epochs {
        true => {
            training
                .launch(Learner::new(model, optimizer, schedule))
                .model
        }
        // Nothing is left to do: the checkpoint is the result.
        false => restored(model, directory, done_epochs, device)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    if interrupter.should_stop() {
        let reason = interrupter.get_message();
        return Err(TrainError::Interrupted(reason.unwrap_or_default()));
    }
    let steps = epochs.saturating_sub(done_epochs) * config.epoch_steps;
    let n_valid = valid_loader.num_items();
    let train_loader = in_order::<B::InnerBackend>(train, config.batch_size);
    let train_loader = train_loader.slice(0, n_valid.min(train_loader.num_items()));
    Ok(Trained {
        train_loss: mean_loss(&trained, &*train_loader),
        valid_loss: mean_loss(&trained, &*valid_loader),
        model: trained.decoder,
        tokens: steps * config.batch_size * config.context,
        seconds,
    })
}

impl TrainingConfig {
    /// Epochs of `epoch_steps` steps that `steps` steps take.
    pub fn epochs(&self) -> usize {
        self.steps.div_ceil(self.epoch_steps)
    }

    fn validate(&self, tokens: &[u32]) -> Result<ComposedLrScheduler, TrainError> {
        self.model.validate()?;
        let lr = self.learning_rate;
        let clip = self.grad_clip.unwrap_or(1.0);
        for (field, value, fits, expected) in [
            (
                "context",
                self.context as f64,
                self.context > 0,
                "1 or more",
            ),
            (
                "batch_size",
                self.batch_size as f64,
                self.batch_size > 0,
                "1 or more",
            ),
            ("steps", self.steps as f64, self.steps > 0, "1 or more"),
            (
                "epoch_steps",
                self.epoch_steps as f64,
                self.epoch_steps > 0,
                "1 or more",
            ),
            (
                "learning_rate",
                lr,
                lr > 0.0 && lr <= 1.0,
                "above 0 and at most 1",
            ),
            ("grad_clip", clip, clip > 0.0, "above 0"),
            (
                "weight_decay",
                f64::from(self.weight_decay),
                self.weight_decay >= 0.0,
                "0 or more",
            ),
            (
                "valid_fraction",
                self.valid_fraction,
                self.valid_fraction > 0.0 && self.valid_fraction < 1.0,
                "above 0 and below 1",
            ),
        ] {
            if !fits {
                return Err(TrainError::Range {
                    field,
                    value,
                    expected,
                });
            }
        }
        let max_positions = self.model.max_positions;
        if self.context > max_positions {
            return Err(TrainError::Context {
                context: self.context,
                max_positions,
            });
        }
        let vocab_size = self.model.vocab_size;
        if let Some(position) = tokens.iter().position(|&t| t as usize >= vocab_size) {
            return Err(TrainError::OutOfVocabulary {
                token: tokens[position],
                position,
                vocab_size,
            });
        }
        Ok(self.schedule())
    }

    /// Linear warmup to 1 times a cosine from the peak to a tenth of it.
    fn schedule(&self) -> ComposedLrScheduler {
        let steps = self.epochs() * self.epoch_steps;
        let warmup = self.warmup_steps.max(1);
        let cosine = CosineAnnealingLrSchedulerConfig::new(self.learning_rate, steps)
            .with_min_lr(0.1 * self.learning_rate);
        ComposedLrSchedulerConfig::new()
            .linear(LinearLrSchedulerConfig::new(
                1.0 / warmup as f64,
                1.0,
                warmup,
            ))
            .cosine(cosine)
            .init()
            .expect("every value was checked")
    }
}

/// Every window once, in order.
fn in_order<B: Backend>(
    windows: TokenWindows,
    batch_size: usize,
) -> Arc<dyn DataLoader<B, LanguageBatch<B>>> {
    DataLoaderBuilder::new(LanguageBatcher)
        .batch_size(batch_size)
        .build(windows)
}

/// Nats per token over a loader's windows.
fn mean_loss<B: Backend>(
    model: &LanguageModel<B>,
    loader: &dyn DataLoader<B, LanguageBatch<B>>,
) -> f64 {
    let (mut nll, mut tokens) = (0.0, 0);
    let device = model.decoder.embed_tokens.weight.val().device();
    for batch in loader.to_device(&device).iter() {
        let loss = InferenceStep::step(model, batch).sync();
        nll += loss.nll * loss.tokens as f64;
        tokens += loss.tokens;
    }
    nll / tokens as f64
}

const CHECKPOINTS: &str = "checkpoint";

/// The last epoch whose model, optimiser and schedule are all there.
fn last_checkpoint(directory: &Path) -> Option<usize> {
    let directory = directory.join(CHECKPOINTS);
    let there = |epoch: &usize| {
        let parts = ["model", "optim", "scheduler"];
        parts
            .iter()
            .all(|part| directory.join(format!("{part}-{epoch}.mpk")).is_file())
    };
    std::fs::read_dir(&directory)
        .ok()?
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.strip_prefix("model-")?
                .strip_suffix(".mpk")?
                .parse()
                .ok()
        })
        .filter(there)
        .max()
}

/// The model of a checkpoint.
fn restored<B: AutodiffBackend>(
    model: LanguageModel<B>,
    directory: &Path,
    epoch: usize,
    device: &B::Device,
) -> Result<LanguageModel<B::InnerBackend>, TrainError> {
    use burn::module::{AutodiffModule, Module};
    use burn::record::Recorder;

    let file = directory
        .join(CHECKPOINTS)
        .join(format!("model-{epoch}.mpk"));
    let record = DefaultRecorder::new()
        .load(file.clone(), device)
        .map_err(|error| TrainError::file(&file, error))?;
    Ok(model.load_record(record).valid())
}
