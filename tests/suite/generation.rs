//! Generation against the plainest loop there is, and what stops it.

use burn::tensor::{Tensor, backend::Backend};
use fusedkv::backend::Flex;
use fusedkv::generate::FinishReason;
use fusedkv::{
    ForwardError, FusedKvDecoder, GenerateError, GeneratedToken, GenerationConfig, TokensError,
    generate,
};
use proptest::prelude::*;

use crate::models::{Case, F64, VOCAB, any_case, changed, small};

fn rows(tokens: impl Iterator<Item = GeneratedToken>, n: usize) -> Vec<Vec<u32>> {
    let mut rows = vec![vec![]; n];
    tokens.for_each(|token| rows[token.row].push(token.id));
    rows
}

fn run(case: &Case, prompts: &[Vec<u32>], config: &GenerationConfig) -> Vec<GeneratedToken> {
    let model = case.model::<F64>();
    generate(&model, prompts, config)
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Greedy through the cache, for a ragged batch with rows that stop early, is the argmax of a
    /// full forward pass over everything so far.
    #[test]
    fn greedy_is_argmax_without_a_cache(case in any_case(1..8), stop in 0..VOCAB as u32) {
        let prompts: Vec<Vec<u32>> = case.tokens.iter().enumerate()
            .map(|(i, row)| row[i.min(row.len() - 1)..].to_vec()).collect();
        let config = GenerationConfig::new().with_max_new_tokens(6).with_stop_tokens(vec![stop]);
        let found = rows(run(&case, &prompts, &config).into_iter(), prompts.len());
        let model = case.model::<F64>();
        for (prompt, found) in prompts.iter().zip(found) {
            let mut tokens = prompt.clone();
            let mut expected = vec![];
            while expected.len() < 6 && expected.last() != Some(&stop) {
                let batch = fusedkv::TokenBatch::from_rows(&[tokens.clone()], VOCAB, &Default::default()).unwrap();
                let logits = model.forward(batch).unwrap();
                let [_, seq, _] = logits.dims();
                let next = logits.narrow(1, seq - 1, 1).argmax(2).into_data().iter::<u32>().next().unwrap();
                tokens.push(next);
                expected.push(next);
            }
            prop_assert_eq!(found, expected);
        }
    }

    /// The same seed draws the same, another seed (almost surely) something else, and a row draws
    /// the same whatever else is in the batch.
    #[test]
    fn sampling_is_reproducible(case in any_case(1..8), seed in 0u64..1000) {
        let config = GenerationConfig::new().with_max_new_tokens(12).with_temperature(1.5)
            .with_top_k(Some(9)).with_top_p(Some(0.95)).with_repetition_penalty(1.1).with_seed(seed);
        let prompts = vec![case.tokens[0].clone(), case.tokens[0].clone()];
        let first = run(&case, &prompts, &config);
        prop_assert_eq!(&first, &run(&case, &prompts, &config));
        let alone = run(&case, &prompts[..1], &config);
        let both = rows(first.into_iter(), 2);
        prop_assert_eq!(&rows(alone.into_iter(), 1)[0], &both[0]);
    }
}

fn fixed_case() -> Case {
    let plan = fusedkv::KvPlan::FusedKv { storage_layers: 2 };
    Case {
        config: small(plan).with_max_positions(16),
        tokens: vec![],
        seed: 3,
    }
}

#[test]
fn equal_prompts_are_continued_differently() {
    let config = GenerationConfig::new()
        .with_max_new_tokens(12)
        .with_temperature(1.5);
    let both = rows(
        run(&fixed_case(), &[vec![1, 2], vec![1, 2]], &config).into_iter(),
        2,
    );
    assert_ne!(both[0], both[1]);
}

#[test]
fn rows_say_why_they_end() {
    let case = fixed_case();
    let config = GenerationConfig::new().with_max_new_tokens(3);
    let tokens = run(&case, &[vec![1, 2]], &config);
    let finish: Vec<_> = tokens.iter().map(|token| token.finish).collect();
    assert_eq!(finish, [None, None, Some(FinishReason::Length)]);
    let stopping = config.with_stop_tokens(vec![tokens[0].id]);
    let tokens = run(&case, &[vec![1, 2]], &stopping);
    assert_eq!(tokens.len(), 1);
    assert_eq!(tokens[0].finish, Some(FinishReason::Stop));
}

#[test]
fn wrong_settings_and_prompts_are_refused_before_any_work() {
    let model = fixed_case().model::<F64>();
    let refused = |prompts: &[Vec<u32>], config: GenerationConfig| {
        generate(&model, prompts, &config).expect_err("refused")
    };
    let good = vec![vec![1, 2]];
    let config = GenerationConfig::new().with_max_new_tokens(4);
    for (field, config) in [
        ("max_new_tokens", config.clone().with_max_new_tokens(0)),
        ("temperature", config.clone().with_temperature(-0.1)),
        ("temperature", config.clone().with_temperature(f64::NAN)),
        ("top_k", config.clone().with_top_k(Some(0))),
        ("top_p", config.clone().with_top_p(Some(0.0))),
        ("top_p", config.clone().with_top_p(Some(1.1))),
        (
            "repetition_penalty",
            config.clone().with_repetition_penalty(0.0),
        ),
    ] {
        let error = refused(&good, config);
        assert!(
            matches!(error, GenerateError::Setting { field: f, .. } if f == field),
            "{error}"
        );
    }
    let tokens = |error| GenerateError::Forward(ForwardError::Tokens(error));
    assert_eq!(refused(&[], config.clone()), tokens(TokensError::NoRows));
    assert_eq!(
        refused(&[vec![1], vec![]], config.clone()),
        tokens(TokensError::EmptyRow { row: 1 })
    );
    let unknown = TokensError::OutOfVocabulary {
        row: 0,
        position: 1,
        token: 11,
        vocab_size: VOCAB,
    };
    assert_eq!(refused(&[vec![1, 11]], config.clone()), tokens(unknown));
    let long = |positions| {
        GenerateError::Forward(ForwardError::TooManyPositions {
            row: 0,
            positions,
            max_positions: 16,
        })
    };
    assert_eq!(refused(&[vec![1; 13]], config.clone()), long(17));
    let endless = config.with_max_new_tokens(usize::MAX);
    assert_eq!(refused(&good, endless), long(usize::MAX));
}

/// A decoder that knows every token but `unknown`, whose embedding is not a number.
fn without<B: Backend>(unknown: usize) -> FusedKvDecoder<B> {
    let mut case = fixed_case();
    case.config.tie_embeddings = false;
    let embedding = "model.embed_tokens.weight";
    changed(case.model(), embedding, |weight: Tensor<B, 2>| {
        let [_, width] = weight.dims();
        let row = Tensor::full([1, width], f64::NAN, &weight.device());
        weight.slice_assign([unknown..unknown + 1, 0..width], row)
    })
}

/// A row without numbers ends in its turn; the others are given what they are given without it.
fn ends_its_row_alone<B: Backend>() {
    let config = GenerationConfig::new().with_max_new_tokens(4);
    let model = without::<B>(7);
    let good = [vec![1, 2], vec![3, 4, 5]];
    let tokens = generate(&model, &good, &config).unwrap();
    let expected = rows(tokens.map(Result::unwrap), 2);

    let prompts = [good[0].clone(), vec![7], good[1].clone(), vec![7, 1]];
    let mut tokens = generate(&model, &prompts, &config).unwrap();
    let first: Vec<_> = tokens.by_ref().take(4).collect();
    let failed = |row| GenerateError::NotANumber { row, generated: 0 };
    assert!(first[0].is_ok() && first[2].is_ok(), "{first:?}");
    assert_eq!((&first[1], &first[3]), (&Err(failed(1)), &Err(failed(3))));
    assert_eq!(tokens.cache().batch(), 2);
    let rest: Vec<_> = tokens.by_ref().collect();
    let found = rows(first.into_iter().chain(rest).flatten(), 4);
    assert_eq!([&found[0], &found[2]], [&expected[0], &expected[1]]);
    assert!(found[1].is_empty() && found[3].is_empty());
    assert_eq!((tokens.next(), tokens.next()), (None, None));
}

#[test]
fn logits_that_are_not_numbers_end_their_row_alone() {
    ends_its_row_alone::<F64>();
    ends_its_row_alone::<Flex>();
}

#[test]
fn a_row_that_fails_later_says_when() {
    let config = GenerationConfig::new().with_max_new_tokens(4);
    let prompt = [vec![1, 2]];
    let start = generate(&without::<F64>(VOCAB - 1), &prompt, &config)
        .unwrap()
        .next();
    let drawn = start.unwrap().unwrap().id;
    let model = without::<F64>(drawn as usize);
    let mut tokens = generate(&model, &prompt, &config).unwrap();
    assert_eq!(tokens.next().unwrap().unwrap().id, drawn);
    let failed = GenerateError::NotANumber {
        row: 0,
        generated: 1,
    };
    assert_eq!(tokens.next(), Some(Err(failed)));
    assert_eq!((tokens.next(), tokens.next()), (None, None));
}
