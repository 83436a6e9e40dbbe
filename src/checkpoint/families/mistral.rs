//! Mistral: a window in every layer, or in none.

use super::windows::Windows;
use super::{Defaults, Format, LLAMA, Told};
use crate::config::Family;

pub(super) const FORMAT: Format = Format {
    family: Family::Mistral,
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    qkv_bias: Told::Always(false),
    output_bias: Told::Always(false),
    mlp_bias: Told::Always(false),
    windows: Windows::AllLayers(Some(4096)),
    defaults: Defaults {
        max_positions: 131_072,
        ..LLAMA.defaults
    },
    ..LLAMA
};
