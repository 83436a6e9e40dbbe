//! Attention over a learned blend by itself, for decoders other than this crate's.

use burn::tensor::{Tensor, backend::Backend};
use thiserror::Error;

use super::blend::KvFusion;
use super::{attend, terms};
use crate::kernels::operands::Visibility;
use crate::kernels::stored::Stored;
use crate::plan::KvPart;

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

/// Causal attention over keys and values that are blends of other layers': what a reconstructing
/// layer computes between its projections (arXiv 2512.03870). The last query stands at the last key.
///
/// The blend is not formed where that is slower: for few queries the weights go to the queries and
/// the output. Without `fusion` there is one source, and this is grouped-query attention.
///
/// # Shapes
/// - query, output: `[batch, n_heads, queries, head_dim]`
/// - keys, values: `[batch, n_kv_heads, keys, head_dim]` each, post-RoPE, in the order of the
///   fusion's weights
///
/// # Errors
/// [`AttentionError`] if there are no queries, rows, heads or channels, there is not one source per
/// weight, a shape differs, heads cannot be grouped, or there are more queries than keys.
///
/// ```
/// use burn::tensor::{Distribution, Tensor};
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::{BlendWeights, FusionInit, KvFusionConfig, KvShape, KvSource, fused_attention};
///
/// let device = FlexDevice::default();
/// let random = |heads, seq| {
///     Tensor::<Flex, 4>::random([1, heads, seq, 8], Distribution::Default, &device)
/// };
/// let blend = KvSource::Blend { sources: vec![0, 1], weights: BlendWeights::PerChannel };
/// let fusion = KvFusionConfig {
///     kv: KvShape { n_kv_heads: 2, head_dim: 8, rotary_dim: 8 },
///     key: blend.clone(),
///     value: blend,
///     init: FusionInit::equal(),
/// };
/// let fusion = fusion.init(&device).expect("blends have weights");
///
/// let (keys, values) = (vec![random(2, 5); 2], vec![random(2, 5); 2]);
/// let output = fused_attention(random(4, 1), keys, values, Some(&fusion))?;
/// assert_eq!(output.dims(), [1, 4, 1, 8]);
/// # Ok::<(), fusedkv::AttentionError>(())
/// ```
pub fn fused_attention<B: Backend>(
    query: Tensor<B, 4>,
    keys: Vec<Tensor<B, 4>>,
    values: Vec<Tensor<B, 4>>,
    fusion: Option<&KvFusion<B>>,
) -> Result<Tensor<B, 4>, AttentionError> {
    let key_weights = fusion.and_then(|fusion| fusion.weights(KvPart::Key));
    let value_weights = fusion.and_then(|fusion| fusion.weights(KvPart::Value));
    let [batch, n_heads, queries, head_dim] = query.dims();
    for (what, size) in [
        ("rows", batch),
        ("heads", n_heads),
        ("queries", queries),
        ("channels", head_dim),
    ] {
        if size == 0 {
            return Err(AttentionError::Empty { what });
        }
    }
    let Some([_, n_kv_heads, n_keys, _]) = keys.first().map(Tensor::dims) else {
        return Err(AttentionError::Sources {
            what: "keys",
            found: 0,
            expected: key_weights.map_or(1, |weights| weights.len()),
        });
    };
    let expected = [batch, n_kv_heads, n_keys, head_dim];
    for (what, sources, weights) in [
        ("keys", &keys, &key_weights),
        ("values", &values, &value_weights),
    ] {
        let n_weights = weights.as_ref().map_or(1, Vec::len);
        if sources.len() != n_weights {
            return Err(AttentionError::Sources {
                what,
                found: sources.len(),
                expected: n_weights,
            });
        }
        if let Some(found) = sources.iter().map(Tensor::dims).find(|d| *d != expected) {
            return Err(AttentionError::Shape {
                what,
                found,
                expected,
            });
        }
        let weights = weights.iter().flatten().map(Tensor::dims);
        let fits = |[_, heads, _, channels]: &[usize; 4]| {
            [*heads, *channels] == [1, 1] || [*heads, *channels] == [n_kv_heads, head_dim]
        };
        if let Some(found) = weights.into_iter().find(|dims| !fits(dims)) {
            return Err(AttentionError::Shape {
                what: "fusion weights",
                found,
                expected: [1, n_kv_heads, 1, head_dim],
            });
        }
    }
    if n_kv_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
        return Err(AttentionError::Heads {
            n_heads,
            n_kv_heads,
        });
    }
    if queries > n_keys {
        return Err(AttentionError::MoreQueriesThanKeys {
            queries,
            keys: n_keys,
        });
    }
    let stored = |sources: Vec<_>| sources.into_iter().map(Stored::Float).collect();
    let keys = terms(stored(keys), key_weights);
    let values = terms(stored(values), value_weights);
    let visibility = Visibility::causal();
    Ok(attend(None, query, keys, values, &visibility, None))
}
