//! Phi-3 and Phi-4-mini: projections in one tensor, RoPE of some channels, LongRoPE.

use super::rope::RopeKeys;
use super::windows::Windows;
use super::{Defaults, Format, LLAMA, Told};
use crate::config::Family;

pub(super) const FORMAT: Format = Format {
    family: Family::Phi3,
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    qkv_bias: Told::Always(false),
    output_bias: Told::Always(false),
    mlp_bias: Told::Always(false),
    windows: Windows::AllLayers(None),
    rope: RopeKeys::Phi3,
    fused_projections: true,
    defaults: Defaults {
        max_positions: 4096,
        rms_norm_eps: 1e-5,
        ..LLAMA.defaults
    },
    ..LLAMA
};
