//! The crate's errors: one enum per thing a caller can get wrong, each message naming what was
//! found and what was expected.

use thiserror::Error;

use crate::cache::CacheDtype;

/// A plan that no decoder can follow.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The name is none of [`KvPlan::METHODS`](crate::KvPlan::METHODS).
    #[error("unknown method `{0}`, expected one of {known}", known = crate::KvPlan::METHODS.join(", "))]
    UnknownMethod(String),
    /// A decoder needs a layer.
    #[error("the plan has no layers, expected at least 1")]
    NoLayers,
    /// A custom plan for another depth.
    #[error("the plan describes {plan} layers, the decoder has {n_layers}")]
    LayerCount {
        /// Layers in the plan.
        plan: usize,
        /// Layers in the decoder.
        n_layers: usize,
    },
    /// Too few or too many storing layers.
    #[error(
        "`{method}` with {storage_layers} storage layers in a decoder of {n_layers} layers, \
         expected at least {min} and fewer than {n_layers}"
    )]
    StorageLayers {
        /// The method asked for.
        method: &'static str,
        /// Storing layers asked for.
        storage_layers: usize,
        /// The fewest this method can work with.
        min: usize,
        /// Layers in the decoder.
        n_layers: usize,
    },
    /// A CLA factor of 0 or larger than the decoder.
    #[error("a CLA factor of {factor} in a decoder of {n_layers} layers, expected 1 to {n_layers}")]
    ClaFactor {
        /// The factor asked for.
        factor: usize,
        /// Layers in the decoder.
        n_layers: usize,
    },
    /// A mix without sources.
    #[error("layer {reader} has an empty mix, expected at least one source")]
    EmptyMix {
        /// The layer with the mix.
        reader: usize,
    },
    /// The same source twice in a mix.
    #[error("layer {reader} names source {layer} twice in one mix")]
    DuplicateSource {
        /// The layer with the mix.
        reader: usize,
        /// The source named twice.
        layer: usize,
    },
    /// A source at or above its reader.
    #[error("layer {reader} reads layer {layer}, expected a layer below it")]
    SourceNotBelow {
        /// The reading layer.
        reader: usize,
        /// What it reads.
        layer: usize,
    },
    /// A source that keeps no keys and values.
    #[error("layer {reader} reads layer {layer}, which does not store")]
    SourceDoesNotStore {
        /// The reading layer.
        reader: usize,
        /// What it reads.
        layer: usize,
    },
}

/// A configuration no decoder can be built from.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The plan does not fit.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A size of 0.
    #[error("{field} is 0, expected at least 1")]
    Zero {
        /// The field's name.
        field: &'static str,
    },
    /// Query heads that cannot be shared out evenly.
    #[error("n_heads is {n_heads}, expected a multiple of n_kv_heads ({n_kv_heads})")]
    HeadGroups {
        /// Query heads.
        n_heads: usize,
        /// Key/value heads.
        n_kv_heads: usize,
    },
    /// RoPE rotates pairs of channels.
    #[error("head_dim is {0}, expected an even number")]
    OddHeadDim(usize),
    /// A number outside its range.
    #[error("{field} is {value}, expected {expected}")]
    Range {
        /// The field's name.
        field: &'static str,
        /// What it was.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
}

/// Tokens no decoder can read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TokensError {
    /// A batch without rows.
    #[error("the batch has no rows, expected at least 1")]
    NoRows,
    /// A row without tokens.
    #[error("row {row} has no tokens, expected at least 1")]
    EmptyRow {
        /// The row.
        row: usize,
    },
    /// One padding length per row is needed.
    #[error("{found} padding lengths for {rows} rows")]
    PaddingRows {
        /// Padding lengths given.
        found: usize,
        /// Rows in the batch.
        rows: usize,
    },
    /// A token the vocabulary does not have.
    #[error("token {token} at row {row}, position {position}, expected below {vocab_size}")]
    OutOfVocabulary {
        /// The row.
        row: usize,
        /// Position within the row.
        position: usize,
        /// The token id.
        token: u32,
        /// The vocabulary's size.
        vocab_size: usize,
    },
}

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
    /// The name is none of [`CacheDtype::NAMES`](crate::CacheDtype::NAMES).
    #[error(
        "unknown cache dtype `{0}`, expected one of {known}",
        known = CacheDtype::NAMES.map(|(name, _)| name).join(", ")
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
}

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

/// Attention over tensors that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AttentionError {
    /// Nothing to attend with.
    #[error("a query without {what}, expected at least 1")]
    Empty {
        /// Rows, heads, queries or channels.
        what: &'static str,
    },
    /// Not one tensor per weight.
    #[error(
        "{found} sources of {what}, expected {expected}: one per weight, or one without weights"
    )]
    Sources {
        /// Keys or values.
        what: &'static str,
        /// Tensors given.
        found: usize,
        /// Tensors needed.
        expected: usize,
    },
    /// A tensor of another shape.
    #[error("{what} of shape {found:?}, expected {expected:?}")]
    Shape {
        /// Keys, values or weights.
        what: &'static str,
        /// Its shape.
        found: [usize; 4],
        /// The shape that fits the others.
        expected: [usize; 4],
    },
    /// Query heads that cannot be shared out among key/value heads.
    #[error("{n_heads} query heads, expected a multiple of {n_kv_heads} key/value heads")]
    Heads {
        /// Query heads.
        n_heads: usize,
        /// Key/value heads.
        n_kv_heads: usize,
    },
    /// The last query stands at the last key, so the first would stand before the first.
    #[error("{queries} queries for {keys} keys, expected no more queries than keys")]
    MoreQueriesThanKeys {
        /// Queries.
        queries: usize,
        /// Keys.
        keys: usize,
    },
}

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

/// A text that cannot be scored.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// A setting outside its range.
    #[error("{field} is {value}, expected 1 to {largest}")]
    Setting {
        /// The setting's name.
        field: &'static str,
        /// What it was.
        value: usize,
        /// The most it may be.
        largest: usize,
    },
    /// The first token has nothing to be predicted from.
    #[error("{0} tokens to score, expected at least 2")]
    TooFewTokens(usize),
    /// The decoder cannot read the text.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

impl From<CacheError> for ScoreError {
    fn from(error: CacheError) -> Self {
        Self::Forward(error.into())
    }
}

impl From<TokensError> for ScoreError {
    fn from(error: TokensError) -> Self {
        Self::Forward(error.into())
    }
}
