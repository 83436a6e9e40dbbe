//! Training on Burn's `Learner`: a tokenizer, packed windows, AdamW, checkpoints.
//!
//! Any decoder of this crate trains on any Burn backend with autodiff. The modules around it are
//! plain: nothing in the decoder knows that it is trained here.
//!
//! ```
//! use fusedkv::backend::{Autodiff, Flex, FlexDevice};
//! use fusedkv::train::{Progress, Run, Tokenizer, TrainingConfig, load_model, save_model, train};
//! use fusedkv::{FusedKvDecoderConfig, KvPlan};
//!
//! # let directory = tempfile::tempdir()?;
//! # let directory = directory.path();
//! let text = "one fish two fish red fish blue fish ".repeat(40);
//! let tokenizer = Tokenizer::train_bpe(&text, 280)?;
//! let tokens = tokenizer.encode(&text)?;
//!
//! let plan = KvPlan::FusedKv { storage_layers: 2 };
//! let model = FusedKvDecoderConfig::new(tokenizer.vocab_size(), 16, 4, 2, 2, 8, 32, plan);
//! let config = TrainingConfig::new(model, 16, 2, 4).with_epochs(2);
//! let run = Run::new(directory.join("run")).with_progress(Progress::Quiet);
//! let device = FlexDevice::default();
//! let trained = train::<Autodiff<Flex>>(&config, tokens, &run, &device)?;
//! assert!(trained.valid_loss.is_finite());
//!
//! save_model(directory, &trained.model, &tokenizer)?;
//! let (model, tokenizer) = load_model::<Flex>(directory, &device)?;
//! # let _ = (model, tokenizer);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod checkpoint;
pub mod compare;
mod config;
mod data;
mod error;
mod file;
mod learning_rate;
mod metrics;
mod model_dir;
mod optimizer;
mod progress;
mod recall;
mod run;
mod step;
mod tokenizer;

pub use checkpoint::EpochLosses;
pub use config::TrainingConfig;
pub use data::{Answer, LanguageBatch, LanguageBatcher, TokenWindow, TokenWindows, Windows};
pub use error::{ModelDirError, TokenizerError, TrainError};
pub use metrics::{PerplexityMetric, TokenLosses, TokenRateMetric, perplexity};
pub use model_dir::{load_model, save_model};
pub use progress::{Progress, StepReport};
pub use recall::{AssociativeRecall, DistanceAccuracy, Needle, accuracy_by_distance};
pub use run::{Run, Trained, evaluate, train, train_on};
pub use step::LanguageOutput;
pub use tokenizer::{END_OF_TEXT, TextStream, Tokenizer};
