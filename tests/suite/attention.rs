//! Attention over a blend, against the definition in scalar loops.

use burn::tensor::{Distribution, Tensor, backend::Backend};
use fusedkv::backend::Flex;
use fusedkv::{
    AttentionError, BlendWeights, FusionInit, KvFusion, KvFusionConfig, Mix, fused_attention,
};
use proptest::prelude::*;

use crate::models::{F64, values};

#[derive(Clone, Debug)]
struct Shape {
    batch: usize,
    n_heads: usize,
    n_kv_heads: usize,
    queries: usize,
    keys: usize,
    head_dim: usize,
}

prop_compose! {
    fn any_shape()(
        batch in 1usize..3,
        group in 1usize..4,
        n_kv_heads in 1usize..3,
        queries in 1usize..40,
        more in 0usize..90,
        pairs in 1usize..5,
    ) -> Shape {
        Shape {
            batch,
            n_heads: group * n_kv_heads,
            n_kv_heads,
            queries,
            keys: queries + more,
            head_dim: 2 * pairs,
        }
    }
}

/// `out[b][h][i] = Σ_j softmax_j(q_i · k_j / √d) v_j` with `k = Σ_s a_s ⊙ k_s` and `v` alike.
fn by_definition(
    shape: &Shape,
    query: &[f64],
    keys: &[Vec<f64>],
    values: &[Vec<f64>],
    weights: Option<(&[f64], &[f64])>,
) -> Vec<f64> {
    let &Shape {
        n_heads,
        n_kv_heads,
        queries,
        keys: n_keys,
        head_dim: d,
        ..
    } = shape;
    let blend = |sources: &[Vec<f64>],
                 weights: Option<&[f64]>,
                 channels: usize,
                 at: usize,
                 head: usize,
                 c: usize| {
        sources
            .iter()
            .enumerate()
            .map(|(s, source)| {
                let weight = weights.map_or(1.0, |w| {
                    w[(s * n_kv_heads + head) * channels + c % channels]
                });
                weight * source[at * d + c]
            })
            .sum::<f64>()
    };
    let mut output = Vec::new();
    for b in 0..shape.batch {
        for h in 0..n_heads {
            let kv_head = h * n_kv_heads / n_heads;
            for i in 0..queries {
                let q = &query[((b * n_heads + h) * queries + i) * d..][..d];
                let visible = n_keys - queries + i + 1;
                let row = |j: usize| (b * n_kv_heads + kv_head) * n_keys + j;
                let scores: Vec<f64> = (0..visible)
                    .map(|j| {
                        let k = |c| blend(keys, weights.map(|w| w.0), d / 2, row(j), kv_head, c);
                        (0..d).map(|c| q[c] * k(c)).sum::<f64>() / (d as f64).sqrt()
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let exp: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = exp.iter().sum();
                for c in 0..d {
                    let v = |j| blend(values, weights.map(|w| w.1), d, row(j), kv_head, c);
                    output.push((0..visible).map(|j| exp[j] / sum * v(j)).sum());
                }
            }
        }
    }
    output
}

fn random<B: Backend>(dims: [usize; 4]) -> Tensor<B, 4> {
    Tensor::random(dims, Distribution::Normal(0.0, 1.0), &Default::default())
}

fn fusion<B: Backend>(sources: usize, shape: &Shape) -> KvFusion<B> {
    let mix = Mix::Blend {
        sources: (0..sources).collect(),
        weights: BlendWeights::PerChannel,
    };
    let config = KvFusionConfig {
        n_kv_heads: shape.n_kv_heads,
        head_dim: shape.head_dim,
        key: mix.clone(),
        value: mix,
        init: FusionInit::equal().with_noise(1.0),
    };
    config.init(&Default::default()).unwrap()
}

fn check<B: Backend>(shape: &Shape, sources: usize, tolerance: f64) -> Result<(), TestCaseError> {
    let &Shape {
        batch,
        n_heads,
        n_kv_heads,
        queries,
        keys: n_keys,
        head_dim,
        ..
    } = shape;
    let fusion = (sources > 0).then(|| fusion::<B>(sources, shape));
    let source = |_| random::<B>([batch, n_kv_heads, n_keys, head_dim]);
    let query = random::<B>([batch, n_heads, queries, head_dim]);
    let keys: Vec<_> = (0..sources.max(1)).map(source).collect();
    let vals: Vec<_> = (0..sources.max(1)).map(source).collect();
    let numbers = |tensors: &[Tensor<B, 4>]| tensors.iter().map(values).collect::<Vec<_>>();
    let weights = fusion.as_ref().map(|fusion| {
        let weight = |weight: &Option<burn::module::Param<Tensor<B, 3>>>| {
            values(&weight.as_ref().unwrap().val())
        };
        (weight(&fusion.key_weight), weight(&fusion.value_weight))
    });
    let expected = by_definition(
        shape,
        &values(&query),
        &numbers(&keys),
        &numbers(&vals),
        weights.as_ref().map(|(k, v)| (&k[..], &v[..])),
    );
    let found = fused_attention(query, keys, vals, fusion.as_ref()).unwrap();
    prop_assert_eq!(found.dims(), [batch, n_heads, queries, head_dim]);
    for (found, expected) in values(&found).iter().zip(&expected) {
        prop_assert!(
            (found - expected).abs() <= tolerance * (1.0 + expected.abs()),
            "{found} {expected}"
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn fused_attention_is_its_definition(shape in any_shape(), sources in 0usize..4) {
        check::<F64>(&shape, sources, 1e-9)?;
        check::<Flex>(&shape, sources, 2e-4)?;
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let shape = Shape {
        batch: 1,
        n_heads: 2,
        n_kv_heads: 2,
        queries: 1,
        keys: 3,
        head_dim: 4,
    };
    let fusion = fusion::<F64>(2, &shape);
    let query = |heads, queries| random::<F64>([1, heads, queries, 4]);
    let source = |heads, dim| random::<F64>([1, heads, 3, dim]);

    let none = fused_attention(query(2, 1), vec![], vec![], Some(&fusion)).unwrap_err();
    assert_eq!(
        none,
        AttentionError::Sources {
            what: "keys",
            found: 0,
            expected: 2
        }
    );
    let one = fused_attention(
        query(2, 1),
        vec![source(2, 4); 2],
        vec![source(2, 4)],
        Some(&fusion),
    );
    assert_eq!(
        one.unwrap_err(),
        AttentionError::Sources {
            what: "values",
            found: 1,
            expected: 2
        }
    );
    let narrow = fused_attention(query(2, 1), vec![source(2, 4)], vec![source(2, 6)], None);
    assert_eq!(
        narrow.unwrap_err(),
        AttentionError::Shape {
            what: "values",
            found: [1, 2, 3, 6],
            expected: [1, 2, 3, 4]
        }
    );
    let weights = fused_attention(
        query(2, 1),
        vec![source(1, 4); 2],
        vec![source(1, 4); 2],
        Some(&fusion),
    );
    assert_eq!(
        weights.unwrap_err(),
        AttentionError::Shape {
            what: "fusion weights",
            found: [1, 2, 1, 4],
            expected: [1, 1, 1, 4]
        }
    );
    let heads = fused_attention(query(3, 1), vec![source(2, 4)], vec![source(2, 4)], None);
    assert_eq!(
        heads.unwrap_err(),
        AttentionError::Heads {
            n_heads: 3,
            n_kv_heads: 2
        }
    );
    let queries = fused_attention(query(2, 4), vec![source(2, 4)], vec![source(2, 4)], None);
    assert_eq!(
        queries.unwrap_err(),
        AttentionError::MoreQueriesThanKeys {
            queries: 4,
            keys: 3
        }
    );
}
