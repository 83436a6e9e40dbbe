//! Training on Burn's `Learner`: packed windows, AdamW, checkpoints of the run.
//!
//! Any decoder of this crate trains on any Burn backend with autodiff. The modules around it are
//! plain: nothing in the decoder knows that it is trained here.
//!
//! ```
//! use fusedkv::backend::{Autodiff, Flex, FlexDevice};
//! use fusedkv::checkpoint::{SaveOptions, save_checkpoint};
//! use fusedkv::tokenizer::Tokenizer;
//! use fusedkv::train::{Progress, Run, TrainingConfig, train};
//! use fusedkv::{FusedKvDecoderConfig, KvPlan};
//!
//! # let directory = tempfile::tempdir()?;
//! # let directory = directory.path();
//! let text = "one fish two fish red fish blue fish ".repeat(40);
//! let tokenizer = Tokenizer::train_bpe(&text, 280)?;
//! let tokens = tokenizer.encode(&text)?;
//!
//! let plan = KvPlan::FusedKv { storage_layers: 2 };
//! let model = FusedKvDecoderConfig::new(tokenizer.vocab_size(), plan)
//!     .with_hidden_size(16)
//!     .with_n_layers(4)
//!     .with_n_heads(2)
//!     .with_n_kv_heads(2)
//!     .with_head_dim(8)
//!     .with_ffn_size(32);
//! let config = TrainingConfig::new(model, 16, 2, 4).with_epochs(2);
//! let run = Run::new(directory.join("run")).with_progress(Progress::Quiet);
//! let device = FlexDevice::default();
//! let trained = train::<Autodiff<Flex>>(&config, tokens, &run, &device)?;
//! assert!(trained.valid_loss.is_finite());
//!
//! let options = SaveOptions::new().with_tokenizer(tokenizer);
//! save_checkpoint(directory.join("model"), &trained.model, &options)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod adam_w;
mod batch;
mod chat;
mod chat_error;
mod checkpoint;
pub mod compare;
mod config;
mod corpus;
mod data;
mod directory;
mod error;
mod evaluate;
mod gradients;
mod learning;
mod learning_rate;
mod loader;
mod log;
mod metrics;
mod number;
mod objective;
mod optimizer;
mod plan_losses;
mod precision;
mod progress;
mod recall;
mod repeats;
mod roles;
mod routing;
mod run;
mod saved;
mod start;
mod step;
mod token_file;
mod trainable;
mod trainee;

pub use batch::{LanguageBatch, LanguageBatcher, TargetMask};
pub use chat::ChatWindows;
pub use chat_error::ChatDataError;
pub use config::TrainingConfig;
pub use corpus::{Corpus, Part};
pub use data::{Answer, TokenWindow, TokenWindows, Windows};
pub use directory::EpochLosses;
pub use error::TrainError;
pub use evaluate::{Evaluation, evaluate};
pub use gradients::GradientNorms;
pub use log::LogLine;
pub use metrics::{LossMetric, PerplexityMetric, TokenLosses, TokenRateMetric, perplexity};
pub use objective::{Distillation, Lesson};
pub use progress::{Progress, StepReport};
pub use recall::{AssociativeRecall, DistanceAccuracy, Needle};
pub use repeats::{Repeat, RepeatLoss};
pub use routing::{Routing, RoutingError};
pub use run::{Run, Trained, TrainedPlan};
pub use start::{distill, train, train_from, train_from_on, train_on};
pub use step::LanguageOutput;
pub use token_file::TokenFile;
pub use trainable::Trainable;

/// A decoder of 4 layers, 16 wide, that knows 32 tokens.
#[cfg(test)]
fn small_decoder(plan: crate::KvPlan) -> crate::FusedKvDecoderConfig {
    crate::FusedKvDecoderConfig::new(32, plan)
        .with_hidden_size(16)
        .with_n_layers(4)
        .with_n_heads(2)
        .with_n_kv_heads(2)
        .with_head_dim(8)
        .with_ffn_size(24)
}
