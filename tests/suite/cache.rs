//! The cache: what it takes, what it refuses, and how it is cut and shuffled.

use fusedkv::{
    CacheDtype, CacheError, ForwardError, FusedKvCache, FusedKvDecoder, KvPart, KvPlan, Logits,
    TokenBatch,
};
use proptest::prelude::*;

use crate::models::{Case, F64, VOCAB, any_case, difference, model, small, values};

fn batch(rows: &[Vec<u32>]) -> TokenBatch<F64> {
    TokenBatch::from_rows(rows, VOCAB, &Default::default()).unwrap()
}

/// Everything a caller can see of a cache.
fn seen(cache: &FusedKvCache<F64>, n_layers: usize) -> (Vec<usize>, usize, Vec<f64>) {
    let tensors = (0..n_layers).flat_map(|layer| KvPart::BOTH.map(|part| cache.get(part, layer)));
    let values = tensors.flatten().flat_map(|tensor| values(&tensor));
    (cache.row_lens(), cache.len(), values.collect())
}

fn fixed_case() -> Case {
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    Case {
        config: small(plan).with_max_positions(16),
        tokens: vec![vec![1, 2, 3], vec![4, 5, 6]],
        seed: 3,
    }
}

#[test]
fn errors_leave_the_cache_as_it_was() {
    let case = fixed_case();
    let model = case.model::<F64>();
    let mut cache = model.new_cache(2, 4).unwrap();
    let feed = |model: &FusedKvDecoder<F64>, cache: &mut _, rows: &[Vec<u32>]| {
        model
            .forward_cached(batch(rows), cache, Logits::Last)
            .map(|_| ())
    };
    feed(&model, &mut cache, &case.tokens).unwrap();
    let before = seen(&cache, 4);

    let over = feed(&model, &mut cache, &[vec![1, 2], vec![3, 4]]);
    let expected = CacheError::OverCapacity {
        requested: 2,
        len: 3,
        capacity: 4,
    };
    assert_eq!(over, Err(ForwardError::Cache(expected)));

    let rows = feed(&model, &mut cache, &[vec![1]]);
    let expected = CacheError::BatchMismatch {
        found: 1,
        expected: 2,
    };
    assert_eq!(rows, Err(ForwardError::Cache(expected)));

    for plan in [KvPlan::Standard, KvPlan::Yoco { storage_layers: 2 }] {
        let other = case.model_with::<F64>(plan);
        let mismatch = feed(&other, &mut cache, &[vec![1], vec![2]]);
        assert!(matches!(
            mismatch,
            Err(ForwardError::Cache(CacheError::PlanMismatch { .. }))
        ));
    }
    let mut narrow = case.config.clone();
    narrow.n_kv_heads = 4;
    let mismatch = feed(&model_of(&narrow), &mut cache, &[vec![1], vec![2]]);
    assert!(matches!(
        mismatch,
        Err(ForwardError::Cache(CacheError::PlanMismatch { .. }))
    ));

    let truncated = cache.truncate(4);
    assert_eq!(
        truncated,
        Err(CacheError::TruncateBeyondLength {
            requested: 4,
            len: 3
        })
    );
    let truncated = cache.truncate_rows(&[1, 4]);
    assert_eq!(
        truncated,
        Err(CacheError::TruncateBeyondLength {
            requested: 4,
            len: 3
        })
    );
    assert_eq!(
        cache.truncate_rows(&[1]),
        Err(CacheError::BatchMismatch {
            found: 1,
            expected: 2
        })
    );
    assert_eq!(
        cache.select_rows(&[0, 2]),
        Err(CacheError::NoSuchRow { row: 2, batch: 2 })
    );
    assert_eq!(
        cache.select_rows(&[]),
        Err(CacheError::Zero { field: "batch" })
    );
    assert_eq!(seen(&cache, 4), before);

    assert_eq!(
        model.new_cache(0, 1).unwrap_err(),
        CacheError::Zero { field: "batch" }
    );
    assert_eq!(
        model.new_cache(1, 0).unwrap_err(),
        CacheError::Zero { field: "capacity" }
    );
}

/// Sizes no machine has are refused by name, before memory is asked for.
#[test]
fn impossible_sizes_are_refused() {
    let model = fixed_case().model::<F64>();
    // 2 layers' keys and values, 2 heads of 4 channels each, 8 bytes per number.
    let slot = 2 * 2 * 2 * 4 * 8;
    let most = isize::MAX as usize / slot;
    for (batch, capacity) in [
        (1, usize::MAX),
        (usize::MAX, 1),
        (usize::MAX, usize::MAX),
        (1 << 32, 1 << 32),
        (1, most + 1),
    ] {
        for dtype in [CacheDtype::Model, CacheDtype::F32, CacheDtype::Int8] {
            if capacity == most + 1 && dtype != CacheDtype::Model {
                continue; // other numbers are smaller
            }
            assert_eq!(
                model.new_cache_of(dtype, batch, capacity).unwrap_err(),
                CacheError::TooLarge { batch, capacity },
                "{dtype}"
            );
        }
    }
}

#[test]
fn the_largest_number_is_no_length() {
    let model = fixed_case().model::<F64>();
    let mut cache = model.new_cache(1, 4).unwrap();
    model
        .forward_cached(batch(&[vec![1, 2]]), &mut cache, Logits::Last)
        .unwrap();
    let expected = CacheError::TruncateBeyondLength {
        requested: usize::MAX,
        len: 2,
    };
    assert_eq!(cache.truncate(usize::MAX), Err(expected.clone()));
    assert_eq!(cache.truncate_rows(&[usize::MAX]), Err(expected));
    assert_eq!((cache.len(), cache.remaining()), (2, 2));
}

fn model_of(config: &fusedkv::FusedKvDecoderConfig) -> FusedKvDecoder<F64> {
    model(config, 0)
}

#[test]
fn positions_end_where_the_rope_table_does() {
    let model = fixed_case().model::<F64>();
    let expected = ForwardError::TooManyPositions {
        row: 0,
        positions: 17,
        max_positions: 16,
    };
    assert_eq!(model.forward(batch(&[vec![1; 17]])).unwrap_err(), expected);
    let mut cache = model.new_cache(1, 20).unwrap();
    model
        .forward_cached(batch(&[vec![1; 16]]), &mut cache, Logits::Last)
        .unwrap();
    let one_more = model.forward_cached(batch(&[vec![1]]), &mut cache, Logits::Last);
    assert_eq!(one_more.unwrap_err(), expected);
    assert_eq!(cache.len(), 16);
}

/// Half of the standard decoder's bytes, as allocated.
#[test]
fn half_the_bytes() {
    let case = fixed_case();
    let bytes = |plan: KvPlan| {
        let cache = case.model_with::<F64>(plan).new_cache(3, 7).unwrap();
        cache.bytes_allocated()
    };
    let standard = bytes(KvPlan::Standard);
    assert_eq!(standard, 2 * 4 * 3 * 7 * (2 * 4) * 8);
    assert_eq!(2 * bytes(KvPlan::FusedKv { storage_layers: 2 }), standard);
    assert_eq!(
        2 * bytes(KvPlan::FusedKvLite { storage_layers: 2 }),
        standard
    );
    assert_eq!(4 * bytes(KvPlan::Cla { factor: 4 }), standard);
}

/// The last logits of `rows` fed to a cache.
fn logits(
    model: &FusedKvDecoder<F64>,
    cache: &mut FusedKvCache<F64>,
    rows: &[Vec<u32>],
) -> burn::tensor::Tensor<F64, 3> {
    model
        .forward_cached(batch(rows), cache, Logits::Last)
        .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Drafts rejected by different numbers per row leave no trace; neither does a fork.
    #[test]
    fn truncated_drafts_leave_no_trace(
        case in any_case(2..8),
        drafts in prop::collection::vec(0usize..4, 3),
        uniform in any::<bool>(),
        compact in any::<bool>(),
    ) {
        let model = case.model::<F64>();
        let rows = case.tokens.len();
        let seq = case.tokens[0].len();
        let mut cache = model.new_cache(rows, 32).unwrap();
        logits(&model, &mut cache, &case.tokens);
        let mut fork = cache.clone();
        logits(&model, &mut cache, &vec![vec![1, 2, 3]; rows]);
        // Each row keeps `kept` of its three drafts.
        let kept: Vec<usize> = (0..rows).map(|row| drafts[if uniform { 0 } else { row }]).collect();
        if uniform {
            cache.truncate(seq + kept[0]).unwrap();
        } else {
            let lens: Vec<usize> = kept.iter().map(|kept| seq + kept).collect();
            cache.truncate_rows(&lens).unwrap();
            prop_assert_eq!(cache.row_lens(), lens);
        }
        if compact {
            cache.compact();
            prop_assert_eq!(cache.len(), seq + kept.iter().max().unwrap());
        }
        prop_assert_eq!(fork.len(), seq);
        let next = logits(&model, &mut cache, &vec![vec![5]; rows]);
        let expected: Vec<Vec<u32>> = kept.iter().map(|&kept| [&[1, 2, 3][..kept], &[5]].concat()).collect();
        let expected = logits(&model, &mut fork, &expected);
        let difference = difference(&next, &expected);
        prop_assert!(difference < 1e-6, "{difference}");
    }

    /// Rows reordered, repeated and dropped go on as the rows they were.
    #[test]
    fn selected_rows_go_on_as_they_were(
        case in any_case(1..8),
        rows in prop::collection::vec(any::<prop::sample::Index>(), 1..5),
    ) {
        let model = case.model::<F64>();
        let ragged: Vec<Vec<u32>> = case.tokens.iter().enumerate()
            .map(|(i, row)| row[i.min(row.len() - 1)..].to_vec()).collect();
        let rows: Vec<usize> = rows.iter().map(|row| row.index(ragged.len())).collect();
        let mut cache = model.new_cache(ragged.len(), 32).unwrap();
        logits(&model, &mut cache, &ragged);
        cache.select_rows(&rows).unwrap();
        prop_assert_eq!(cache.batch(), rows.len());
        let chosen: Vec<Vec<u32>> = rows.iter().map(|&row| ragged[row].clone()).collect();
        let mut fresh = model.new_cache(rows.len(), 32).unwrap();
        logits(&model, &mut fresh, &chosen);
        let next = vec![vec![7]; rows.len()];
        let difference = difference(&logits(&model, &mut cache, &next), &logits(&model, &mut fresh, &next));
        prop_assert!(difference < 1e-6, "{difference}");
    }

    #[test]
    fn a_reset_cache_is_a_new_one(case in any_case(1..8)) {
        let model = case.model::<F64>();
        let rows = case.tokens.len();
        let mut cache = model.new_cache(rows, 8).unwrap();
        let first = logits(&model, &mut cache, &case.tokens);
        prop_assert_eq!(cache.remaining(), 8 - cache.len());
        cache.reset();
        prop_assert!(cache.is_empty());
        let again = logits(&model, &mut cache, &case.tokens);
        prop_assert!(difference(&first, &again) == 0.0);
    }
}
