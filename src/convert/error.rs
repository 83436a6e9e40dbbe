//! What keeps a decoder from being converted.

use thiserror::Error;

use crate::cache::CacheError;
use crate::config::ConfigError;
use crate::decoder::ForwardError;
use crate::score::ScoreError;
use crate::tokens::TokensError;

/// A conversion that cannot be done.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// Only a decoder whose layers all have keys and values of their own can be converted.
    #[error("the decoder's plan is `{method}`, expected `standard`")]
    NotStandard {
        /// Its plan's method.
        method: &'static str,
    },
    /// Adapters would stand beside projections that a conversion takes away or fits.
    #[error("the decoder has adapters, expected none: merge them first")]
    Adapted,
    /// The plan does not fit the decoder.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Windows of no tokens, or longer than the decoder can read.
    #[error("context is {context}, expected 1 to {max_positions}")]
    Context {
        /// Tokens per window.
        context: usize,
        /// What the decoder is configured for, less the one of a [`bos`](super::ConversionConfig::bos).
        max_positions: usize,
    },
    /// The decoder cannot read the calibration text.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The held-out text cannot be scored.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// A share of the cache, or a ridge, that makes no sense.
    #[error("{field} is {value}, expected {expected}")]
    Setting {
        /// The setting's name.
        field: &'static str,
        /// What it was.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
}

impl From<TokensError> for ConvertError {
    fn from(error: TokensError) -> Self {
        Self::Forward(error.into())
    }
}

impl From<CacheError> for ConvertError {
    fn from(error: CacheError) -> Self {
        Self::Forward(error.into())
    }
}
