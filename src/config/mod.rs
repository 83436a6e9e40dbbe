//! The decoder's configuration and presets.

mod block;
mod error;
mod layer;
mod rope;

use burn::config::Config;
use serde::{Deserialize, Serialize};

use crate::plan::{KvLayout, KvPlan};
pub use block::{Activation, BlockConfig, Family, NormPlacement, QkNorm};
pub use error::ConfigError;
use error::{positive, range};
pub use layer::{LayerKind, LayerSpec};
pub use rope::{RopeConfig, RopeScaling};

/// Shape of a decoder, what its layers compute, and the plan of its KV cache.
///
/// Plain data with a JSON form ([`Config::save`], [`Config::load`]); build the decoder with
/// [`init`](Self::init). [`new`](Self::new) starts at 6 layers × 128 with Qwen3's block; `with_…`
/// sets every size and the [block](BlockConfig).
///
/// ```
/// use fusedkv::{FusedKvDecoderConfig, KvPlan};
///
/// let config = FusedKvDecoderConfig::tiny(512, KvPlan::FusedKv { storage_layers: 3 });
/// assert!(config.validate().is_ok());
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct FusedKvDecoderConfig {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    #[config(default = 128)]
    pub hidden_size: usize,
    /// Number of layers, L.
    #[config(default = 6)]
    pub n_layers: usize,
    /// Number of query heads.
    #[config(default = 4)]
    pub n_heads: usize,
    /// Number of key/value heads; fewer than `n_heads` is grouped-query attention
    /// (arXiv 2305.13245).
    #[config(default = 4)]
    pub n_kv_heads: usize,
    /// Channels per head; even, because RoPE rotates pairs.
    #[config(default = 32)]
    pub head_dim: usize,
    /// Inner width of the feed-forward block.
    #[config(default = 352)]
    pub ffn_size: usize,
    /// Which layers store keys and values, and what the others read.
    pub plan: KvPlan,
    /// Base of the RoPE frequencies.
    #[config(default = 1e6)]
    pub rope_theta: f64,
    /// ε of every RMSNorm.
    #[config(default = 1e-6)]
    pub rms_norm_eps: f64,
    /// Use the embedding as the output head.
    #[config(default = true)]
    pub tie_embeddings: bool,
    /// Longest sequence, prompt and generated tokens together.
    #[config(default = 4096)]
    pub max_positions: usize,
    /// Dropout on the output of attention and feed-forward blocks while training.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Standard deviation of the initial embeddings and projections.
    #[config(default = 0.02)]
    pub init_std: f64,
    /// Where learned fusion weights start.
    #[config(default = "FusionInit::lite()")]
    pub fusion_init: FusionInit,
    /// What the layers compute, and where they differ from one another.
    #[config(default = "BlockConfig::default()")]
    pub block: BlockConfig,
}

/// Where the weights start with which a layer takes other layers' keys and values: those of a
/// [`KvSource::Blend`](crate::KvSource::Blend), and α of YOCO++. The papers do not say what they use.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FusionInit {
    /// The mean of a blend's weights.
    pub start: FusionStart,
    /// Standard deviation of normal noise around it; 0 is none.
    #[serde(default)]
    pub noise: f64,
    /// α of YOCO++; at 0 it starts as YOCO. Not written where it is 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub residual: f64,
}

impl Config for FusionInit {}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// The mean of the initial fusion weights.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum FusionStart {
    /// One on the highest source for keys and on the lowest for values, zero elsewhere: what
    /// FusedKV-Lite computes. In docs/results.md it ends at lower losses than [`Equal`](Self::Equal).
    Lite,
    /// The same weight on every source, summing to one: equal halves for FusedKV.
    Equal,
}

impl FusionInit {
    /// Start at a mean, without noise, and with α = 0.
    pub fn new(start: FusionStart) -> Self {
        Self {
            start,
            noise: 0.0,
            residual: 0.0,
        }
    }

    /// Sets the standard deviation of the noise.
    #[must_use]
    pub fn with_noise(self, noise: f64) -> Self {
        Self { noise, ..self }
    }

    /// Sets α of YOCO++.
    #[must_use]
    pub fn with_residual(self, residual: f64) -> Self {
        Self { residual, ..self }
    }

    /// Start where FusedKV-Lite is.
    pub fn lite() -> Self {
        Self::new(FusionStart::Lite)
    }

    /// Start at the mean of the sources.
    pub fn equal() -> Self {
        Self::new(FusionStart::Equal)
    }
}

impl FusedKvDecoderConfig {
    /// A decoder of 6 layers × 128 for tests and for training on a CPU in minutes.
    pub fn tiny(vocab_size: usize, plan: KvPlan) -> Self {
        Self::new(vocab_size, plan)
            .with_max_positions(1024)
            .with_rope_theta(1e4)
    }

    /// About 332 M parameters, the smallest size of the FusedKV paper.
    ///
    /// The paper gives sizes, not shapes. The shapes of this and the other presets are ours:
    /// Qwen3-like (GQA with two or four queries per kv head, tied head, 128 000 tokens, 8192
    /// positions), with standard and FusedKV counts both within 3 % of the size.
    pub fn b0_332(plan: impl FnOnce(usize) -> KvPlan) -> Self {
        Self::paper([1024, 16, 16, 8, 64, 3136], plan)
    }

    /// About 650 M parameters; see [`b0_332`](Self::b0_332).
    pub fn b0_65(plan: impl FnOnce(usize) -> KvPlan) -> Self {
        Self::paper([1280, 28, 20, 10, 64, 3328], plan)
    }

    /// About 1.5 B parameters; see [`b0_332`](Self::b0_332).
    pub fn b1_5(plan: impl FnOnce(usize) -> KvPlan) -> Self {
        Self::paper([2048, 24, 16, 8, 128, 6528], plan)
    }

    /// About 4 B parameters; see [`b0_332`](Self::b0_332).
    pub fn b4(plan: impl FnOnce(usize) -> KvPlan) -> Self {
        Self::paper([2560, 36, 32, 8, 128, 9984], plan)
    }

    fn paper(shape: [usize; 6], plan: impl FnOnce(usize) -> KvPlan) -> Self {
        let [hidden, layers, heads, kv_heads, head_dim, ffn] = shape;
        Self::new(128_000, plan(layers))
            .with_hidden_size(hidden)
            .with_n_layers(layers)
            .with_n_heads(heads)
            .with_n_kv_heads(kv_heads)
            .with_head_dim(head_dim)
            .with_ffn_size(ffn)
            .with_max_positions(8192)
    }

    /// Checks every field and resolves the plan.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first field that no decoder can be built with.
    pub fn validate(&self) -> Result<KvLayout, ConfigError> {
        for (field, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("n_layers", self.n_layers),
            ("n_heads", self.n_heads),
            ("n_kv_heads", self.n_kv_heads),
            ("head_dim", self.head_dim),
            ("ffn_size", self.ffn_size),
            ("max_positions", self.max_positions),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero { field });
            }
        }
        self.validate_heads(self.head_dim, self.n_kv_heads)?;
        positive("rope_theta", self.rope_theta)?;
        positive("rms_norm_eps", self.rms_norm_eps)?;
        let below_one = (0.0..1.0).contains(&self.dropout);
        range("dropout", self.dropout, below_one, "0 or more and below 1")?;
        let not_negative = |field, value| range(field, value, value >= 0.0, "0 or more");
        not_negative("init_std", self.init_std)?;
        not_negative("fusion_init.noise", self.fusion_init.noise)?;
        let residual = self.fusion_init.residual;
        range("fusion_init.residual", residual, true, "a number")?;
        self.block.validate()?;
        self.validate_kinds()?;
        let (_, kinds) = self.kinds();
        Ok(self.plan.resolve_kinds(&kinds)?)
    }
}
