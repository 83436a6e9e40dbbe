//! Gemma 2: norms on both sides, soft caps, every second layer with a window.

use super::windows::Windows;
use super::{Defaults, Format, HeadDim, LLAMA, Told};
use crate::config::{BlockConfig, Family, NormPlacement, QkNorm};

pub(super) const FORMAT: Format = Format {
    family: Family::Gemma2,
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    block: || BlockConfig {
        norm_placement: NormPlacement::Sandwich,
        norm_unit_offset: true,
        qk_norm: QkNorm::None,
        ..BlockConfig::default()
    },
    mlp_bias: Told::Always(false),
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    windows: Windows::AllButEvery {
        nth: 2,
        key: None,
        default: 4096,
        last_is_full: false,
    },
    head_dim: HeadDim::Of(256),
    query_scalar: Some(256.0),
    attention_softcap: Some(Some(50.0)),
    logit_softcap: Some(Some(30.0)),
    scales_embedding: true,
    defaults: Defaults {
        max_positions: 8192,
        tie_embeddings: true,
        ..LLAMA.defaults
    },
    ..LLAMA
};
