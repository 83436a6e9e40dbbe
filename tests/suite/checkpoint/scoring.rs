//! Scores against the definition, with and without the cache.

use burn::tensor::activation::log_softmax;
use fusedkv::{ForwardError, ScoreConfig, ScoreError, TokensError, score, score_with};
use proptest::prelude::*;

use crate::models::{Case, F64, VOCAB, any_case, values};

/// Σ −log p of every token but the first, or all behind one that every window begins with, window by
/// window, each from a pass of its own; and the logits after each token.
fn plain(
    case: &Case,
    tokens: &[u32],
    context: usize,
    stride: usize,
    bos: Option<u32>,
) -> (f64, Vec<f64>) {
    let model = case.model::<F64>();
    let (mut nll, mut rows) = (0.0, Vec::new());
    let first = if bos.is_some() { 0 } else { 1 };
    for target in first..=tokens.len() {
        // The first window that has the token before the target.
        let window = (0..).find(|w| w * stride + context >= target).unwrap();
        let read = bos
            .into_iter()
            .chain(tokens[window * stride..target].to_vec());
        let read: Vec<u32> = read.collect();
        let batch = fusedkv::TokenBatch::from_rows(&[&read], VOCAB, &Default::default()).unwrap();
        let logits = model.forward(batch).unwrap();
        let last = logits.narrow(1, read.len() - 1, 1);
        if target > 0 {
            rows.extend(values(&last));
        }
        if let Some(&token) = tokens.get(target) {
            nll -= values(&log_softmax(last, 2))[token as usize];
        }
    }
    (nll, rows)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_token_is_scored_once(
        case in any_case(2..24),
        context in 1usize..12,
        stride in 1usize..12,
        chunk in 1usize..8,
        bos in prop::option::of(0..VOCAB as u32),
    ) {
        let stride = stride.min(context);
        let tokens = &case.tokens[0];
        let (expected, logits) = plain(&case, tokens, context, stride, bos);
        let model = case.model::<F64>();
        for chunk in [None, Some(chunk)] {
            let config = ScoreConfig::new(context)
                .with_stride(Some(stride))
                .with_bos(bos)
                .with_chunk(chunk);
            let mut rows = Vec::new();
            let score = score_with::<_, ScoreError>(&model, tokens, &config, |logits| {
                rows.extend_from_slice(logits);
                Ok(())
            }).unwrap();
            let predicted = tokens.len() - usize::from(bos.is_none());
            prop_assert_eq!((score.tokens, rows.len()), (predicted, tokens.len() * VOCAB));
            for (row, expected) in rows.iter().zip(&logits) {
                prop_assert!((f64::from(*row) - expected).abs() < 1e-5, "{row} {expected}");
            }
            prop_assert!((score.nll - expected).abs() < 1e-5 * expected, "{} {}", score.nll, expected);
            prop_assert_eq!(score.perplexity(), (score.nll / score.tokens as f64).exp());
            prop_assert_eq!(score.perplexity_per_word(2), (score.nll / 2.0).exp());
        }
    }
}

/// However long a chunk may be, a window is no longer than it is.
#[test]
fn a_chunk_without_end_is_the_whole_window() {
    let config = crate::models::fixed(fusedkv::KvPlan::Standard);
    let model = crate::models::model::<F64>(&config, 0);
    let tokens = [1, 2, 3, 4, 5, 6];
    let score = |chunk| {
        let config = ScoreConfig::new(4).with_chunk(Some(chunk));
        score(&model, &tokens, &config).unwrap()
    };
    assert_eq!(score(usize::MAX), score(4));
}

#[test]
fn what_cannot_be_scored_is_said() {
    let config = crate::models::fixed(fusedkv::KvPlan::Standard);
    let model = crate::models::model::<F64>(&config, 0);
    let fails = |tokens: &[u32], config: ScoreConfig| score(&model, tokens, &config).unwrap_err();
    let setting = |field, value, largest| ScoreError::Setting {
        field,
        value,
        largest,
    };
    let whole = ScoreConfig::new(8);
    assert_eq!(fails(&[1], whole), ScoreError::TooFewTokens(1));
    assert_eq!(
        fails(&[1, 2], ScoreConfig::new(65)),
        setting("context", 65, 64)
    );
    let behind = |bos| whole.with_bos(Some(bos));
    assert_eq!(fails(&[], behind(1)), ScoreError::TooFewTokens(0));
    assert_eq!(
        fails(&[1, 2], ScoreConfig::new(64).with_bos(Some(1))),
        setting("context", 64, 63)
    );
    assert_eq!(
        fails(&[1, 2], ScoreConfig::new(usize::MAX)),
        setting("context", usize::MAX, 64)
    );
    assert_eq!(
        fails(&[1, 2], whole.with_stride(Some(9))),
        setting("stride", 9, 8)
    );
    assert_eq!(
        fails(&[1, 2], whole.with_chunk(Some(0))),
        setting("chunk", 0, usize::MAX)
    );
    // Beyond the first window, where it is a target before it is read.
    let mut tokens = vec![1; 12];
    tokens[8] = 11;
    let unknown = |position| {
        ScoreError::Forward(ForwardError::Tokens(TokensError::OutOfVocabulary {
            row: 0,
            position,
            token: 11,
            vocab_size: 11,
        }))
    };
    assert_eq!(fails(&tokens, whole), unknown(8));
    assert_eq!(fails(&tokens, behind(1)), unknown(8));
    let error = fails(&[1], behind(11));
    assert_eq!(error, setting("bos", 11, 10));
    assert_eq!(error.to_string(), "bos is 11, expected 0 to 10");
}
