//! Attention by Burn's operations alone: what every kernel of our own must compute.

use burn::tensor::activation::softmax;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, DType, Tensor, backend::Backend};

use super::matmul;
use super::operands::{FusionForm, Term, Visibility};

/// Queries per kv head from which a blend costs less than twice the products.
const MANY: usize = 16;

/// Attention of `query` `[batch, n_heads, queries, head_dim]` over blends of stored keys and values;
/// without a `form` in the one that is faster.
pub(crate) fn generic_attention<B: Backend>(
    form: Option<FusionForm>,
    query: Tensor<B, 4>,
    keys: Vec<Term<B>>,
    values: Vec<Term<B>>,
    visibility: &Visibility<B>,
    softcap: Option<f64>,
) -> Tensor<B, 4> {
    let dtype = query.dtype();
    let [_, n_heads, n_queries, _] = query.dims();
    let [_, n_kv_heads, n_keys, _] = keys[0].source.dims();
    let many = n_queries * n_heads >= MANY * n_kv_heads;
    let (keys, values) = match form {
        None if many => blended(&query, keys, values),
        _ => (keys, values),
    };
    match (&keys[..], &values[..]) {
        // Burn's `attention` has fused kernels on some backends; it knows neither blends nor
        // grouped queries nor windows, its causal mask is for as many keys as queries, and on CubeCL
        // it reads a mask that all heads share as if each had its own (tracel-ai/burn#4778).
        ([Term { weight: None, .. }], [Term { weight: None, .. }])
            if n_queries == n_keys && visibility.seen.is_causal(n_keys) && softcap.is_none() =>
        {
            whole(query, blend(keys, dtype), blend(values, dtype))
        }
        _ => grouped(query, keys, values, visibility, softcap),
    }
}

/// Keys and values of one term each.
pub(crate) fn blended<B: Backend>(
    query: &Tensor<B, 4>,
    keys: Vec<Term<B>>,
    values: Vec<Term<B>>,
) -> (Vec<Term<B>>, Vec<Term<B>>) {
    let one = |terms| vec![Term::plain(blend(terms, query.dtype()))];
    (one(keys), one(values))
}

/// As many queries as keys, by Burn's `attention`.
fn whole<B: Backend>(query: Tensor<B, 4>, key: Tensor<B, 4>, value: Tensor<B, 4>) -> Tensor<B, 4> {
    let [_, n_heads, n_queries, _] = query.dims();
    let (key, value) = (repeat_heads(key, n_heads), repeat_heads(value, n_heads));
    let options = AttentionModuleOptions {
        is_causal: n_queries > 1,
        ..Default::default()
    };
    attention(query, key, value, None, None, options)
}

/// Products per source, the queries of a kv head's whole group side by side: no key or value is
/// blended, or repeated for grouped queries.
fn grouped<B: Backend>(
    query: Tensor<B, 4>,
    keys: Vec<Term<B>>,
    values: Vec<Term<B>>,
    visibility: &Visibility<B>,
    softcap: Option<f64>,
) -> Tensor<B, 4> {
    let dtype = query.dtype();
    let shape @ [batch, n_heads, n_queries, head_dim] = query.dims();
    let [_, n_kv_heads, n_keys, _] = keys[0].source.dims();
    let group = n_heads / n_kv_heads;
    let query = (query * (head_dim as f64).sqrt().recip()).reshape([
        batch,
        n_kv_heads,
        group * n_queries,
        head_dim,
    ]);
    let scores = sum(keys.into_iter().map(|key| {
        let keys = key.source.float(dtype).swap_dims(2, 3);
        matmul(weighted(query.clone(), key.weight), keys)
    }));
    let scores = match softcap {
        Some(cap) => (scores / cap).tanh() * cap,
        None => scores,
    };
    let scores = match visibility.mask([n_queries, n_keys], &scores.device()) {
        Some(hidden) => hide(scores, hidden.repeat_dim(2, group)),
        None => scores,
    };
    let probabilities = softmax(scores, 3);
    sum(values.into_iter().map(|value| {
        let sums = matmul(probabilities.clone(), value.source.float(dtype));
        weighted(sums, value.weight)
    }))
    .reshape(shape)
}

/// Scores of hidden keys become the lowest finite number: their probability is exactly 0 beside any
/// visible key, and a padding query that sees no key at all still gets finite numbers.
fn hide<B: Backend>(scores: Tensor<B, 4>, hidden: Tensor<B, 4, Bool>) -> Tensor<B, 4> {
    let lowest = scores
        .dtype()
        .finfo()
        .map_or(f64::from(f32::MIN), |info| info.min);
    scores.mask_fill(hidden, lowest)
}

fn blend<B: Backend>(terms: Vec<Term<B>>, dtype: DType) -> Tensor<B, 4> {
    sum(terms.into_iter().map(|term| {
        let dims = term.source.dims();
        let weight = term.weight.map(|weight| same_for_all_tokens(weight, dims));
        weighted(term.source.float(dtype), weight)
    }))
}

/// A weight of keys or values of shape `dims`, whose gradient is then summed over tokens first.
///
/// The gradient of keys is transposed, and such a tensor Burn's fusion on CubeCL sums wrongly over a
/// leading dimension: docs/decisions/cubecl-faults.md.
pub(crate) fn same_for_all_tokens<B: Backend>(
    weight: Tensor<B, 4>,
    [batch, heads, _, channels]: [usize; 4],
) -> Tensor<B, 4> {
    weight.expand([batch, heads, 1, channels])
}

fn weighted<B: Backend>(x: Tensor<B, 4>, weight: Option<Tensor<B, 4>>) -> Tensor<B, 4> {
    match weight {
        Some(weight) => x * weight,
        None => x,
    }
}

fn sum<B: Backend>(mut terms: impl Iterator<Item = Tensor<B, 4>>) -> Tensor<B, 4> {
    let first = terms.next().expect("a blend has a source");
    terms.fold(first, |sum, term| sum + term)
}

fn repeat_heads<B: Backend>(x: Tensor<B, 4>, n_heads: usize) -> Tensor<B, 4> {
    let [batch, n_kv_heads, seq, head_dim] = x.dims();
    if n_heads == n_kv_heads {
        return x;
    }
    x.unsqueeze_dim::<5>(2)
        .repeat_dim(2, n_heads / n_kv_heads)
        .reshape([batch, n_heads, seq, head_dim])
}
