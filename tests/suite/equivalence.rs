//! Different ways to compute the same must give the same, and different methods must coincide
//! where their algebra does.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use fusedkv::backend::Flex;
use fusedkv::{FusedKvDecoder, FusionForm, KvPlan, Logits, TokenBatch};
use proptest::prelude::*;

use crate::models::{Case, F64, VOCAB, any_case, difference, small};

/// What f64 leaves; see [`F64`] on what Burn's norm does to it.
const SAME: f64 = 1e-6;
/// What f32 leaves after a few layers.
const SAME_F32: f64 = 2e-4;

fn batch<B: Backend>(rows: &[Vec<u32>]) -> TokenBatch<B> {
    TokenBatch::from_rows(rows, VOCAB, &Default::default()).unwrap()
}

/// Feeds `tokens` through a cache in chunks ending at `cuts`, and returns all logits.
fn cached<B: Backend>(
    model: &FusedKvDecoder<B>,
    tokens: &[Vec<u32>],
    cuts: &[prop::sample::Index],
) -> Tensor<B, 3> {
    let seq = tokens[0].len();
    let mut ends: Vec<usize> = cuts.iter().map(|cut| 1 + cut.index(seq)).collect();
    ends.push(seq);
    ends.sort_unstable();
    ends.dedup();
    let mut cache = model.new_cache(tokens.len(), seq + 3).unwrap();
    let mut start = 0;
    let chunks = ends.iter().map(|&end| {
        let chunk: Vec<_> = tokens.iter().map(|row| row[start..end].to_vec()).collect();
        start = end;
        model
            .forward_cached(batch(&chunk), &mut cache, Logits::All)
            .unwrap()
    });
    Tensor::cat(chunks.collect(), 1)
}

fn full<B: Backend>(model: &FusedKvDecoder<B>, tokens: &[Vec<u32>]) -> Tensor<B, 3> {
    model.forward(batch(tokens)).unwrap()
}

fn last<B: Backend>(logits: Tensor<B, 3>) -> Tensor<B, 3> {
    let [_, seq, _] = logits.dims();
    logits.narrow(1, seq - 1, 1)
}

/// Parameters in f32.
struct Single;

impl<B: Backend> ModuleMapper<B> for Single {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|x| x.cast(DType::F32))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn cached_in_any_chunks_is_uncached(
        case in any_case(1..10),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
    ) {
        let model = case.model::<F64>();
        let difference = difference(&full(&model, &case.tokens), &cached(&model, &case.tokens, &cuts));
        prop_assert!(difference < SAME, "{difference}");
    }

    #[test]
    fn cached_in_any_chunks_is_uncached_on_flex(
        case in any_case(1..10),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
    ) {
        let model = case.model::<Flex>();
        let difference = difference(&full(&model, &case.tokens), &cached(&model, &case.tokens, &cuts));
        prop_assert!(difference < SAME_F32, "{difference}");
    }

    /// Passes over a part of the prompt each, some of nothing but a short row's padding.
    #[test]
    fn prompts_in_passes_are_prompts_at_once(
        case in any_case(2..12),
        lens in prop::collection::vec(any::<prop::sample::Index>(), 3),
        chunk in 0usize..20,
    ) {
        let rows = case.tokens.iter().zip(&lens);
        let mut rows: Vec<Vec<u32>> = rows
            .map(|(row, len)| row[..1 + len.index(row.len())].to_vec())
            .collect();
        rows[0] = case.tokens[0].clone();
        let read = |chunk| {
            let model = case.model::<F64>().with_prefill_chunk(chunk);
            let mut cache = model.new_cache(rows.len(), rows[0].len() + 1).unwrap();
            let first = model.forward_cached(batch(&rows), &mut cache, Logits::Last).unwrap();
            let next = batch(&vec![vec![1]; rows.len()]);
            let second = model.forward_cached(next, &mut cache, Logits::Last).unwrap();
            (Tensor::cat(vec![first, second], 1), cache.row_lens())
        };
        let ((whole, lens), (passes, lens_of_passes)) = (read(usize::MAX), read(chunk));
        prop_assert_eq!(lens, lens_of_passes);
        let difference = difference(&whole, &passes);
        prop_assert!(difference < SAME, "{difference}");
    }

    /// Or is off by no more than a few times what NdArray is in f32: norms of two channels and large
    /// scores magnify rounding.
    #[test]
    fn flex_agrees_with_ndarray(case in any_case(1..10)) {
        let exact = full(&case.model::<F64>(), &case.tokens);
        let off = |logits: TensorData| {
            let logits = Tensor::<F64, 3>::from_data(logits.convert::<f64>(), &Default::default());
            difference(&exact, &logits)
        };
        let flex = off(full(&case.model::<Flex>(), &case.tokens).into_data());
        let ndarray = case.model::<F64>().map(&mut Single);
        let ndarray = off(full(&ndarray, &case.tokens).into_data());
        prop_assert!(flex < SAME_F32.max(8.0 * ndarray), "{flex}, of NdArray {ndarray}");
    }

    #[test]
    fn absorbed_fusion_is_materialised_fusion(case in any_case(1..10)) {
        let model = case.model::<F64>();
        let forward = |form| model.forward_with(batch(&case.tokens), form).unwrap();
        let difference = difference(&forward(FusionForm::Absorbed), &forward(FusionForm::Materialised));
        prop_assert!(difference < SAME, "{difference}");
    }

    /// Prefill that skips the upper layers for all but the last position.
    #[test]
    fn last_logits_are_the_last_of_all(case in any_case(1..10), draft in 1usize..4) {
        let model = case.model::<F64>();
        let rows = case.tokens.len();
        let mut one = model.new_cache(rows, 16).unwrap();
        let mut other = one.clone();
        let drafts = vec![vec![3; draft]; rows];
        for tokens in [&case.tokens, &drafts] {
            let skipped = model.forward_cached(batch(tokens), &mut one, Logits::Last).unwrap();
            let all = model.forward_cached(batch(tokens), &mut other, Logits::All).unwrap();
            prop_assert_eq!(skipped.dims(), [rows, 1, VOCAB]);
            let difference = difference(&skipped, &last(all));
            prop_assert!(difference < SAME, "{difference}");
        }
    }

    #[test]
    fn no_attention_to_the_future(case in any_case(2..10), at in any::<prop::sample::Index>()) {
        let model = case.model::<F64>();
        let at = at.index(case.tokens[0].len());
        let mut changed = case.tokens.clone();
        for row in &mut changed {
            for token in &mut row[at..] {
                *token = (*token + 1) % VOCAB as u32;
            }
        }
        let (before, after) = (full(&model, &case.tokens), full(&model, &changed));
        if at > 0 {
            let same = difference(&before.clone().narrow(1, 0, at), &after.clone().narrow(1, 0, at));
            prop_assert!(same < SAME, "{same}");
        }
        let seq = case.tokens[0].len();
        let other = difference(&before.narrow(1, at, seq - at), &after.narrow(1, at, seq - at));
        prop_assert!(other > 1e-3, "a changed token changes its own logits: {other}");
    }

    /// Each row of a batch of prompts of different lengths, prefilled in two chunks and decoded,
    /// is what it is alone; whatever ids stand in the padding.
    #[test]
    fn padding_changes_nothing(
        case in any_case(2..10),
        lens in prop::collection::vec(any::<prop::sample::Index>(), 3),
        more in prop::collection::vec(any::<prop::sample::Index>(), 3),
        filler in 0..VOCAB as i64,
    ) {
        let model = case.model::<F64>();
        let device = Default::default();
        let cut = |at: &[prop::sample::Index]| -> Vec<Vec<u32>> {
            let rows = case.tokens.iter().zip(at);
            rows.map(|(row, at)| row[..1 + at.index(row.len())].to_vec()).collect()
        };
        let chunks = [cut(&lens), cut(&more), vec![vec![2]; case.tokens.len()]];
        let mut together = model.new_cache(case.tokens.len(), 32).unwrap();
        let mut alone: Vec<_> = case.tokens.iter().map(|_| model.new_cache(1, 32).unwrap()).collect();
        for rows in chunks {
            let padded = batch::<F64>(&rows);
            let padding = padded.padding().to_vec();
            let [n, seq] = padded.dims();
            let ids: Vec<i64> = rows.iter().zip(&padding)
                .flat_map(|(row, &p)| std::iter::repeat_n(filler, p).chain(row.iter().map(|&t| i64::from(t))))
                .collect();
            let ids = Tensor::<F64, 2, Int>::from_data(burn::tensor::TensorData::new(ids, [n, seq]), &device);
            let padded = TokenBatch::left_padded(ids, padding.clone()).unwrap();
            if together.is_empty() {
                let uncached = model.forward(padded.clone()).unwrap();
                for (i, row) in rows.iter().enumerate() {
                    let valid = uncached.clone().narrow(0, i, 1).narrow(1, padding[i], row.len());
                    let difference = difference(&valid, &full(&model, std::slice::from_ref(row)));
                    prop_assert!(difference < SAME, "uncached row {i}: {difference}");
                }
            }
            let all = model.forward_cached(padded, &mut together, Logits::All).unwrap();
            for (i, row) in rows.iter().enumerate() {
                let own = batch(std::slice::from_ref(row));
                let own = model.forward_cached(own, &mut alone[i], Logits::All).unwrap();
                let valid = all.clone().narrow(0, i, 1).narrow(1, padding[i], row.len());
                let difference = difference(&valid, &own);
                prop_assert!(difference < SAME, "row {i}: {difference}");
                prop_assert_eq!(together.row_lens()[i], alone[i].len());
            }
        }
    }

    #[test]
    fn fused_kv_with_one_hot_weights_is_lite(case in any_case(1..10), n in 2usize..5) {
        let case = deeper_than(case, n);
        let fused = case.model_with::<F64>(KvPlan::FusedKv { storage_layers: n });
        // Sources are [bottom, n]: keys from n, values from the bottom.
        let fused = set_fusion(fused, |name, source| match (name, source) {
            ("key_weight", 1) | ("value_weight", 0) => 1.0,
            _ => 0.0,
        });
        let lite = case.model_with::<F64>(KvPlan::FusedKvLite { storage_layers: n });
        let difference = difference(&full(&fused, &case.tokens), &full(&lite, &case.tokens));
        prop_assert!(difference < SAME, "{difference}");
    }

    #[test]
    fn lite_learnable_with_ones_is_lite(case in any_case(1..10), n in 1usize..5) {
        let case = deeper_than(case, n);
        let learnable = case.model_with::<F64>(KvPlan::FusedKvLiteLearnable { storage_layers: n });
        let learnable = set_fusion(learnable, |_, _| 1.0);
        let lite = case.model_with::<F64>(KvPlan::FusedKvLite { storage_layers: n });
        let difference = difference(&full(&learnable, &case.tokens), &full(&lite, &case.tokens));
        prop_assert!(difference < SAME, "{difference}");
    }

    #[test]
    fn cla_of_factor_one_is_standard(case in any_case(1..10)) {
        let cla = case.model_with::<F64>(KvPlan::Cla { factor: 1 });
        let standard = case.model_with::<F64>(KvPlan::Standard);
        let difference = difference(&full(&cla, &case.tokens), &full(&standard, &case.tokens));
        prop_assert!(difference == 0.0, "{difference}");
    }

    #[test]
    fn yoco_plus_plus_without_residual_is_yoco(case in any_case(1..10), n in 1usize..5) {
        let case = deeper_than(case, n);
        let plus = case.model_with::<F64>(KvPlan::YocoPlusPlus { storage_layers: n });
        let plus = set_fusion(plus, |_, _| 0.0);
        let yoco = case.model_with::<F64>(KvPlan::Yoco { storage_layers: n });
        let difference = difference(&full(&plus, &case.tokens), &full(&yoco, &case.tokens));
        prop_assert!(difference < SAME, "{difference}");
    }
}

fn deeper_than(mut case: Case, n: usize) -> Case {
    case.config.n_layers = case.config.n_layers.max(n + 1);
    case.of_one_kind()
}

/// Sets fusion weights by parameter name and source, residual weights by name (source 0).
fn set_fusion<B: Backend>(
    decoder: FusedKvDecoder<B>,
    value: fn(&str, usize) -> f64,
) -> FusedKvDecoder<B> {
    struct Set(Vec<String>, fn(&str, usize) -> f64);
    impl<B: Backend> ModuleMapper<B> for Set {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let [.., module, name] = self.0.as_slice() else {
                return param;
            };
            if !module.starts_with("kv_") {
                return param;
            }
            param.map(|old| {
                let sources = (0..old.dims()[0]).map(|source| {
                    old.clone().narrow(0, source, 1).zeros_like() + self.1(name, source)
                });
                Tensor::cat(sources.collect(), 0)
            })
        }
    }
    decoder.map(&mut Set(vec![], value))
}

/// The methods differ from each other: none is another under a new name.
#[test]
fn methods_are_distinct() {
    let config = small(KvPlan::Standard).with_n_layers(6);
    let tokens = vec![vec![1, 5, 2, 9, 3, 3, 7]];
    let case = Case {
        config,
        tokens: tokens.clone(),
        seed: 1,
    };
    let logits: Vec<_> = KvPlan::methods()
        .map(|method| {
            let plan = KvPlan::from_method(method, 6).unwrap();
            (method, full(&case.model_with::<F64>(plan), &tokens))
        })
        .collect();
    for (i, (a, x)) in logits.iter().enumerate() {
        for (b, y) in &logits[..i] {
            assert!(difference(x, y) > 1e-3, "{a} and {b} coincide");
        }
    }
}
