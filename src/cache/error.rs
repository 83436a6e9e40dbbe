//! What a cache cannot do.

use thiserror::Error;

use super::dtype::CacheDtype;

/// A cache that cannot do what was asked. The cache is left as it was.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CacheError {
    /// A cache for no rows or no tokens.
    #[error("the cache's {field} is 0, expected at least 1")]
    Zero {
        /// `batch` or `capacity`.
        field: &'static str,
    },
    /// More bytes than can be addressed.
    #[error(
        "a cache of {batch} rows of {capacity} tokens, expected at most {} bytes in all",
        isize::MAX
    )]
    TooLarge {
        /// Rows asked for.
        batch: usize,
        /// Tokens per row asked for.
        capacity: usize,
    },
    /// The name is none of [`CacheDtype::NAMES`].
    #[error(
        "unknown cache dtype `{0}`, expected one of {known}",
        known = CacheDtype::NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    )]
    UnknownDtype(String),
    /// Numbers that the backend cannot keep.
    #[error("a cache of {dtype:?} on the backend {backend}, which has no such numbers")]
    UnsupportedDtype {
        /// What was asked for.
        dtype: CacheDtype,
        /// The backend.
        backend: String,
    },
    /// A decoder that tracks gradients: every token cached would keep the graph of all before it.
    #[error(
        "a cache on the backend {backend}, which tracks gradients, expected the model's `.valid()`"
    )]
    Autodiff {
        /// The backend.
        backend: String,
    },
    /// More tokens than fit.
    #[error("{requested} more tokens in a cache that holds {len} of {capacity}")]
    OverCapacity {
        /// Tokens to append per row.
        requested: usize,
        /// Slots in use per row.
        len: usize,
        /// Slots allocated per row.
        capacity: usize,
    },
    /// Tokens for another number of rows.
    #[error("{found} rows for a cache of {expected}")]
    BatchMismatch {
        /// Rows given.
        found: usize,
        /// Rows of the cache.
        expected: usize,
    },
    /// The cache was made for a decoder with another plan or other head sizes.
    #[error("the cache was made for {cache}, the decoder has {decoder}")]
    PlanMismatch {
        /// What the cache holds.
        cache: String,
        /// What the decoder needs.
        decoder: String,
    },
    /// A row the cache does not have.
    #[error("row {row} of a cache of {batch} rows")]
    NoSuchRow {
        /// The row asked for.
        row: usize,
        /// Rows of the cache.
        batch: usize,
    },
    /// Truncation to more than there is.
    #[error("truncation to {requested} tokens where {len} are cached")]
    TruncateBeyondLength {
        /// Tokens to keep.
        requested: usize,
        /// Tokens there are.
        len: usize,
    },
    /// Truncation to where a layer with a sliding window has forgotten what comes before.
    #[error(
        "truncation to {requested} slots, where the next token would see slots from {needed} on and \
         a layer with a sliding window has those from {first} on, expected to take back fewer"
    )]
    Forgotten {
        /// Slots to keep.
        requested: usize,
        /// The first slot the next token would see.
        needed: usize,
        /// The first slot there is.
        first: usize,
    },
}
