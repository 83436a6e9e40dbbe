//! What attention is computed of.

use burn::tensor::{Bool, Tensor, backend::Backend};

use super::stored::Stored;

/// How attention treats a blend of sources; both give the same result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FusionForm {
    /// Blend keys and values first.
    Materialised,
    /// Move the weights to the query and the output.
    Absorbed,
}

/// A term of a blend.
#[derive(Clone, Debug)]
pub(crate) struct Term<B: Backend> {
    /// `[batch, n_kv_heads, keys, head_dim]`.
    pub source: Stored<B>,
    /// Broadcastable to the source; none is one.
    pub weight: Option<Tensor<B, 4>>,
}

impl<B: Backend> Term<B> {
    pub fn plain(source: Tensor<B, 4>) -> Self {
        Self {
            source: Stored::Float(source),
            weight: None,
        }
    }
}

/// Which keys each query may see.
#[derive(Clone, Debug)]
pub(crate) enum Visibility<B: Backend> {
    /// All of them.
    All,
    /// Those up to its own position; the last query stands at the last key.
    Causal,
    /// Those that are not `true` here, `[batch, 1, queries, keys]`.
    Except(Tensor<B, 4, Bool>),
}

impl<B: Backend> Visibility<B> {
    /// What the last query sees.
    pub fn last(self) -> Self {
        match self {
            Self::All | Self::Causal => Self::All,
            Self::Except(hidden) => {
                let [_, _, queries, _] = hidden.dims();
                Self::Except(hidden.narrow(2, queries - 1, 1))
            }
        }
    }
}
