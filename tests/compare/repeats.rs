//! Losses told apart by what the window held of a target before.

use std::sync::PoisonError;

use burn::tensor::{Int, Tensor, TensorData};
use burn_dataset::Dataset;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::train::compare::RunResult;
use fusedkv::train::{Repeat, TokenWindow, TokenWindows, evaluate};
use tempfile::tempdir;

use super::{TURN, Train, VOCAB, base, comparison, task};

/// Tokens of which some return after the same one and some after others.
fn windows(seed: u64) -> (TokenWindows, TokenWindows) {
    let mut state = seed;
    let tokens: Vec<u32> = (0..600)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as u32 % (VOCAB as u32 / 2)
        })
        .collect();
    TokenWindows::split(tokens, 24, 0.2).unwrap()
}

/// By searching all that was read.
fn repeat(window: &TokenWindow, at: usize) -> Repeat {
    let (input, target) = (window.inputs[at], window.targets[at]);
    let before = 0..at;
    if before
        .clone()
        .any(|i| window.inputs[i] == input && window.targets[i] == target)
    {
        Repeat::Pair
    } else if window.inputs[..=at].contains(&target) {
        Repeat::Token
    } else {
        Repeat::None
    }
}

#[test]
fn losses_of_each_kind_are_means_of_the_logits_own() {
    let model = base().with_init_std(0.3).init::<Flex>(&FlexDevice).unwrap();
    let (_, valid) = windows(3);
    let mut expected = [(0, 0.0); 3];
    for index in 0..valid.len() {
        let window = valid.get(index).unwrap();
        let tokens: Vec<i64> = window.inputs.iter().map(|&token| token.into()).collect();
        let tokens = TensorData::new(tokens, [1, window.inputs.len()]);
        let tokens = Tensor::<Flex, 2, Int>::from_data(tokens, &FlexDevice);
        let logits: Vec<f64> = model.forward(tokens).unwrap().into_data().iter().collect();
        for (at, logits) in logits.chunks(VOCAB).enumerate() {
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            let loss = sum.ln() - logits[window.targets[at] as usize];
            let (targets, total) = &mut expected[repeat(&window, at) as usize];
            *targets += 1;
            *total += loss;
        }
    }
    // Of windows read together, the last of them fewer.
    let found = evaluate(&model, &valid, 4, None).unwrap();
    assert_eq!(found.repeats.len(), 3);
    for (found, (targets, total)) in found.repeats.iter().zip(expected) {
        let (kind, mean) = (found.repeat, total / targets as f64);
        assert_eq!(found.targets, targets, "{kind:?}");
        assert!(
            (found.loss - mean).abs() < 1e-4,
            "{kind:?}: {} {mean}",
            found.loss
        );
    }
    let targets: usize = expected.iter().map(|(targets, _)| targets).sum();
    let mean = expected.iter().map(|(_, total)| total).sum::<f64>() / targets as f64;
    assert!((found.loss - mean).abs() < 1e-4);
    assert_eq!(targets, valid.len() * 24);
}

#[test]
fn a_run_on_text_keeps_them_and_one_on_a_task_has_none() {
    let directory = tempdir().unwrap();
    let comparison = comparison(directory.path(), &["standard"], 1);
    let (train, valid) = windows(5);
    let results = {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        comparison
            .run::<Train>(&train, &valid, &[FlexDevice], |_| {})
            .unwrap()
    };
    let repeats = &results[0].repeats;
    let targets: usize = repeats.iter().map(|kind| kind.targets).sum();
    let sum: f64 = repeats
        .iter()
        .map(|kind| kind.loss * kind.targets as f64)
        .sum();
    assert!((sum / targets as f64 - results[0].valid_loss).abs() < 1e-5);

    // As it was before they were kept.
    let mut old = serde_json::to_value(&results[0]).unwrap();
    old.as_object_mut().unwrap().remove("repeats").unwrap();
    let read: RunResult = serde_json::from_value(old).unwrap();
    assert_eq!(read.repeats, []);

    let model = base().init::<Flex>(&FlexDevice).unwrap();
    assert_eq!(evaluate(&model, &task(1), 4, None).unwrap().repeats, []);
}
