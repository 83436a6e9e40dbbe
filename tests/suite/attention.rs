//! Attention over a blend, against the definition in scalar loops.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Distribution, Tensor, backend::Backend};
use fusedkv::backend::{Autodiff, Flex};
use fusedkv::{
    AttentionError, BlendWeights, FusionInit, KvFusion, KvFusionConfig, KvShape, KvSource,
    fused_attention,
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
        head_dim in 1usize..10,
    ) -> Shape {
        Shape {
            batch,
            n_heads: group * n_kv_heads,
            n_kv_heads,
            queries,
            keys: queries + more,
            head_dim,
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
    let blended = KvSource::Blend {
        sources: (0..sources).collect(),
        weights: BlendWeights::PerChannel,
    };
    let config = KvFusionConfig {
        kv: KvShape {
            n_kv_heads: shape.n_kv_heads,
            head_dim: shape.head_dim,
            rotary_dim: shape.head_dim / 2 * 2,
        },
        key: blended.clone(),
        value: blended,
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
        let weight = |weight: &Option<Param<Tensor<B, 3>>>| values(&weight.as_ref().unwrap().val());
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
        // Weights of keys are per pair of channels.
        let sources = if shape.head_dim % 2 == 1 { 0 } else { sources };
        check::<F64>(&shape, sources, 1e-9)?;
        check::<Flex>(&shape, sources, 2e-4)?;
    }
}

/// Of numbers of less precision, attention is that of the same numbers in f32, rounded at the end.
fn check_half<B: Backend>(
    shape: &Shape,
    sources: usize,
    dtype: DType,
) -> Result<(), TestCaseError> {
    let fusion = (sources > 0).then(|| fusion::<B>(sources, shape));
    let fusion = fusion.map(|fusion| fusion.map(&mut Cast(dtype)));
    // Scores of hundreds: rounding them moves probabilities by far more than rounding outputs.
    let query = random::<B>([shape.batch, shape.n_heads, shape.queries, shape.head_dim]) * 30;
    let dims = [shape.batch, shape.n_kv_heads, shape.keys, shape.head_dim];
    let source = |_| random::<B>(dims).cast(dtype);
    let keys: Vec<_> = (0..sources.max(1)).map(source).collect();
    let vals: Vec<_> = (0..sources.max(1)).map(source).collect();
    let query = query.cast(dtype);
    let wide = |tensors: &[Tensor<B, 4>]| {
        let wide = tensors.iter().map(|x| x.clone().cast(DType::F32));
        wide.collect::<Vec<_>>()
    };
    let wide_fusion = fusion
        .clone()
        .map(|fusion| fusion.map(&mut Cast(DType::F32)));
    let expected = fused_attention(
        query.clone().cast(DType::F32),
        wide(&keys),
        wide(&vals),
        wide_fusion.as_ref(),
    );
    let found = fused_attention(query, keys, vals, fusion.as_ref()).unwrap();
    prop_assert_eq!(found.dtype(), dtype);
    let expected = expected.unwrap().cast(dtype);
    prop_assert_eq!(values(&found), values(&expected));
    Ok(())
}

/// Parameters of another float type.
struct Cast(DType);

impl<B: Backend> ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|x| x.cast(self.0).detach())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn scores_and_softmax_are_f32(
        shape in any_shape(),
        sources in 0usize..3,
        bf16 in any::<bool>(),
    ) {
        let sources = if shape.head_dim % 2 == 1 { 0 } else { sources };
        let dtype = if bf16 { DType::BF16 } else { DType::F16 };
        check_half::<Flex>(&shape, sources, dtype)?;
        check_half::<Autodiff<Flex>>(&shape, sources, dtype)?;
    }
}

#[test]
fn nothing_to_attend_with_is_refused() {
    for (what, dims) in [
        ("rows", [0, 2, 1, 4]),
        ("heads", [1, 0, 1, 4]),
        ("queries", [1, 2, 0, 4]),
        ("channels", [1, 2, 1, 0]),
    ] {
        let source = || vec![Tensor::<Flex, 4>::zeros([1, 2, 3, 4], &Default::default())];
        let query = Tensor::zeros(dims, &Default::default());
        let error = fused_attention(query, source(), source(), None).unwrap_err();
        assert_eq!(error, AttentionError::Empty { what });
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
