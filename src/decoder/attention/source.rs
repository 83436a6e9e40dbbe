//! Where a layer's keys, or its values, come from: [`KvSource`] with the parameters that each takes.

use burn::module::Param;
use burn::tensor::{Tensor, backend::Backend};

use crate::attention::{terms, weights_per_source};
use crate::cache::KvStore;
use crate::decoder::norm::Norm;
use crate::decoder::projection::Projection;
use crate::kernels::operands::Term;
use crate::kernels::same_for_all_tokens;
use crate::plan::{BlendWeights, KvPart, KvShape, KvSource};

/// Keys or values as the plan has them for one layer; `O` is what makes those of its own,
/// [`OwnKeys`] or [`OwnValues`].
#[derive(Clone, Debug)]
pub(super) enum Source<B: Backend, O> {
    /// The layer's own, which it stores.
    Own {
        own: O,
        /// What is added to them before they are stored.
        added: Option<Added<B>>,
    },
    /// Those that a layer below has stored, as they are.
    AsIs(usize),
    /// A learned sum of stored ones.
    Blend {
        /// In a layer that is among its sources.
        own: Option<O>,
        /// The layers, in the order of their weights.
        sources: Vec<usize>,
        /// What shares one weight.
        shared: BlendWeights,
        /// `[sources, n_kv_heads, weights]` or `[sources, 1, 1]`.
        weights: Param<Tensor<B, 3>>,
    },
}

/// A lower layer's stored keys or values, times a learned scalar (YOCO++, arXiv 2604.13556).
#[derive(Clone, Debug)]
pub(super) struct Added<B: Backend> {
    pub lower: usize,
    /// α, `[1]`.
    pub alpha: Param<Tensor<B, 1>>,
}

/// What makes a layer's own keys.
#[derive(Clone, Debug)]
pub(super) struct OwnKeys<B: Backend> {
    /// `[hidden_size, n_kv_heads · head_dim]`.
    pub k_proj: Projection<B>,
    /// Before RoPE, over head_dim or all heads, in blocks that have it.
    pub k_norm: Option<Norm<B>>,
}

/// What makes a layer's own values.
#[derive(Clone, Debug)]
pub(super) enum OwnValues<B: Backend> {
    /// `v_proj`, `[hidden_size, n_kv_heads · head_dim]`.
    Projected(Projection<B>),
    /// `k_proj`, whose outputs are values in some families (Gemma 4), in a layer without keys of its own.
    AsKeys(Projection<B>),
    /// The outputs of the `k_proj` of the layer's own keys, which are both.
    WithKeys,
}

impl<B: Backend, O> Source<B, O> {
    /// # Panics
    /// If a parameter that the plan needs is not there.
    pub fn new(
        plan: &KvSource,
        own: Option<O>,
        alpha: Option<Param<Tensor<B, 1>>>,
        weights: Option<Param<Tensor<B, 3>>>,
    ) -> Self {
        match plan {
            KvSource::Own { residual } => Self::Own {
                own: needed(own, "a projection"),
                added: residual.map(|lower| Added {
                    lower,
                    alpha: needed(alpha, "kv_residual"),
                }),
            },
            KvSource::AsIs(source) => Self::AsIs(*source),
            KvSource::Blend {
                sources,
                weights: shared,
            } => Self::Blend {
                own,
                sources: sources.clone(),
                shared: *shared,
                weights: needed(weights, "kv_fusion"),
            },
        }
    }

    /// What the plan has it be.
    pub fn plan(&self) -> KvSource {
        match self {
            Self::Own { added, .. } => KvSource::Own {
                residual: added.as_ref().map(|added| added.lower),
            },
            Self::AsIs(source) => KvSource::AsIs(*source),
            Self::Blend {
                sources, shared, ..
            } => KvSource::Blend {
                sources: sources.clone(),
                weights: *shared,
            },
        }
    }

    /// What makes the layer's own, where it stores any.
    pub fn own(&self) -> Option<&O> {
        match self {
            Self::Own { own, .. } => Some(own),
            Self::AsIs(_) => None,
            Self::Blend { own, .. } => own.as_ref(),
        }
    }

    /// What the layer stores: its own, and what is added.
    ///
    /// # Shapes
    /// - own, output: `[batch, n_kv_heads, seq, head_dim]`
    pub fn with_added(
        &self,
        part: KvPart,
        own: Tensor<B, 4>,
        store: &impl KvStore<B>,
    ) -> Tensor<B, 4> {
        let Self::Own {
            added: Some(Added { lower, alpha }),
            ..
        } = self
        else {
            return own;
        };
        let [_, _, seq, _] = own.dims();
        let lower = store.get(part, *lower).tail(seq).float(own.dtype());
        own + same_for_all_tokens(alpha.val().unsqueeze(), lower.dims()) * lower
    }

    /// What the layer with number `index` reads of stored keys or values, each with its weight.
    pub fn terms(
        &self,
        part: KvPart,
        index: usize,
        kv: &KvShape,
        store: &impl KvStore<B>,
    ) -> Vec<Term<B>> {
        match self {
            Self::Own { .. } => terms(vec![store.get(part, index)], None),
            Self::AsIs(source) => terms(vec![store.get(part, *source)], None),
            Self::Blend {
                sources, weights, ..
            } => {
                let sources = sources.iter().map(|&source| store.get(part, source));
                let weights = weights_per_source(weights.val(), kv.shared_pairs(part));
                terms(sources.collect(), Some(weights))
            }
        }
    }
}

/// A parameter that the plan needs.
pub(super) fn needed<T>(parameter: Option<T>, name: &str) -> T {
    parameter.unwrap_or_else(|| panic!("an attention without `{name}`, which its plan needs"))
}
