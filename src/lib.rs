//! Transformer decoders for [Burn](https://burn.dev) whose top layers need no KV cache of their
//! own.
//!
//! FusedKV (arXiv 2512.03870) caches the bottom half of the layers only. Each top layer
//! reconstructs its keys and values as a learned, per-channel blend of the bottom and the middle
//! layer's caches, directly on post-RoPE keys. Half the cache; the paper reports lower perplexity
//! than a standard decoder's. The same decoder runs the methods it is compared with (FusedKV-Lite,
//! YOCO, YOCO++, CLA, GQA, the standard cache) and plans of your own: a method is a [`KvPlan`].
//!
//! ```
//! use fusedkv::backend::{Flex, FlexDevice};
//! use fusedkv::{FusedKvDecoderConfig, GenerationConfig, KvPlan, generate};
//!
//! let device = FlexDevice::default();
//! let config = FusedKvDecoderConfig::tiny(256, KvPlan::FusedKv { storage_layers: 3 });
//! let model = config.init::<Flex>(&device)?;
//!
//! let prompts = [b"FusedKV".map(u32::from)];
//! let settings = GenerationConfig::new().with_max_new_tokens(5);
//! for token in generate(&model, &prompts, &settings)? {
//!     print!("{} ", token?.id);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Data flows one way: tokens → embedding → layers, each told by the plan where its keys and values
//! come from → head. The modules:
//! - [`plan`]: which layers store, what the others read
//! - [`config`], [`cost`]: shapes, presets, and what they cost
//! - [`attention`]: attention over blends of stored keys and values
//! - [`cache`]: storage for the layers that store
//! - [`decoder`]: the model
//! - [`tokens`]: batches whose rows differ in length
//! - [`mod@generate`]: sampling through the cache
//! - [`mod@score`]: how well a text is predicted
//! - [`flow`]: what learned blends read
//! - `convert` (feature `convert`): a standard decoder's weights under another plan
//! - `checkpoint`, `tokenizer` (feature `checkpoint`): Hugging Face's directories, text to tokens
//! - `text` (feature `checkpoint`): from text to text, chats by the model's own template
//! - `train` (feature `train`): training on Burn's `Learner`
//! - [`backend`]: the Burn backends behind features

#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod attention;
pub mod backend;
pub mod cache;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
pub mod config;
#[cfg(feature = "convert")]
pub mod convert;
pub mod cost;
pub mod decoder;
#[cfg(feature = "checkpoint")]
mod file;
pub mod flow;
pub mod generate;
mod holes;
mod kernels;
mod numbers;
mod parameters;
pub mod plan;
pub mod score;
#[cfg(feature = "checkpoint")]
pub mod text;
#[cfg(feature = "checkpoint")]
pub mod tokenizer;
pub mod tokens;
#[cfg(feature = "train")]
pub mod train;

pub use attention::{AttentionError, FusionForm, KvFusion, KvFusionConfig, fused_attention};
pub use cache::{CacheDtype, CacheError, FusedKvCache};
pub use config::{BlockConfig, ConfigError, FusedKvDecoderConfig, FusionInit, FusionStart};
pub use cost::DecoderCosts;
pub use decoder::{
    ForwardError, FusedKvDecoder, Logits, LoraConfig, LoraError, WeightError, WeightFormat,
};
pub use flow::{InformationFlow, information_flow};
pub use generate::{GenerateError, GeneratedToken, GenerationConfig, generate};
pub use plan::{BlendWeights, KvLayout, KvPart, KvPlan, KvShape, KvSource, LayerKv, PlanError};
pub use score::{Score, ScoreConfig, ScoreError, score, score_with};
pub use tokens::{TokenBatch, TokensError};
