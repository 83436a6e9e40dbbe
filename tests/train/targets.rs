//! Which targets count, and windows that are not what their data set says.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn_dataset::Dataset;
use fusedkv::backend::{Autodiff, Flex, FlexDevice};
use fusedkv::train::{
    Answer, EpochLosses, LogLine, Progress, Run, TokenWindow, TrainError, Trained, TrainingConfig,
    Windows, evaluate, train_on,
};
use fusedkv::{KvPlan, TokenBatch};
use tempfile::tempdir;

use super::{VOCAB, decoder, in_turn, logits};

const CONTEXT: usize = 12;

/// Windows of one sequence from different starts, and what is particular about some of them.
#[derive(Debug)]
struct Sequence {
    len: usize,
    answers: fn(usize) -> Option<Vec<usize>>,
    /// Fails this read of the last window, counted from 1.
    fails: Option<usize>,
    reads: AtomicUsize,
}

impl Sequence {
    fn new(len: usize, answers: fn(usize) -> Option<Vec<usize>>) -> Self {
        Self {
            len,
            answers,
            fails: None,
            reads: AtomicUsize::new(0),
        }
    }
}

impl Dataset<TokenWindow> for Sequence {
    fn get(&self, index: usize) -> Option<TokenWindow> {
        if index + 1 == self.len {
            let read = 1 + self.reads.fetch_add(1, Ordering::Relaxed);
            if self.fails == Some(read) {
                return None;
            }
        }
        let mut tokens = vec![(index % VOCAB) as u32, (index * 3 % VOCAB) as u32];
        while tokens.len() <= CONTEXT {
            let last = tokens.len() - 1;
            tokens.push((tokens[last] + 3 * tokens[last - 1] + 1) % VOCAB as u32);
        }
        let answers = (self.answers)(index).map(|positions| {
            let distance = 1;
            let answer = |position| Answer { position, distance };
            positions.into_iter().map(answer).collect()
        });
        Some(TokenWindow {
            inputs: tokens[..CONTEXT].to_vec(),
            targets: tokens[1..].to_vec(),
            answers,
        })
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl Windows for Sequence {
    fn context(&self) -> usize {
        CONTEXT
    }

    fn check_vocabulary(&self, _vocab_size: usize) -> Result<(), TrainError> {
        Ok(())
    }

    fn fingerprint(&self) -> u64 {
        0
    }
}

/// No, one, a few and, where none are named, all targets.
fn unequal(index: usize) -> Option<Vec<usize>> {
    match index % 4 {
        0 => Some(vec![]),
        1 => Some(vec![CONTEXT - 1]),
        2 => Some((2..2 + index % 7).collect()),
        _ => None,
    }
}

fn all(_: usize) -> Option<Vec<usize>> {
    None
}

fn none(_: usize) -> Option<Vec<usize>> {
    Some(vec![])
}

fn config() -> TrainingConfig {
    TrainingConfig::new(
        decoder(KvPlan::FusedKv { storage_layers: 2 }),
        CONTEXT,
        8,
        10,
    )
    .with_epochs(3)
    .with_warmup_steps(2)
    .with_learning_rate(1e-2)
}

fn run(
    config: &TrainingConfig,
    windows: [Sequence; 2],
    run: &Run,
    devices: usize,
) -> Result<Trained<Flex>, TrainError> {
    let [train, valid] = windows;
    let run = run.clone().with_progress(Progress::Quiet);
    let devices = vec![FlexDevice; devices];
    in_turn(|| train_on::<Autodiff<Flex>>(config, train, valid, &run, &devices))
}

fn fails(config: &TrainingConfig, train: Sequence, valid: Sequence) -> TrainError {
    let directory = tempdir().unwrap();
    run(config, [train, valid], &Run::new(directory.path()), 1).unwrap_err()
}

#[test]
fn every_target_that_counts_weighs_the_same_however_a_step_is_divided() {
    let train = |accumulation, devices| {
        let directory = tempdir().unwrap();
        let config = config().with_accumulation(accumulation);
        let windows = [Sequence::new(40, unequal), Sequence::new(30, unequal)];
        run(&config, windows, &Run::new(directory.path()), devices).unwrap()
    };
    let expected = train(1, 1);
    for (accumulation, devices) in [(2, 1), (8, 1), (1, 2), (2, 4)] {
        let found = train(accumulation, devices);
        for (found, expected) in found.epochs.iter().zip(&expected.epochs) {
            let norms = [found, expected].map(|e| e.gradient_norms.as_ref().unwrap().all);
            let off = (found.train - expected.train).abs()
                + (found.valid - expected.valid).abs()
                + (norms[0] - norms[1]).abs();
            assert!(
                off < 1e-3,
                "{accumulation} {devices}: {found:?} {expected:?}"
            );
        }
    }
}

#[test]
fn losses_are_means_over_the_targets_that_count() {
    let directory = tempdir().unwrap();
    let windows = [Sequence::new(40, unequal), Sequence::new(30, unequal)];
    let trained = run(&config(), windows, &Run::new(directory.path()), 1).unwrap();
    let valid = Sequence::new(30, unequal);
    let (mut sum, mut count) = (0.0, 0);
    for index in 0..valid.len() {
        let window = valid.get(index).unwrap();
        let tokens = TokenBatch::from_rows(&[&window.inputs], VOCAB, &FlexDevice).unwrap();
        let logits = trained.model.forward(tokens).unwrap().into_data();
        let logits: Vec<f64> = logits.iter().collect();
        for (position, counts) in window.counts().into_iter().enumerate() {
            if counts {
                let logits = &logits[position * VOCAB..(position + 1) * VOCAB];
                let all: f64 = logits.iter().map(|logit| logit.exp()).sum();
                sum += all.ln() - logits[window.targets[position] as usize];
                count += 1;
            }
        }
    }
    let expected = sum / f64::from(count);
    assert!((trained.valid_loss - expected).abs() < 1e-5, "{expected}");
    for batch_size in [1, 7, 100] {
        let found = evaluate(&trained.model, &valid, batch_size, None).unwrap();
        assert!((found.loss - expected).abs() < 1e-5, "{found:?} {expected}");
    }
    let log = fs::read_to_string(directory.path().join("metrics.jsonl")).unwrap();
    let last = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    let LogLine::Valid { loss, .. } = last else {
        panic!("{last:?}");
    };
    assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
}

#[test]
fn windows_without_a_target_that_counts_are_an_error() {
    let error = fails(&config(), Sequence::new(40, none), Sequence::new(30, all));
    assert!(
        matches!(error, TrainError::NoTargets { step: Some(1) }),
        "{error}"
    );
    let error = fails(&config(), Sequence::new(40, all), Sequence::new(30, none));
    assert!(
        matches!(error, TrainError::NoTargets { step: None }),
        "{error}"
    );
    let model = config().model.init::<Flex>(&FlexDevice).unwrap();
    let evaluated = in_turn(|| evaluate(&model, &Sequence::new(30, none), 4, None));
    let error = evaluated.unwrap_err();
    assert!(
        matches!(error, TrainError::NoTargets { step: None }),
        "{error}"
    );
}

#[test]
fn windows_that_are_not_what_their_data_set_says_are_an_error() {
    let mut train = Sequence::new(20, all);
    train.fails = Some(2);
    let error = fails(&config(), train, Sequence::new(10, all));
    let found = matches!(
        error,
        TrainError::MissingWindow {
            index: 19,
            windows: 20
        }
    );
    assert!(found, "{error}");

    let beyond = |index| Some(vec![index + 1]);
    let error = fails(
        &config(),
        Sequence::new(10, beyond),
        Sequence::new(40, beyond),
    );
    assert!(
        error.to_string().contains("has answer position 12"),
        "{error}"
    );
    // Data whose first window has no answers say that none has.
    let later = |index| (index > 0).then(Vec::new);
    let error = fails(&config(), Sequence::new(20, later), Sequence::new(10, all));
    assert!(
        matches!(
            error,
            TrainError::Window {
                field: "answers",
                ..
            }
        ),
        "{error}"
    );
    let long = TrainingConfig {
        context: CONTEXT - 1,
        ..config()
    };
    let error = fails(&long, Sequence::new(20, all), Sequence::new(10, all));
    assert!(matches!(error, TrainError::Setting { .. }), "{error}");
}

#[test]
fn an_epoch_whose_validation_stopped_is_made_again() {
    let windows = || [Sequence::new(40, all), Sequence::new(30, all)];
    let directory = tempdir().unwrap();
    let whole = run(&config(), windows(), &Run::new(directory.path()), 1).unwrap();

    let directory = tempdir().unwrap();
    let path = directory.path();
    let [train, mut valid] = windows();
    valid.fails = Some(2);
    let error = run(&config(), [train, valid], &Run::new(path), 1).unwrap_err();
    let missing = matches!(
        error,
        TrainError::MissingWindow {
            index: 29,
            windows: 30
        }
    );
    assert!(missing, "{error}");
    let kept: Vec<EpochLosses> =
        serde_json::from_slice(&fs::read(path.join("losses.json")).unwrap()).unwrap();
    assert_eq!(kept, whole.epochs[..1]);
    assert!(!path.join("checkpoint/model-2.mpk").exists());
    let log = fs::read_to_string(path.join("metrics.jsonl")).unwrap();
    assert_eq!(log.matches(r#""split":"valid""#).count(), 1);

    let resumed = Run::new(path).with_resume(true);
    let resumed = run(&config(), windows(), &resumed, 1).unwrap();
    assert_eq!(resumed.epochs, whole.epochs);
    assert_eq!(
        logits(&resumed.model, &FlexDevice),
        logits(&whole.model, &FlexDevice)
    );
}
