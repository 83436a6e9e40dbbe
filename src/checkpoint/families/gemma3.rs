//! Gemma 3's text model: norms on both sides and of queries and keys, five layers of six with a
//! window and a RoPE of their own.

use super::rope::RopeKeys;
use super::windows::Windows;
use super::{Defaults, Format, gemma2};
use crate::config::{BlockConfig, Family, QkNorm};

pub(super) const FORMAT: Format = Format {
    family: Family::Gemma3Text,
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    block: || BlockConfig {
        qk_norm: QkNorm::PerHead,
        ..(gemma2::FORMAT.block)()
    },
    windows: Windows::AllButEvery {
        nth: 6,
        key: Some("sliding_window_pattern"),
        default: 4096,
        last_is_full: false,
    },
    rope: RopeKeys::ByLayerType {
        sliding_theta: 1e4,
        rotated: None,
    },
    // Its files have a soft cap of scores, which nothing applies.
    attention_softcap: None,
    logit_softcap: Some(None),
    defaults: Defaults {
        max_positions: 131_072,
        rope_theta: 1e6,
        ..gemma2::FORMAT.defaults
    },
    ..gemma2::FORMAT
};
