//! Qwen2 and 2.5: biases of queries, keys and values.

use super::windows::Windows;
use super::{Defaults, Format, LLAMA, Told};
use crate::config::Family;

pub(super) const FORMAT: Format = Format {
    family: Family::Qwen2,
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    qkv_bias: Told::Always(true),
    output_bias: Told::Always(false),
    mlp_bias: Told::Always(false),
    windows: Windows::UpperLayers,
    defaults: Defaults {
        max_positions: 32768,
        ..LLAMA.defaults
    },
    ..LLAMA
};
