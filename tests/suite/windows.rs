//! Layers with sliding windows: caches that forget, plans that keep to a layer's kind.

use burn::tensor::Tensor;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::config::{LayerKind, RopeConfig};
use fusedkv::{
    CacheDtype, CacheError, FusedKvCache, FusedKvDecoder, FusedKvDecoderConfig, KvPart, KvPlan,
    KvSource, Logits, PlanError, TokenBatch,
};
use proptest::prelude::*;

use crate::models::{F64, VOCAB, difference, model, small};

const WINDOW: usize = 5;
/// Tokens beyond the window that are kept for certain.
const HISTORY: usize = 32;

/// A decoder of six layers, of which every third is global, with a RoPE and widths of its own.
fn local_and_global(plan: KvPlan, window: usize) -> FusedKvDecoderConfig {
    let kind = |layer: usize| match layer % 3 {
        2 => LayerKind {
            rope: Some(RopeConfig::new(1e4)),
            head_dim: Some(6),
            n_kv_heads: Some(1),
            k_eq_v: true,
            ..LayerKind::default()
        },
        _ => LayerKind {
            window: Some(window),
            rope: Some(RopeConfig::new(100.0)),
            ..LayerKind::default()
        },
    };
    let mut config = small(plan).with_n_layers(6).with_max_positions(4096);
    config.block.layers = (0..6).map(kind).collect();
    config
}

/// Plans of which local layers read local ones, and global ones global ones.
fn plans() -> Vec<KvPlan> {
    let storage_layers = 5;
    vec![
        KvPlan::Standard,
        KvPlan::FusedKv { storage_layers },
        KvPlan::FusedKv { storage_layers: 3 },
        KvPlan::FusedKvLite { storage_layers: 3 },
        KvPlan::Yoco { storage_layers: 4 },
        KvPlan::YocoPlusPlus { storage_layers },
        KvPlan::Cla { factor: 2 },
        KvPlan::DenseFusion { storage_layers: 4 },
    ]
}

fn text(len: usize, seed: u64) -> Vec<u32> {
    let next = |x: u64| x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    let numbers = std::iter::successors(Some(next(seed)), |x| Some(next(*x)));
    numbers
        .map(|x| ((x >> 33) % VOCAB as u64) as u32)
        .take(len)
        .collect()
}

fn batch<B: burn::tensor::backend::Backend>(rows: &[Vec<u32>]) -> TokenBatch<B> {
    TokenBatch::from_rows(rows, VOCAB, &Default::default()).unwrap()
}

fn read(
    model: &FusedKvDecoder<F64>,
    cache: &mut FusedKvCache<F64>,
    rows: &[Vec<u32>],
) -> Tensor<F64, 3> {
    model
        .forward_cached(batch(rows), cache, Logits::All)
        .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However often the cache has forgotten its beginning.
    #[test]
    fn cached_in_any_chunks_is_uncached(
        plan in prop::sample::select(plans()),
        window in 1usize..20,
        len in 120usize..200,
        chunks in prop::collection::vec(prop_oneof![Just(1usize), 1usize..6, 30usize..90], 1..60),
        seed in any::<u64>(),
    ) {
        let model = model::<F64>(&local_and_global(plan, window), seed);
        let tokens = text(len, seed);
        let whole = model.forward(batch(std::slice::from_ref(&tokens))).unwrap();
        let mut cache = model.new_cache(1, len).unwrap();
        let (mut done, mut chunks) = (0, chunks.into_iter().cycle());
        while done < len {
            let end = (done + chunks.next().unwrap()).min(len);
            let logits = read(&model, &mut cache, &[tokens[done..end].to_vec()]);
            let expected = whole.clone().narrow(1, done, end - done);
            let error = difference(&expected, &logits);
            prop_assert!(error < 1e-6, "{done}..{end}: {error}");
            done = end;
        }
    }

    /// Prefill that computes no more than is read, of rows of different lengths in chunks of different
    /// lengths, and what is decoded after it.
    #[test]
    fn last_logits_are_those_of_rows_alone(
        plan in prop::sample::select(plans()),
        window in 1usize..40,
        chunks in prop::collection::vec(prop::collection::vec(1usize..120, 1..3), 1..5),
        equal in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let model = model::<F64>(&local_and_global(plan, window), seed);
        let batch_size = chunks[0].len();
        let mut cache = model.new_cache(batch_size, 700).unwrap();
        let mut rows = vec![Vec::new(); batch_size];
        for (i, lens) in chunks.iter().enumerate() {
            for lens in [lens.clone(), vec![1]] {
                let new: Vec<_> = (0..batch_size)
                    .map(|row| text(lens[if equal { 0 } else { row % lens.len() }], seed ^ (row + 7 * i) as u64))
                    .collect();
                let logits = model.forward_cached(batch(&new), &mut cache, Logits::Last).unwrap();
                for (row, (all, new)) in rows.iter_mut().zip(&new).enumerate() {
                    all.extend(new);
                    let alone = model.forward(batch(std::slice::from_ref(all))).unwrap();
                    let alone = alone.narrow(1, all.len() - 1, 1);
                    let error = difference(&alone, &logits.clone().narrow(0, row, 1));
                    prop_assert!(error < 1e-6, "row {row} at {}: {error}", all.len());
                }
            }
        }
    }

    /// Rows of different lengths, drafts rejected in some rows alone, and what a row then reads.
    #[test]
    fn rows_with_holes_are_what_they_are_alone(
        plan in prop::sample::select(plans()),
        window in 1usize..12,
        lens in prop::collection::vec(1usize..40, 2..4),
        drafts in prop::collection::vec((1usize..6, prop::collection::vec(0usize..6, 3)), 1..30),
        compactions in prop::collection::vec(any::<bool>(), 30),
        seed in any::<u64>(),
    ) {
        let model = model::<F64>(&local_and_global(plan, window), seed);
        let rows: Vec<_> = (lens.iter().enumerate())
            .map(|(row, &len)| text(len, seed ^ row as u64))
            .collect();
        let mut together = model.new_cache(rows.len(), 512).unwrap();
        read(&model, &mut together, &rows);
        // Tokens of each row that count.
        let mut kept = rows;
        for ((draft, accepted), compact) in drafts.into_iter().zip(compactions) {
            let tokens: Vec<_> = kept.iter().map(|row| text(draft, row.len() as u64)).collect();
            let logits = read(&model, &mut together, &tokens);
            let lens: Vec<_> = (kept.iter_mut().zip(&tokens).zip(&accepted))
                .map(|((row, tokens), &accepted)| {
                    row.extend(&tokens[..draft.min(accepted)]);
                    row.len()
                })
                .collect();
            for (row, kept) in kept.iter().enumerate() {
                let accepted = draft.min(accepted[row]);
                if accepted == 0 {
                    continue;
                }
                let alone = model.forward(batch(std::slice::from_ref(kept))).unwrap();
                let alone = alone.narrow(1, kept.len() - accepted, accepted);
                let found = logits.clone().narrow(0, row, 1).narrow(1, 0, accepted);
                let error = difference(&alone, &found);
                prop_assert!(error < 1e-6, "row {row} after {}: {error}", kept.len());
            }
            together.truncate_rows(&lens).unwrap();
            if compact {
                together.compact();
                prop_assert_eq!(together.len(), *lens.iter().max().unwrap());
            }
            prop_assert_eq!(together.row_lens(), lens);
        }
    }
}

/// The bytes of a layer with a window are those of the window, 32 tokens, and an eighth of the
/// window but at least 32, however long the text.
#[test]
fn windows_bound_the_cache() {
    // Two heads of 4 channels in local layers, one of 6 in global ones.
    for (window, slack) in [(5, 32), (512, 64), (8192, 512)] {
        let config = local_and_global(KvPlan::Standard, window);
        let model = config.init::<Flex>(&FlexDevice).unwrap();
        for (dtype, row, global_row) in [
            (CacheDtype::F32, 4 * 2 * 4, 4 * 6),
            (CacheDtype::Int8, 2 * (4 + 4), 6 + 4),
        ] {
            let mut cache = model.new_cache_of(dtype, 1, 4096).unwrap();
            let local = (window + HISTORY + slack).min(4096);
            let expected = 2 * (row * 4 * local + global_row * 2 * 4096);
            assert_eq!(cache.bytes_allocated(), expected);
            for _ in 0..6 {
                let tokens = batch(&[text(300, 3)]);
                model
                    .forward_cached(tokens, &mut cache, Logits::Last)
                    .unwrap();
                assert_eq!(cache.bytes_allocated(), expected);
            }
            let kept = cache.get(KvPart::Key, 0).unwrap().dims()[2];
            assert!(
                kept >= (window + HISTORY - 1).min(1800) && kept <= local,
                "{kept}"
            );
            assert_eq!(cache.get(KvPart::Key, 2).unwrap().dims()[2], 1800);
        }
    }
}

#[test]
fn what_a_window_still_has_can_be_taken_back() {
    let model = model::<F64>(&local_and_global(KvPlan::Standard, WINDOW), 1);
    let tokens = text(300, 7);
    let mut cache = model.new_cache(1, 400).unwrap();
    for token in &tokens {
        read(&model, &mut cache, &[vec![*token]]);
    }
    let mut other = cache.clone();
    other.truncate(300 - HISTORY).unwrap();
    let again = read(&model, &mut other, &[tokens[300 - HISTORY..].to_vec()]);
    let whole = model.forward(batch(&[tokens])).unwrap();
    let error = difference(&whole.narrow(1, 300 - HISTORY, HISTORY), &again);
    assert!(error < 1e-6, "{error}");

    let before = cache.get(KvPart::Value, 1).unwrap().dims();
    let error = cache.truncate(100).unwrap_err();
    assert!(
        matches!(error, CacheError::Forgotten { requested: 100, needed: 96, first } if first > 96),
        "{error}"
    );
    let error = cache.truncate_rows(&[100]).unwrap_err();
    assert!(matches!(error, CacheError::Forgotten { .. }), "{error}");
    assert_eq!((cache.len(), cache.row_lens()), (300, vec![300]));
    assert_eq!(cache.get(KvPart::Value, 1).unwrap().dims(), before);
    // Of nothing nothing is needed.
    let mut other = cache.clone();
    other.truncate(0).unwrap();
    cache.truncate_rows(&[0]).unwrap();
    for mut cache in [cache, other] {
        assert_eq!((cache.len(), cache.row_lens()), (0, vec![0]));
        let tokens = text(90, 1);
        let again = read(&model, &mut cache, std::slice::from_ref(&tokens));
        let whole = model.forward(batch(&[tokens])).unwrap();
        assert!(difference(&whole, &again) < 1e-6);
    }
}

/// A row that is all padding in one pass and begins in the next. The last query of the first is in a block by
/// itself, for any number of queries in a block.
#[test]
fn a_row_that_begins_behind_a_pass_of_padding_is_as_alone() {
    let passes = 97;
    let config = local_and_global(KvPlan::Standard, WINDOW);
    let model = model::<Flex>(&config, 3).with_prefill_chunk(2 * passes);
    let rows = [text(2 * passes, 1), text(10, 2)];
    let mut cache = model.new_cache(2, 2 * passes).unwrap();
    let logits = model
        .forward_cached(batch(&rows), &mut cache, Logits::Last)
        .unwrap();
    for (row, tokens) in rows.into_iter().enumerate() {
        let last = tokens.len() - 1;
        let alone = model.forward(batch(&[tokens])).unwrap();
        let found = logits.clone().narrow(0, row, 1);
        let error = difference(&alone.narrow(1, last, 1), &found);
        assert!(error < 1e-5, "row {row}: {error}");
    }
}

#[test]
fn methods_keep_to_the_kinds_of_layers() {
    // Local layers 0, 1, 3, 4; global ones 2, 5.
    let kinds = [0, 0, 1, 0, 0, 1];
    let resolve = |plan: KvPlan| plan.resolve_kinds(&kinds);
    let storage_layers = 3;
    let fused = resolve(KvPlan::FusedKv { storage_layers }).unwrap();
    assert_eq!(fused.sources(KvPart::Key, 3), [0, 1]);
    assert_eq!(fused.sources(KvPart::Value, 5), [2], "the one global store");
    assert_eq!((fused.kind(4), fused.kind(5)), (0, 1));
    let lite = resolve(KvPlan::FusedKvLite { storage_layers }).unwrap();
    assert_eq!(lite.layer(4).key, KvSource::AsIs(1));
    assert_eq!(lite.layer(4).value, KvSource::AsIs(0));
    assert_eq!(lite.layer(5).key, KvSource::AsIs(2));
    let yoco = resolve(KvPlan::YocoPlusPlus { storage_layers }).unwrap();
    assert_eq!(yoco.layer(1).key, KvSource::Own { residual: Some(0) });
    assert_eq!(yoco.layer(2).key, KvSource::OWN, "the first of its kind");
    let cla = resolve(KvPlan::Cla { factor: 2 }).unwrap();
    assert_eq!(cla.layer(1).key, KvSource::AsIs(0));
    assert_eq!(cla.layer(3).key, KvSource::OWN);
    assert_eq!(cla.layer(5).value, KvSource::AsIs(2));
    let storage_layers = 2;
    let error = resolve(KvPlan::Yoco { storage_layers }).unwrap_err();
    assert_eq!(
        error,
        PlanError::NoStoreOfKind {
            method: "yoco",
            storage_layers,
            layer: 2
        }
    );
    let mut layers = fused.layers().to_vec();
    layers[5].key = KvSource::AsIs(1);
    let error = resolve(KvPlan::Custom { layers }).unwrap_err();
    assert_eq!(
        error,
        PlanError::SourceOfAnotherKind {
            part: KvPart::Key,
            reader: 5,
            layer: 1
        }
    );
}
