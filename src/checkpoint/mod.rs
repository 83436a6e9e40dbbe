//! Models as directories in the layout of the Hugging Face hub.
//!
//! A directory holds `config.json`, the weights in `model.safetensors` or in shards with
//! `model.safetensors.index.json`, and if need be `tokenizer.json` and `generation_config.json`. A
//! Qwen3 directory loads as it is; other plans add a `kv_plan` to the configuration and their own
//! few tensors (docs/checkpoints.md). Linear orientation, tied heads and the order of RoPE's
//! channels are taken care of.
//!
//! ```
//! use fusedkv::backend::{Flex, FlexDevice};
//! use fusedkv::checkpoint::{SaveOptions, WeightDtype, load_checkpoint, save_checkpoint};
//! use fusedkv::{FusedKvDecoderConfig, KvPlan};
//!
//! # let directory = tempfile::tempdir()?;
//! # let directory = directory.path().join("model");
//! let device = FlexDevice::default();
//! let config = FusedKvDecoderConfig::tiny(256, KvPlan::FusedKv { storage_layers: 3 });
//! let model = config.init::<Flex>(&device)?;
//! let options = SaveOptions::new().with_dtype(WeightDtype::Bf16).with_eos(vec![2]);
//! save_checkpoint(&directory, &model, &options)?;
//!
//! let loaded = load_checkpoint::<Flex>(&directory, WeightDtype::F32, &device)?;
//! assert_eq!(loaded.model.config().plan, config.plan);
//! assert_eq!(loaded.eos, [2]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod adapter;
mod config;
mod directory;
mod error;
mod families;
mod fill;
pub mod gguf;
mod keys;
mod load;
mod names;
mod numbers;
mod plan;
mod read;
mod rows;
mod safetensors;
mod save;
mod shared_file;
mod stored;
mod tensors;
mod weights;

pub use adapter::{load_adapter, save_adapter};
pub use directory::check_destination;
pub use error::CheckpointError;
#[cfg(feature = "train")]
pub(crate) use load::check_vocabulary;
pub use load::{LoadOptions, LoadedCheckpoint, load_checkpoint};
pub use numbers::WeightDtype;
pub use plan::plan_of_config;
pub use rows::RowWriter;
pub use save::{SaveOptions, save_checkpoint};

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
