//! What a decoder cannot read.

use thiserror::Error;

use crate::cache::CacheError;
use crate::tokens::TokensError;

/// A forward pass that cannot be done. Nothing was computed, and a cache is left as it was.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// The tokens do not fit the decoder.
    #[error(transparent)]
    Tokens(#[from] TokensError),
    /// The cache does not fit the decoder or the tokens.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Positions beyond the RoPE table.
    #[error("row {row} would reach {positions} positions, max_positions is {max_positions}")]
    TooManyPositions {
        /// The row.
        row: usize,
        /// Positions after this pass.
        positions: usize,
        /// What the decoder was configured for.
        max_positions: usize,
    },
}
