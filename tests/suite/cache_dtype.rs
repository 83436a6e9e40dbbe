//! Caches of other numbers: what they take, and how far off they are.

use burn::tensor::Tensor;
use burn_ndarray::NdArray;
use fusedkv::backend::Flex;
use fusedkv::train::{AssociativeRecall, TrainError, evaluate};
use fusedkv::{
    BlockConfig, CacheDtype, CacheError, FusedKvCache, FusedKvDecoder, FusedKvDecoderConfig,
    GenerateError, GenerationConfig, KvPart, KvPlan, Logits, TokenBatch, generate,
};
use proptest::prelude::*;

use crate::models::{Case, VOCAB, any_case, changed, small, values};

/// Prefills all but the last token and decodes it: the cache, and the last logits.
fn decode(
    model: &FusedKvDecoder<Flex>,
    dtype: CacheDtype,
    rows: &[Vec<u32>],
) -> (FusedKvCache<Flex>, Vec<f64>) {
    let device = Default::default();
    let mut cache = model
        .new_cache_of(dtype, rows.len(), rows[0].len() + 1)
        .unwrap();
    let tokens = TokenBatch::from_rows(rows, VOCAB, &device).unwrap();
    model
        .forward_cached(tokens, &mut cache, Logits::Last)
        .unwrap();
    let next = vec![vec![1]; rows.len()];
    let next = TokenBatch::from_rows(&next, VOCAB, &device).unwrap();
    let logits = model
        .forward_cached(next, &mut cache, Logits::Last)
        .unwrap();
    (cache, values(&logits))
}

/// Largest error of a number x in a row whose largest magnitude is `max`, as documented.
fn bound(dtype: CacheDtype, x: f64, max: f64) -> f64 {
    match dtype {
        CacheDtype::F16 => x.abs() * 2f64.powi(-11) + 2f64.powi(-25),
        CacheDtype::Bf16 => x.abs() * 2f64.powi(-8),
        CacheDtype::Int8 => max / 254.0 * (1.0 + 1e-5),
        _ => 0.0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn numbers_are_as_far_off_as_documented(mut case in any_case(1..20)) {
        case.config.block = BlockConfig::default();
        let model = case.model::<Flex>();
        let (exact, logits) = decode(&model, CacheDtype::F32, &case.tokens);
        // The lowest layer's keys and values depend on no cached number.
        let exact = KvPart::BOTH.map(|part| exact.get(part, 0).unwrap());
        for dtype in [CacheDtype::Model, CacheDtype::F16, CacheDtype::Bf16, CacheDtype::Int8] {
            let (cache, found) = decode(&model, dtype, &case.tokens);
            let stored = KvPart::BOTH.map(|part| cache.get(part, 0).unwrap());
            for (exact, stored) in exact.iter().zip(&stored) {
                let width = case.config.head_dim;
                let (exact, stored) = (values(exact), values(stored));
                for (exact, stored) in exact.chunks(width).zip(stored.chunks(width)) {
                    let max = exact.iter().fold(0.0f64, |max, x| max.max(x.abs()));
                    for (x, y) in exact.iter().zip(stored) {
                        prop_assert!((x - y).abs() <= bound(dtype, *x, max), "{dtype:?} {x} {y}");
                    }
                }
            }
            // Random decoders magnify rounding; trained ones are measured in docs/benchmarks.md.
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(&mut logits.iter().zip(&found).map(|(x, y)| x - y));
            prop_assert!(error <= 0.3 * norm(&mut logits.iter().copied()), "{dtype:?}: {error}");
        }
    }
}

#[test]
fn bytes_against_a_standard_cache_in_f32() {
    let bytes = |plan, dtype| {
        let config = FusedKvDecoderConfig::new(VOCAB, plan)
            .with_hidden_size(16)
            .with_n_layers(4)
            .with_n_heads(2)
            .with_n_kv_heads(2)
            .with_head_dim(64)
            .with_ffn_size(16);
        let model = config.init::<Flex>(&Default::default()).unwrap();
        model.new_cache_of(dtype, 2, 10).unwrap().bytes_allocated()
    };
    let standard = bytes(KvPlan::Standard, CacheDtype::F32);
    let fused = |dtype| bytes(KvPlan::FusedKv { storage_layers: 2 }, dtype);
    assert_eq!(2 * fused(CacheDtype::F32), standard);
    assert_eq!(4 * fused(CacheDtype::F16), standard);
    assert_eq!(4 * fused(CacheDtype::Bf16), standard);
    // One byte a number, and four for the scale of 64.
    assert_eq!(128 * fused(CacheDtype::Int8), 17 * standard);
}

#[test]
fn names_are_those_of_json() {
    for (name, dtype) in CacheDtype::NAMES {
        assert_eq!(name.parse(), Ok(*dtype));
        assert_eq!(serde_json::to_value(dtype).unwrap(), *name);
    }
    let error = "int4".parse::<CacheDtype>().unwrap_err();
    assert_eq!(error, CacheError::UnknownDtype("int4".to_owned()));
}

#[test]
fn a_backend_without_the_numbers_says_so() {
    let config = FusedKvDecoderConfig::tiny(32, KvPlan::Standard);
    let model = config.init::<NdArray>(&Default::default()).unwrap();
    let expected = CacheError::UnsupportedDtype {
        dtype: CacheDtype::F16,
        backend: "ndarray".to_owned(),
    };
    let error = model.new_cache_of(CacheDtype::F16, 1, 4).unwrap_err();
    assert_eq!(error, expected);
    let task = AssociativeRecall::new(32, 24, 4, 8);
    let error = evaluate(&model, &task, 4, Some(CacheDtype::F16)).unwrap_err();
    assert!(
        matches!(&error, TrainError::Cache(e) if *e == expected),
        "{error}"
    );
}

#[test]
fn caches_of_other_numbers_are_cut_and_shuffled_alike() {
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let case = Case {
        config: small(plan).with_max_positions(16),
        tokens: vec![vec![1, 2, 3], vec![4, 5, 6]],
        seed: 5,
    };
    let model = case.model::<Flex>();
    for dtype in [CacheDtype::F16, CacheDtype::Bf16, CacheDtype::Int8] {
        let (mut cache, _) = decode(&model, dtype, &case.tokens);
        let fork = cache.clone();
        let row = |cache: &FusedKvCache<Flex>, row: usize, len: usize| {
            let keys = cache.get(KvPart::Key, 1).unwrap();
            values(&keys.narrow(0, row, 1).narrow(2, 0, len))
        };
        cache.truncate(2).unwrap();
        cache.select_rows(&[1, 0, 1]).unwrap();
        assert_eq!((cache.dtype(), cache.len(), cache.batch()), (dtype, 2, 3));
        for (now, then) in [1, 0, 1].into_iter().enumerate() {
            assert_eq!(row(&cache, now, 2), row(&fork, then, 2));
        }
    }
}

/// Numbers beyond f16's largest become infinite in its cache, and what is read from it says so.
#[test]
fn an_overflow_in_the_cache_is_an_error_of_generation() {
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let model = Case {
        config: small(plan).with_max_positions(16),
        tokens: vec![],
        seed: 5,
    }
    .model::<Flex>();
    let values = "model.layers.0.self_attn.v_proj.weight";
    let model = changed(model, values, |weight: Tensor<Flex, 2>| weight * 1e6);
    let settings = GenerationConfig::new().with_max_new_tokens(3);
    let generated = |dtype| -> Result<Vec<_>, _> {
        let settings = settings.clone().with_cache_dtype(dtype);
        generate(&model, &[[1, 2, 3]], &settings).unwrap().collect()
    };
    assert_eq!(generated(CacheDtype::F32).unwrap().len(), 3);
    let error = generated(CacheDtype::F16).unwrap_err();
    assert!(matches!(error, GenerateError::NotANumber { .. }), "{error}");
}
