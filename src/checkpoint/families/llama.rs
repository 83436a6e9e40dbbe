//! Llama 2 and 3, SmolLM2, TinyLlama.

use super::{Format, LLAMA};

pub(super) const FORMAT: Format = LLAMA;
