//! What is known of architectures: the family each is in Hugging Face's library, and what its
//! tensors are called there.
//!
//! Names, shapes and the changes to undo: llama.cpp's `convert_hf_to_gguf.py` and `conversion/`.

use Change::{Interleaved, PlusOne};
use Needed::{AttentionBias, MlpBias, Untied};
use Size::{Ffn, GateUp, HeadDim, Hidden, Kv, Q, Qkv, Vocab};

/// An architecture of GGUF's.
#[derive(Debug)]
pub(super) struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    pub family: Family,
    /// Its tensors: some come once, most once a layer.
    pub tensors: &'static [&'static [Row]],
}

/// A family of Hugging Face's library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma2,
    Gemma3,
    Phi3,
    SmolLm3,
    Olmo2,
}

impl Family {
    /// `model_type` and the class of `architectures` in config.json.
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Llama => ("llama", "LlamaForCausalLM"),
            Self::Mistral => ("mistral", "MistralForCausalLM"),
            Self::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Self::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
            Self::Gemma2 => ("gemma2", "Gemma2ForCausalLM"),
            Self::Gemma3 => ("gemma3_text", "Gemma3ForCausalLM"),
            Self::Phi3 => ("phi3", "Phi3ForCausalLM"),
            Self::SmolLm3 => ("smollm3", "SmolLM3ForCausalLM"),
            Self::Olmo2 => ("olmo2", "Olmo2ForCausalLM"),
        }
    }
}

/// A tensor of GGUF's and what it is in Hugging Face's files. `{}` is a layer's number.
#[derive(Debug)]
pub(super) struct Row {
    pub gguf: &'static str,
    pub hf: &'static str,
    /// Outermost dimension first.
    pub shape: &'static [Size],
    pub change: Change,
    pub needed: Needed,
}

/// A dimension.
#[derive(Clone, Copy, Debug)]
pub(super) enum Size {
    Vocab,
    Hidden,
    Ffn,
    /// The feed-forward network's gate and its other half.
    GateUp,
    HeadDim,
    /// All heads of queries.
    Q,
    /// All heads of keys, or of values.
    Kv,
    /// Queries, keys and values.
    Qkv,
}

/// What llama.cpp's converter did to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    /// Rows j and j + head_dim/2 of a head stand side by side.
    Interleaved,
    /// 1 was added, because Gemma's norms multiply by 1 + weight.
    PlusOne,
}

/// When a tensor must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needed {
    Always,
    /// Without it the head is the embedding.
    Untied,
    /// Together with the others of its kind, or none.
    AttentionBias,
    /// Together with the others of its kind, or none.
    MlpBias,
}

const fn row(gguf: &'static str, hf: &'static str, shape: &'static [Size]) -> Row {
    Row {
        gguf,
        hf,
        shape,
        change: Change::None,
        needed: Needed::Always,
    }
}

impl Row {
    const fn changed(self, change: Change) -> Self {
        Self { change, ..self }
    }

    const fn needed(self, needed: Needed) -> Self {
        Self { needed, ..self }
    }
}

static EMBEDDING: [Row; 2] = [
    row(
        "token_embd.weight",
        "model.embed_tokens.weight",
        &[Vocab, Hidden],
    ),
    row("output.weight", "lm_head.weight", &[Vocab, Hidden]).needed(Untied),
];

static LAST_NORM: [Row; 1] = [row("output_norm.weight", "model.norm.weight", &[Hidden])];

static LAST_NORM_PLUS_ONE: [Row; 1] =
    [row("output_norm.weight", "model.norm.weight", &[Hidden]).changed(PlusOne)];

static PRE_NORMS: [Row; 2] = [
    row(
        "blk.{}.attn_norm.weight",
        "model.layers.{}.input_layernorm.weight",
        &[Hidden],
    ),
    row(
        "blk.{}.ffn_norm.weight",
        "model.layers.{}.post_attention_layernorm.weight",
        &[Hidden],
    ),
];

static POST_NORMS: [Row; 2] = [
    row(
        "blk.{}.post_attention_norm.weight",
        "model.layers.{}.post_attention_layernorm.weight",
        &[Hidden],
    ),
    row(
        "blk.{}.post_ffw_norm.weight",
        "model.layers.{}.post_feedforward_layernorm.weight",
        &[Hidden],
    ),
];

static SANDWICH_NORMS_PLUS_ONE: [Row; 4] = [
    row(
        "blk.{}.attn_norm.weight",
        "model.layers.{}.input_layernorm.weight",
        &[Hidden],
    )
    .changed(PlusOne),
    row(
        "blk.{}.post_attention_norm.weight",
        "model.layers.{}.post_attention_layernorm.weight",
        &[Hidden],
    )
    .changed(PlusOne),
    row(
        "blk.{}.ffn_norm.weight",
        "model.layers.{}.pre_feedforward_layernorm.weight",
        &[Hidden],
    )
    .changed(PlusOne),
    row(
        "blk.{}.post_ffw_norm.weight",
        "model.layers.{}.post_feedforward_layernorm.weight",
        &[Hidden],
    )
    .changed(PlusOne),
];

static QK_NORMS: [Row; 2] = [
    row(
        "blk.{}.attn_q_norm.weight",
        "model.layers.{}.self_attn.q_norm.weight",
        &[HeadDim],
    ),
    row(
        "blk.{}.attn_k_norm.weight",
        "model.layers.{}.self_attn.k_norm.weight",
        &[HeadDim],
    ),
];

static QK_NORMS_PLUS_ONE: [Row; 2] = [
    row(
        "blk.{}.attn_q_norm.weight",
        "model.layers.{}.self_attn.q_norm.weight",
        &[HeadDim],
    )
    .changed(PlusOne),
    row(
        "blk.{}.attn_k_norm.weight",
        "model.layers.{}.self_attn.k_norm.weight",
        &[HeadDim],
    )
    .changed(PlusOne),
];

static QK_NORMS_OF_ALL_HEADS: [Row; 2] = [
    row(
        "blk.{}.attn_q_norm.weight",
        "model.layers.{}.self_attn.q_norm.weight",
        &[Q],
    ),
    row(
        "blk.{}.attn_k_norm.weight",
        "model.layers.{}.self_attn.k_norm.weight",
        &[Kv],
    ),
];

static ATTENTION: [Row; 4] = [
    row(
        "blk.{}.attn_q.weight",
        "model.layers.{}.self_attn.q_proj.weight",
        &[Q, Hidden],
    ),
    row(
        "blk.{}.attn_k.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        &[Kv, Hidden],
    ),
    row(
        "blk.{}.attn_v.weight",
        "model.layers.{}.self_attn.v_proj.weight",
        &[Kv, Hidden],
    ),
    row(
        "blk.{}.attn_output.weight",
        "model.layers.{}.self_attn.o_proj.weight",
        &[Hidden, Q],
    ),
];

static ATTENTION_INTERLEAVED: [Row; 4] = [
    row(
        "blk.{}.attn_q.weight",
        "model.layers.{}.self_attn.q_proj.weight",
        &[Q, Hidden],
    )
    .changed(Interleaved),
    row(
        "blk.{}.attn_k.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        &[Kv, Hidden],
    )
    .changed(Interleaved),
    row(
        "blk.{}.attn_v.weight",
        "model.layers.{}.self_attn.v_proj.weight",
        &[Kv, Hidden],
    ),
    row(
        "blk.{}.attn_output.weight",
        "model.layers.{}.self_attn.o_proj.weight",
        &[Hidden, Q],
    ),
];

static ATTENTION_FUSED: [Row; 2] = [
    row(
        "blk.{}.attn_qkv.weight",
        "model.layers.{}.self_attn.qkv_proj.weight",
        &[Qkv, Hidden],
    ),
    row(
        "blk.{}.attn_output.weight",
        "model.layers.{}.self_attn.o_proj.weight",
        &[Hidden, Q],
    ),
];

static QKV_BIASES: [Row; 3] = [
    row(
        "blk.{}.attn_q.bias",
        "model.layers.{}.self_attn.q_proj.bias",
        &[Q],
    ),
    row(
        "blk.{}.attn_k.bias",
        "model.layers.{}.self_attn.k_proj.bias",
        &[Kv],
    ),
    row(
        "blk.{}.attn_v.bias",
        "model.layers.{}.self_attn.v_proj.bias",
        &[Kv],
    ),
];

static ATTENTION_BIASES: [Row; 4] = [
    row(
        "blk.{}.attn_q.bias",
        "model.layers.{}.self_attn.q_proj.bias",
        &[Q],
    )
    .needed(AttentionBias),
    row(
        "blk.{}.attn_k.bias",
        "model.layers.{}.self_attn.k_proj.bias",
        &[Kv],
    )
    .needed(AttentionBias),
    row(
        "blk.{}.attn_v.bias",
        "model.layers.{}.self_attn.v_proj.bias",
        &[Kv],
    )
    .needed(AttentionBias),
    row(
        "blk.{}.attn_output.bias",
        "model.layers.{}.self_attn.o_proj.bias",
        &[Hidden],
    )
    .needed(AttentionBias),
];

static ATTENTION_BIASES_INTERLEAVED: [Row; 4] = [
    row(
        "blk.{}.attn_q.bias",
        "model.layers.{}.self_attn.q_proj.bias",
        &[Q],
    )
    .needed(AttentionBias)
    .changed(Interleaved),
    row(
        "blk.{}.attn_k.bias",
        "model.layers.{}.self_attn.k_proj.bias",
        &[Kv],
    )
    .needed(AttentionBias)
    .changed(Interleaved),
    row(
        "blk.{}.attn_v.bias",
        "model.layers.{}.self_attn.v_proj.bias",
        &[Kv],
    )
    .needed(AttentionBias),
    row(
        "blk.{}.attn_output.bias",
        "model.layers.{}.self_attn.o_proj.bias",
        &[Hidden],
    )
    .needed(AttentionBias),
];

static MLP: [Row; 3] = [
    row(
        "blk.{}.ffn_gate.weight",
        "model.layers.{}.mlp.gate_proj.weight",
        &[Ffn, Hidden],
    ),
    row(
        "blk.{}.ffn_up.weight",
        "model.layers.{}.mlp.up_proj.weight",
        &[Ffn, Hidden],
    ),
    row(
        "blk.{}.ffn_down.weight",
        "model.layers.{}.mlp.down_proj.weight",
        &[Hidden, Ffn],
    ),
];

static MLP_FUSED: [Row; 2] = [
    row(
        "blk.{}.ffn_up.weight",
        "model.layers.{}.mlp.gate_up_proj.weight",
        &[GateUp, Hidden],
    ),
    row(
        "blk.{}.ffn_down.weight",
        "model.layers.{}.mlp.down_proj.weight",
        &[Hidden, Ffn],
    ),
];

static MLP_BIASES: [Row; 3] = [
    row(
        "blk.{}.ffn_gate.bias",
        "model.layers.{}.mlp.gate_proj.bias",
        &[Ffn],
    )
    .needed(MlpBias),
    row(
        "blk.{}.ffn_up.bias",
        "model.layers.{}.mlp.up_proj.bias",
        &[Ffn],
    )
    .needed(MlpBias),
    row(
        "blk.{}.ffn_down.bias",
        "model.layers.{}.mlp.down_proj.bias",
        &[Hidden],
    )
    .needed(MlpBias),
];

/// The architectures that can be imported. Mistral's models are of architecture `llama`.
pub(super) static ARCHITECTURES: [Architecture; 8] = [
    Architecture {
        name: "llama",
        family: Family::Llama,
        tensors: &[
            &EMBEDDING,
            &PRE_NORMS,
            &ATTENTION_INTERLEAVED,
            &ATTENTION_BIASES_INTERLEAVED,
            &MLP,
            &MLP_BIASES,
            &LAST_NORM,
        ],
    },
    Architecture {
        name: "qwen2",
        family: Family::Qwen2,
        tensors: &[
            &EMBEDDING,
            &PRE_NORMS,
            &ATTENTION,
            &QKV_BIASES,
            &MLP,
            &LAST_NORM,
        ],
    },
    Architecture {
        name: "qwen3",
        family: Family::Qwen3,
        tensors: &[
            &EMBEDDING,
            &PRE_NORMS,
            &ATTENTION,
            &ATTENTION_BIASES,
            &QK_NORMS,
            &MLP,
            &LAST_NORM,
        ],
    },
    Architecture {
        name: "gemma2",
        family: Family::Gemma2,
        tensors: &[
            &EMBEDDING,
            &SANDWICH_NORMS_PLUS_ONE,
            &ATTENTION,
            &MLP,
            &LAST_NORM_PLUS_ONE,
        ],
    },
    Architecture {
        name: "gemma3",
        family: Family::Gemma3,
        tensors: &[
            &EMBEDDING,
            &SANDWICH_NORMS_PLUS_ONE,
            &ATTENTION,
            &QK_NORMS_PLUS_ONE,
            &MLP,
            &LAST_NORM_PLUS_ONE,
        ],
    },
    Architecture {
        name: "phi3",
        family: Family::Phi3,
        tensors: &[
            &EMBEDDING,
            &PRE_NORMS,
            &ATTENTION_FUSED,
            &MLP_FUSED,
            &LAST_NORM,
        ],
    },
    Architecture {
        name: "smollm3",
        family: Family::SmolLm3,
        tensors: &[
            &EMBEDDING,
            &PRE_NORMS,
            &ATTENTION_INTERLEAVED,
            &ATTENTION_BIASES_INTERLEAVED,
            &MLP,
            &MLP_BIASES,
            &LAST_NORM,
        ],
    },
    Architecture {
        name: "olmo2",
        family: Family::Olmo2,
        tensors: &[
            &EMBEDDING,
            &POST_NORMS,
            &ATTENTION,
            &ATTENTION_BIASES,
            &QK_NORMS_OF_ALL_HEADS,
            &MLP,
            &LAST_NORM,
        ],
    },
];

/// Tensors that say how positions are rotated, which config.json has as numbers.
pub(super) const ROPE_FREQUENCIES: &str = "rope_freqs.weight";
pub(super) const ROPE_LONG: &str = "rope_factors_long.weight";
pub(super) const ROPE_SHORT: &str = "rope_factors_short.weight";
