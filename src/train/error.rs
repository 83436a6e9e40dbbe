//! What can go wrong in training, its data, and the files around it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::chat_error::ChatDataError;
use super::routing::RoutingError;
use crate::cache::CacheError;
use crate::checkpoint::CheckpointError;
use crate::config::{ConfigError, FusedKvDecoderConfig};
use crate::decoder::{ForwardError, LoraConfig, LoraError};
use crate::tokenizer::{END_OF_TEXT, TokenizerError};

fn adapters(lora: Option<&LoraConfig>) -> String {
    match lora {
        None => "no adapters".to_owned(),
        Some(lora) => format!(
            "adapters of rank {} and alpha {} beside {}",
            lora.rank,
            lora.alpha,
            lora.targets.join(", ")
        ),
    }
}

/// A training that cannot start, or did not finish.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrainError {
    /// No decoder can be built from the configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A setting outside its range.
    #[error("{field} is {value}, expected {expected}")]
    Setting {
        /// The setting's name.
        field: &'static str,
        /// What it was.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// A model to start with that is not the configured one.
    #[error("the model to start with is {found}, expected {expected}")]
    OtherModel {
        /// The model's configuration.
        found: Box<FusedKvDecoderConfig>,
        /// What is to be trained.
        expected: Box<FusedKvDecoderConfig>,
    },
    /// Nothing that trains.
    #[error("no parameter that can train is named like `{0}`, expected one or more")]
    NothingTrains(String),
    /// Plans that the model cannot be trained for, or was not.
    #[error(transparent)]
    Routing(#[from] RoutingError),
    /// Adapters that the model cannot have.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// Adapters beside random weights.
    #[error(
        "a training of adapters needs a model to start with, expected `train_from` or `distill`"
    )]
    NoBase,
    /// A model to start with whose adapters are not those that are to train.
    #[error(
        "the model to start with has {}, expected {}",
        adapters(found.as_ref()),
        adapters(expected.as_ref())
    )]
    OtherAdapters {
        /// The model's, if it has any.
        found: Option<LoraConfig>,
        /// Those of [`Trainable::Lora`](super::Trainable::Lora), if that is what trains.
        expected: Option<LoraConfig>,
    },
    /// The run has adapters alone, and needs the model they were trained beside.
    #[error(
        "{} holds a training of adapters, expected its base: `Run::best_with_base`, \
         `Run::last_with_base`",
        .0.display()
    )]
    NeedsBase(PathBuf),
    /// The base given is not the one that the run's adapters were trained beside.
    #[error("{} holds adapters trained beside another model, expected that one", .0.display())]
    OtherBase(PathBuf),
    /// Distillation without a teacher.
    #[error("a training with a distillation needs a teacher, expected to be started by `distill`")]
    NoTeacher,
    /// A teacher that the student cannot learn from.
    #[error("the teacher's {field} is {found}, expected the student's, {expected}")]
    Teacher {
        /// What is wrong of its configuration.
        field: &'static str,
        /// What it was.
        found: usize,
        /// What it may be.
        expected: usize,
    },
    /// Windows longer than the decoder's RoPE table.
    #[error("context is {context} tokens, expected at most max_positions, {max_positions}")]
    ContextTooLong {
        /// Tokens per window.
        context: usize,
        /// What the decoder is configured for.
        max_positions: usize,
    },
    /// Not enough text for the windows it takes.
    #[error(
        "{found} tokens, expected at least {}: {windows} windows of {context} and one more",
        windows * context + 1
    )]
    TooFewTokens {
        /// Tokens given.
        found: usize,
        /// Windows it takes: one, and one to validate on where they are of one text.
        windows: usize,
        /// Tokens per window.
        context: usize,
    },
    /// A folder without text.
    #[error("no text in {}, expected files of UTF-8 that are not empty", .0.display())]
    NoText(PathBuf),
    /// A tokenizer that cannot take the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A tokenizer that has no [`END_OF_TEXT`], and no other token to put behind documents.
    #[error(
        "the tokenizer has no token `{}`, expected one that has, or what ends a text by \
         `Corpus::with_end`",
        END_OF_TEXT
    )]
    NoEnd,
    /// A model that cannot be saved for others to load.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A cache that the backend cannot keep.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// What the decoder cannot read.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// A line of a file of chats that is none to learn from.
    #[error("line {line} of {}: {source}", path.display())]
    Chat {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong.
        source: ChatDataError,
    },
    /// A window that is not there, among those a data set says it has.
    #[error("window {index} is missing, expected all {windows} of the data set")]
    MissingWindow {
        /// Its place in the data set.
        index: usize,
        /// Windows in the data set.
        windows: usize,
    },
    /// A window that is not what its data set says.
    #[error("window {index} has {field} {found}, expected {expected}")]
    Window {
        /// Its place in the data set.
        index: usize,
        /// What is wrong of it.
        field: &'static str,
        /// Its length or value.
        found: usize,
        /// What it may be.
        expected: String,
    },
    /// Windows none of whose targets count: there is nothing to learn, or to measure.
    #[error("no target counts in {}, expected one or more", match step {
        Some(step) => format!("step {step}"),
        None => "the windows to validate with".to_owned(),
    })]
    NoTargets {
        /// The step, counted from 1; none: in validation.
        step: Option<usize>,
    },
    /// A token the decoder has no embedding for.
    #[error("token {token} at {position}, expected ids below the vocabulary's size, {vocab_size}")]
    OutOfVocabulary {
        /// Where it is.
        position: usize,
        /// What it is.
        token: u32,
        /// Size of the decoder's vocabulary.
        vocab_size: usize,
    },
    /// The directory has files, and not those of a run: starting over would delete them.
    #[error("{} is not empty and holds no earlier run, expected a new, empty or run directory", .0.display())]
    NotARun(PathBuf),
    /// Another process, or thread, writes there.
    #[error("{} is in use by another training, expected one that has ended or another directory", .0.display())]
    InUse(PathBuf),
    /// There is nothing to resume from.
    #[error("no complete checkpoint in {}, expected one to resume from", .0.display())]
    NoCheckpoint(PathBuf),
    /// The checkpoints are of a run with another configuration, or of other data, which are told apart
    /// by [fingerprints](super::Windows::fingerprint).
    #[error("{} holds a run with {field} {found}, expected {expected}, to resume it", directory.display())]
    OtherRun {
        /// The run's directory.
        directory: PathBuf,
        /// The first setting that differs.
        field: String,
        /// Its value in the directory.
        found: String,
        /// Its value in the configuration given.
        expected: String,
    },
    /// The comparison is of a version that told data apart by another hash.
    #[error(
        "{} holds a comparison of an older version, whose data were hashed otherwise, expected a new \
         directory or one of this version",
        .0.display()
    )]
    OlderComparison(PathBuf),
    /// A file of the run cannot be read back.
    #[error("cannot read {}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file cannot be written, or a directory not made.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Stopped from the terminal UI, or by a checkpoint that could not be saved. Resuming goes on
    /// from the last checkpoint.
    #[error("training stopped before its end: {0}")]
    Interrupted(String),
    /// The loss is infinite or not a number; a lower learning rate or longer warmup may help.
    #[error("the loss of epoch {epoch} is {loss}, expected a number")]
    Diverged {
        /// The epoch, counted from 1.
        epoch: usize,
        /// Its mean training or validation loss.
        loss: f64,
    },
}
