//! What a layer's block computes, as data: everything in which model families differ.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::{ConfigError, positive};
use super::layer::{LayerKind, is_false};
use super::rope::RopeScaling;

/// What the layers of a decoder compute, beyond its sizes. The default is Qwen3's: RMSNorm before
/// attention and feed-forward, RMSNorm on every head of q and k, SwiGLU, RoPE, no biases.
///
/// ```
/// use fusedkv::config::{BlockConfig, NormPlacement, QkNorm};
/// use fusedkv::{FusedKvDecoderConfig, KvPlan};
///
/// // OLMo 2's block.
/// let mut block = BlockConfig::default();
/// block.norm_placement = NormPlacement::Post;
/// block.qk_norm = QkNorm::AllHeads;
/// let config = FusedKvDecoderConfig::tiny(512, KvPlan::Standard).with_block(block);
/// assert!(config.validate().is_ok());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct BlockConfig {
    /// The family whose keys and tensor names files have.
    pub family: Family,
    /// Where the norms stand.
    pub norm_placement: NormPlacement,
    /// Whether a norm multiplies with 1 + its weight (Gemma) instead of the weight.
    pub norm_unit_offset: bool,
    /// RMSNorm of queries and keys, before RoPE.
    pub qk_norm: QkNorm,
    /// Whether the projections of queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the projections of the feed-forward block have biases.
    pub mlp_bias: bool,
    /// The gate's function in the feed-forward block.
    pub activation: Activation,
    /// What embeddings are multiplied with; none: 1.
    pub embedding_scale: Option<f64>,
    /// What q · k is multiplied with; none: 1/√head_dim.
    pub attention_scale: Option<f64>,
    /// c of c · tanh(score / c), on scaled scores (Gemma 2); none: scores as they are.
    pub attention_softcap: Option<f64>,
    /// c of c · tanh(logit / c); none: logits as they are.
    pub logit_softcap: Option<f64>,
    /// How RoPE's frequencies are changed for longer texts, in layers that
    /// [`layers`](Self::layers) says nothing of.
    pub rope_scaling: RopeScaling,
    /// Channels of a head that RoPE rotates, the first ones, in such layers; none: all.
    pub rotary_dim: Option<usize>,
    /// Window, RoPE and widths of each layer, bottom first; empty: full attention with RoPE and the
    /// decoder's widths in all.
    pub layers: Vec<LayerKind>,
    /// Inner width of each layer's feed-forward block, bottom first; empty: the decoder's in all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ffn_sizes: Vec<usize>,
    /// RMSNorm of every head's values, without a weight (Gemma 4).
    #[serde(skip_serializing_if = "is_false")]
    pub value_norm: bool,
    /// Width P of what every layer is given of the tokens themselves, beside the residual stream; none:
    /// nothing. In layer i, behind the feed-forward block,
    /// `x + norm(down(f(gate(x)) ⊙ (norm(W_i x_0 / √hidden_size) + √P · t_i) / √2))`, where f is the
    /// activation, x_0 the scaled embedding and t an embedding of the token for each layer (Gemma 3n
    /// and 4).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_input_size: Option<usize>,
    /// Whether a layer's output is multiplied with a learned scalar (Gemma 4).
    #[serde(skip_serializing_if = "is_false")]
    pub layer_scalar: bool,
}

/// Families of models that files are of. They differ in what their files call things, and in the
/// block those files describe; the decoder knows the block alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Family {
    /// Qwen3 (arXiv 2505.09388).
    #[default]
    Qwen3,
    /// Llama 2 and 3 (arXiv 2307.09288, 2407.21783), SmolLM2, TinyLlama and others of that block.
    Llama,
    /// Mistral (arXiv 2310.06825).
    Mistral,
    /// Qwen2 and 2.5 (arXiv 2407.10671).
    Qwen2,
    /// SmolLM3.
    #[serde(rename = "smollm3")]
    SmolLm3,
    /// OLMo 2 (arXiv 2501.00656).
    Olmo2,
    /// Phi-3 and Phi-4-mini (arXiv 2404.14219).
    Phi3,
    /// Gemma 2 (arXiv 2408.00118).
    Gemma2,
    /// Gemma 3, text alone (arXiv 2503.19786).
    #[serde(rename = "gemma3_text")]
    Gemma3Text,
    /// Gemma 4, text alone.
    #[serde(rename = "gemma4_text")]
    Gemma4Text,
}

/// Where a layer's norms stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NormPlacement {
    /// x + f(norm(x)), for f attention and feed-forward.
    #[default]
    Pre,
    /// x + norm(f(norm(x))).
    Sandwich,
    /// x + norm(f(x)).
    Post,
}

impl NormPlacement {
    /// Whether attention and feed-forward read through a norm.
    pub(crate) fn is_before(self) -> bool {
        matches!(self, Self::Pre | Self::Sandwich)
    }

    /// Whether their outputs go through one.
    pub(crate) fn is_after(self) -> bool {
        matches!(self, Self::Sandwich | Self::Post)
    }
}

/// What RMSNorm of queries and keys goes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum QkNorm {
    /// There is none.
    None,
    /// The channels of each head.
    #[default]
    PerHead,
    /// The channels of all heads together.
    AllHeads,
}

/// The function f of the feed-forward block `down(f(gate(x)) ⊙ up(x))` (arXiv 2002.05202).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// x · σ(x): SwiGLU.
    #[default]
    Silu,
    /// x · Φ(x): GeGLU.
    Gelu,
    /// GELU by its approximation with tanh.
    GeluTanh,
}

impl BlockConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        for (field, value) in [
            ("block.embedding_scale", self.embedding_scale),
            ("block.attention_scale", self.attention_scale),
            ("block.attention_softcap", self.attention_softcap),
            ("block.logit_softcap", self.logit_softcap),
        ] {
            if let Some(value) = value {
                positive(field, value)?;
            }
        }
        match self.layer_input_size {
            Some(0) => Err(ConfigError::Zero {
                field: "block.layer_input_size",
            }),
            _ => Ok(()),
        }
    }
}

/// Qwen3's is null: configurations written before there were others say nothing, and are the same.
impl Serialize for BlockConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self == Self::default() {
            true => serializer.serialize_none(),
            // The derived function, which is called the same.
            false => Self::serialize(self, serializer),
        }
    }
}

/// What is not said, the block itself included, is Qwen3's.
impl<'de> Deserialize<'de> for BlockConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Said(#[serde(deserialize_with = "BlockConfig::deserialize")] BlockConfig);

        let said = Option::<Said>::deserialize(deserializer)?;
        Ok(said.map_or_else(Self::default, |Said(block)| block))
    }
}
