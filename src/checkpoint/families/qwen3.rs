//! Qwen3: norms of queries and keys, head by head.

use super::windows::Windows;
use super::{Defaults, Format, HeadDim, LLAMA, Told};
use crate::config::{BlockConfig, Family};

pub(super) const FORMAT: Format = Format {
    family: Family::Qwen3,
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    block: BlockConfig::default,
    mlp_bias: Told::Always(false),
    windows: Windows::UpperLayers,
    head_dim: HeadDim::Of(128),
    defaults: Defaults {
        max_positions: 32768,
        ..LLAMA.defaults
    },
    ..LLAMA
};
