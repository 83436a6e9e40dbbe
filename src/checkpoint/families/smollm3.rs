//! SmolLM3: layers without RoPE, which alone may have windows.

use super::windows::Windows;
use super::{Defaults, Format, LLAMA};
use crate::config::Family;

pub(super) const FORMAT: Format = Format {
    family: Family::SmolLm3,
    model_type: "smollm3",
    architecture: "SmolLM3ForCausalLM",
    windows: Windows::NoRopeLayers,
    defaults: Defaults {
        max_positions: 32768,
        rope_theta: 2e6,
        tie_embeddings: true,
        ..LLAMA.defaults
    },
    ..LLAMA
};
