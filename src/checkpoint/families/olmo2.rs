//! OLMo 2: norms after attention and feed-forward, and over all heads of queries and of keys.

use super::{Defaults, Format, LLAMA, Told};
use crate::config::{BlockConfig, Family, NormPlacement, QkNorm};

pub(super) const FORMAT: Format = Format {
    family: Family::Olmo2,
    model_type: "olmo2",
    architecture: "Olmo2ForCausalLM",
    block: || BlockConfig {
        norm_placement: NormPlacement::Post,
        qk_norm: QkNorm::AllHeads,
        ..BlockConfig::default()
    },
    mlp_bias: Told::Always(false),
    defaults: Defaults {
        rms_norm_eps: 1e-5,
        ..LLAMA.defaults
    },
    ..LLAMA
};
