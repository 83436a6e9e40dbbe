//! Attention over blends of stored keys and values, in two forms that compute the same.
//!
//! With queries q, keys K = Σ_s a_s ⊙ K_s and values V = Σ_s b_s ⊙ V_s:
//! - *materialised*: form K and V, then ordinary attention;
//! - *absorbed*: q · K = Σ_s (q ⊙ a_s) · K_s and Σ_t p_t V_t = Σ_s b_s ⊙ Σ_t p_t V_st, so the
//!   weights move to the query and the output, and nothing of the sources' size is written.
//!
//! The blend costs as much as a few queries do, so the absorbed form is for few queries over a
//! long cache, the materialised one for many queries. Either way the scale is 1/√head_dim, and
//! scores, softmax and sums are f32 where the numbers are of less precision.

mod blend;
mod fused;

use burn::tensor::{DType, Tensor, backend::Backend};

pub use crate::kernels::operands::FusionForm;
use crate::kernels::operands::{Term, Visibility};
use crate::kernels::stored::Stored;
use crate::kernels::{self, blended};
#[cfg(feature = "convert")]
pub(crate) use blend::lite_source;
pub(crate) use blend::weights_per_source;
pub use blend::{KvFusion, KvFusionConfig};
pub use fused::{AttentionError, fused_attention};

/// Each source with its weight; `weights` is none where sources are taken as they are.
///
/// # Panics
/// If there is not one weight per source.
pub(crate) fn terms<B: Backend>(
    sources: Vec<Stored<B>>,
    weights: Option<Vec<Tensor<B, 4>>>,
) -> Vec<Term<B>> {
    let weights = match weights {
        Some(weights) => weights.into_iter().map(Some).collect(),
        None => vec![None; sources.len()],
    };
    assert_eq!(
        sources.len(),
        weights.len(),
        "a blend has a weight per source"
    );
    let terms = sources.into_iter().zip(weights);
    terms
        .map(|(source, weight)| Term { source, weight })
        .collect()
}

/// Attention of `query` `[batch, n_heads, queries, head_dim]` over blends of stored keys and
/// values; query head h uses kv head h / (n_heads / n_kv_heads). The output is shaped as the query.
///
/// Without a `form` it takes what is faster. Computed in f32 where the query is f16 or bf16. With a
/// `softcap` c, scores are c · tanh(score / c).
pub(crate) fn attend<B: Backend>(
    form: Option<FusionForm>,
    query: Tensor<B, 4>,
    keys: Vec<Term<B>>,
    values: Vec<Term<B>>,
    visibility: &Visibility<B>,
    softcap: Option<f64>,
) -> Tensor<B, 4> {
    let dtype = query.dtype();
    let wide = match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    };
    let query = query.cast(wide);
    let (keys, values) = (weights_cast(keys, wide), weights_cast(values, wide));
    let (keys, values) = match form {
        Some(FusionForm::Materialised) => blended(&query, keys, values),
        Some(FusionForm::Absorbed) | None => (keys, values),
    };
    kernels::attention(form, query, keys, values, visibility, softcap).cast(dtype)
}

/// Sources stay as they are stored: some kernels widen them as they read.
fn weights_cast<B: Backend>(terms: Vec<Term<B>>, dtype: DType) -> Vec<Term<B>> {
    let cast = |term: Term<B>| Term {
        weight: term.weight.map(|weight| weight.cast(dtype)),
        ..term
    };
    terms.into_iter().map(cast).collect()
}
