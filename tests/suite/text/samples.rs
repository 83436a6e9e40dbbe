//! What generation tells of its tokens, several samples of a prompt, and a cache to go on from.

use burn::tensor::activation::log_softmax;
use fusedkv::generate::{FinishReason, Likelihood, generate_from};
use fusedkv::{
    CacheError, ForwardError, FusedKvDecoder, GenerateError, GeneratedToken, GenerationConfig,
    Logits, TokenBatch, TokensError, generate,
};
use proptest::prelude::*;

use crate::models::{Case, F64, VOCAB, any_case, values};

fn ragged(case: &Case) -> Vec<Vec<u32>> {
    let rows = case.tokens.iter().enumerate();
    rows.map(|(i, row)| row[i.min(row.len() - 1)..].to_vec())
        .collect()
}

fn all(tokens: impl Iterator<Item = Result<GeneratedToken, GenerateError>>) -> Vec<GeneratedToken> {
    tokens.map(Result::unwrap).collect()
}

/// The logits after a text, from a pass of its own.
fn log_probabilities(model: &FusedKvDecoder<F64>, tokens: &[u32]) -> Vec<f64> {
    let batch = TokenBatch::from_rows(&[tokens], VOCAB, &Default::default()).unwrap();
    let logits = model.forward(batch).unwrap();
    values(&log_softmax(logits.narrow(1, tokens.len() - 1, 1), 2))
}

fn sampled(seed: u64) -> GenerationConfig {
    GenerationConfig::new()
        .with_max_new_tokens(6)
        .with_temperature(1.3)
        .with_top_k(Some(8))
        .with_repetition_penalty(1.2)
        .with_seed(seed)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever tokens are drawn by, their probabilities are the decoder's.
    #[test]
    fn log_probabilities_are_log_softmax_of_the_logits(
        case in any_case(1..8),
        seed in any::<u64>(),
        top in 0..VOCAB + 2,
        samples in 1usize..3,
    ) {
        let (model, prompts) = (case.model::<F64>(), ragged(&case));
        let config = sampled(seed).with_log_probabilities(Some(top)).with_samples(samples);
        let mut rows: Vec<_> = (0..prompts.len() * samples).map(|row| prompts[row / samples].clone()).collect();
        for token in all(generate(&model, &prompts, &config).unwrap()) {
            let expected = log_probabilities(&model, &rows[token.row]);
            let Likelihood { log_probability, top: found } = token.likelihood.unwrap();
            prop_assert!((log_probability - expected[token.id as usize]).abs() < 1e-5);
            prop_assert_eq!(found.len(), top.min(VOCAB));
            let mut ranked = expected.clone();
            ranked.sort_by(|a, b| b.total_cmp(a));
            for ((id, found), ranked) in found.iter().zip(ranked) {
                prop_assert!((found - expected[*id as usize]).abs() < 1e-5);
                prop_assert!((found - ranked).abs() < 1e-5);
            }
            rows[token.row].push(token.id);
        }
    }

    /// Samples of prompts that are read once are those of prompts that are read as often.
    #[test]
    fn samples_are_those_of_prompts_read_again(
        case in any_case(1..8),
        seed in any::<u64>(),
        samples in 1usize..4,
        stop in 0..VOCAB as u32,
    ) {
        let (model, prompts) = (case.model::<F64>(), ragged(&case));
        let config = sampled(seed).with_stop_tokens(vec![stop]);
        let again: Vec<_> = prompts.iter().flat_map(|prompt| vec![prompt.clone(); samples]).collect();
        let expected = all(generate(&model, &again, &config).unwrap());
        let found = all(generate(&model, &prompts, &config.with_samples(samples)).unwrap());
        prop_assert_eq!(found, expected);
    }

    /// A cache that holds some of every prompt changes nothing, and is left with all that was read.
    #[test]
    fn generation_goes_on_from_any_cache(case in any_case(2..8), seed in any::<u64>(), cut in 0.0..1.0f64) {
        let (model, prompts) = (case.model::<F64>(), ragged(&case));
        let config = sampled(seed);
        let expected = all(generate(&model, &prompts, &config).unwrap());
        let starts: Vec<_> = prompts.iter()
            .map(|prompt| &prompt[..(prompt.len() as f64 * cut) as usize])
            .collect();
        prop_assume!(starts.iter().all(|start| !start.is_empty()));
        let mut cache = model.new_cache(prompts.len(), 24).unwrap();
        let batch = TokenBatch::from_rows(&starts, VOCAB, &Default::default()).unwrap();
        model.forward_cached(batch, &mut cache, Logits::Last).unwrap();
        let mut generation = generate_from(&model, cache, &prompts, &config).unwrap();
        prop_assert_eq!(all(generation.by_ref()), expected);
        let read: Vec<_> = prompts.iter().map(|prompt| prompt.len() + 5).collect();
        prop_assert_eq!(generation.into_cache().row_lens(), read);
    }

    /// A row that is ended leaves the others what they are.
    #[test]
    fn rows_can_be_ended(case in any_case(1..8), seed in any::<u64>(), after in 0usize..4) {
        let (model, prompts) = (case.model::<F64>(), ragged(&case));
        let config = sampled(seed).with_samples(2);
        let expected = all(generate(&model, &prompts, &config).unwrap());
        let mut generation = generate(&model, &prompts, &config).unwrap();
        let (mut found, mut seen) = (vec![], 0);
        while let Some(token) = generation.next() {
            let token = token.unwrap();
            seen += usize::from(token.row == 1);
            found.push(token);
            if seen == after + 1 {
                generation.end(1);
            }
        }
        let mut left = after + 1;
        let expected: Vec<_> = expected.into_iter().filter(|token| {
            let kept = token.row != 1 || left > 0;
            left -= usize::from(token.row == 1 && left > 0);
            kept
        }).collect();
        prop_assert_eq!(found, expected);
    }
}

fn fixed() -> FusedKvDecoder<F64> {
    let config = crate::models::fixed(fusedkv::KvPlan::FusedKv { storage_layers: 2 });
    crate::models::model(&config, 3)
}

#[test]
fn nothing_is_told_that_was_not_asked_for() {
    let config = GenerationConfig::new().with_max_new_tokens(2);
    let tokens = all(generate(&fixed(), &[[1, 2]], &config).unwrap());
    assert!(tokens.iter().all(|token| token.likelihood.is_none()));
    assert_eq!(tokens[1].finish, Some(FinishReason::Length));
}

#[test]
fn all_rows_can_be_ended() {
    let model = fixed();
    let config = GenerationConfig::new()
        .with_max_new_tokens(9)
        .with_samples(3);
    let mut generation = generate(&model, &[[1, 2]], &config).unwrap();
    generation.next().unwrap().unwrap();
    (0..3).for_each(|row| generation.end(row));
    assert_eq!((generation.next(), generation.next()), (None, None));
}

#[test]
fn caches_that_do_not_fit_are_refused() {
    let model = fixed();
    let config = GenerationConfig::new().with_max_new_tokens(4);
    let refused =
        |tokens: usize, capacity: usize, prompts: &[Vec<u32>], config: &GenerationConfig| {
            let mut cache = model.new_cache(1, capacity).unwrap();
            let read =
                TokenBatch::from_rows(&[vec![1; tokens]], VOCAB, &Default::default()).unwrap();
            model
                .forward_cached(read, &mut cache, Logits::Last)
                .unwrap();
            generate_from(&model, cache, prompts, config)
                .map(|_| ())
                .unwrap_err()
        };
    let cache = |error: CacheError| GenerateError::Forward(ForwardError::Cache(error));
    let rows = CacheError::BatchMismatch {
        found: 2,
        expected: 1,
    };
    assert_eq!(
        refused(2, 8, &[vec![1; 3], vec![1; 3]], &config),
        cache(rows)
    );
    let nothing = GenerateError::NothingToRead {
        row: 0,
        tokens: 2,
        cached: 2,
    };
    assert_eq!(refused(2, 8, &[vec![1; 2]], &config), nothing);
    let full = CacheError::OverCapacity {
        requested: 7,
        len: 2,
        capacity: 8,
    };
    assert_eq!(refused(2, 8, &[vec![1; 6]], &config), cache(full));
    // What is cached counts too.
    let unknown = TokensError::OutOfVocabulary {
        row: 0,
        position: 0,
        token: 99,
        vocab_size: VOCAB,
    };
    assert_eq!(
        refused(2, 8, &[vec![99, 1, 1]], &config),
        GenerateError::Forward(ForwardError::Tokens(unknown))
    );
    let error = refused(2, 8, &[vec![1; 3]], &config.with_samples(0));
    assert!(
        matches!(
            error,
            GenerateError::Setting {
                field: "samples",
                ..
            }
        ),
        "{error}"
    );
}
