//! What numbers a cache keeps.

use std::fmt;
use std::str::FromStr;

use burn::tensor::{DType, backend::Backend};
use serde::{Deserialize, Serialize};

use super::error::CacheError;

/// What numbers a cache keeps; attention computes in the decoder's own float type whatever it is.
///
/// The errors are of one stored number x, whatever the plan; docs/benchmarks.md has what they do to
/// a trained model's perplexity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CacheDtype {
    /// The decoder's float type: exact.
    #[default]
    Model,
    /// 4 bytes.
    F32,
    /// 2 bytes; an error of at most |x| · 2⁻¹¹ for |x| from 6.1e-5 to 65504, the largest.
    F16,
    /// 2 bytes; an error of at most |x| · 2⁻⁸.
    Bf16,
    /// 1 byte, and an f32 scale per token and head: an error of at most 1/254 of the head's largest
    /// magnitude at that token.
    Int8,
}

impl CacheDtype {
    /// Every type with its name, as in JSON and on command lines.
    pub const NAMES: &'static [(&'static str, Self)] = &[
        ("model", Self::Model),
        ("f32", Self::F32),
        ("f16", Self::F16),
        ("bf16", Self::Bf16),
        ("int8", Self::Int8),
    ];

    /// The type of the numbers kept for a decoder of floats `model`.
    fn numbers(self, model: DType) -> DType {
        match self {
            Self::Model => model,
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Int8 => DType::I8,
        }
    }

    /// That a backend whose decoders are of floats `model` can keep such numbers.
    pub(crate) fn check<B: Backend>(
        self,
        model: DType,
        device: &B::Device,
    ) -> Result<DType, CacheError> {
        let numbers = self.numbers(model);
        if B::supports_dtype(device, numbers) {
            return Ok(numbers);
        }
        Err(CacheError::UnsupportedDtype {
            dtype: self,
            backend: B::name(device),
        })
    }
}

impl fmt::Display for CacheDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Self::NAMES.iter().find(|(_, dtype)| dtype == self);
        f.pad(known.map_or("unnamed", |(name, _)| name))
    }
}

impl FromStr for CacheDtype {
    type Err = CacheError;

    fn from_str(name: &str) -> Result<Self, CacheError> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, dtype)| *dtype)
            .ok_or_else(|| CacheError::UnknownDtype(name.to_owned()))
    }
}
