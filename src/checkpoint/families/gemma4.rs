//! Gemma 4's text model: norms on both sides, of queries and keys and (without a weight) of values,
//! which multiply with their weight as it is; wider heads and partial RoPE in layers with full
//! attention; upper layers that read lower ones' keys and values; an embedding for every layer.

use super::layers::LayerKeys;
use super::rope::RopeKeys;
use super::windows::Windows;
use super::{Format, gemma3};
use crate::config::{BlockConfig, Family};

pub(super) const FORMAT: Format = Format {
    family: Family::Gemma4Text,
    model_type: "gemma4_text",
    architecture: "Gemma4ForCausalLM",
    block: || BlockConfig {
        norm_unit_offset: false,
        value_norm: true,
        layer_scalar: true,
        attention_scale: Some(1.0),
        ..(gemma3::FORMAT.block)()
    },
    windows: Windows::AllButEvery {
        nth: 6,
        key: None,
        default: 512,
        last_is_full: true,
    },
    rope: RopeKeys::ByLayerType {
        sliding_theta: 1e4,
        rotated: Some(0.25),
    },
    query_scalar: None,
    layers: Some(LayerKeys {
        global_head_dim: 512,
        input_size: 256,
    }),
    ..gemma3::FORMAT
};
