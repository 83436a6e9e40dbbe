//! Generation that cannot start or go on.

use thiserror::Error;

use crate::cache::CacheError;
use crate::decoder::ForwardError;
use crate::tokens::TokensError;

/// A generation that cannot start or go on.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// A setting outside its range.
    #[error("{field} is {value}, expected {expected}")]
    Setting {
        /// The setting's name.
        field: &'static str,
        /// What it was.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// The model cannot read the prompt or what was generated.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// All of a prompt is in the cache already, so that there is nothing to draw the next token from.
    #[error("row {row} has {tokens} tokens, expected more than the {cached} that are cached")]
    NothingToRead {
        /// The prompt's row.
        row: usize,
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens of the row in the cache.
        cached: usize,
    },
    /// The model returned something no token can be drawn from. Ends this row alone.
    #[error("the logits of row {row} after {generated} generated tokens are not numbers")]
    NotANumber {
        /// The prompt's row.
        row: usize,
        /// Tokens generated so far.
        generated: usize,
    },
}

impl From<CacheError> for GenerateError {
    fn from(error: CacheError) -> Self {
        Self::Forward(error.into())
    }
}

impl From<TokensError> for GenerateError {
    fn from(error: TokensError) -> Self {
        Self::Forward(error.into())
    }
}
