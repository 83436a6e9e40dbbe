//! Training end to end on tiny models, and what it refuses.

use std::path::Path;

use burn::data::dataset::Dataset;
use burn::tensor::Tensor;
use fusedkv::backend::{Autodiff, Flex};
use fusedkv::train::{
    MIN_VOCAB_SIZE, TextStream, TokenWindows, TrainError, Trained, TrainingConfig, encode,
    load_model, save_model, train, train_bpe,
};
use fusedkv::{FusedKvDecoderConfig, KvPlan, TokenBatch};
use proptest::prelude::*;

const VOCAB: usize = 16;

fn config() -> TrainingConfig {
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let model = FusedKvDecoderConfig::new(VOCAB, 16, 4, 2, 2, 8, 32, plan).with_rope_theta(1e4);
    TrainingConfig::new(model)
        .with_context(16)
        .with_batch_size(4)
        .with_steps(40)
        .with_epoch_steps(10)
        .with_warmup_steps(5)
        .with_learning_rate(1e-2)
}

/// A sequence in which each token but a few follows from the one before.
fn tokens() -> Vec<u32> {
    (0..2000u32)
        .map(|i| (i * i / 7 + 3 * (i % 5)) % 11)
        .collect()
}

fn run(config: &TrainingConfig, directory: &Path) -> Result<Trained<Flex>, TrainError> {
    train::<Autodiff<Flex>>(config, tokens(), directory, &Default::default())
}

#[test]
fn loss_falls_and_a_resumed_run_is_the_uninterrupted_one() {
    let whole = tempfile::tempdir().unwrap();
    let trained = run(&config(), whole.path()).unwrap();
    let untrained = (VOCAB as f64).ln();
    assert!(
        trained.valid_loss < untrained - 0.5,
        "{}",
        trained.valid_loss
    );
    assert_eq!(trained.tokens, 40 * 4 * 16);

    // As if it had been killed after the third epoch.
    let killed = tempfile::tempdir().unwrap();
    copy_checkpoint(whole.path(), killed.path(), 3);
    let resumed = run(&config().with_resume(true), killed.path()).unwrap();
    assert_eq!(resumed.tokens, 10 * 4 * 16);
    assert_eq!(resumed.valid_loss, trained.valid_loss);
    assert_eq!(resumed.train_loss, trained.train_loss);

    // Nothing left to do.
    let again = run(&config().with_resume(true), whole.path()).unwrap();
    assert_eq!((again.tokens, again.valid_loss), (0, trained.valid_loss));
}

/// Copies one epoch's checkpoint.
fn copy_checkpoint(from: &Path, to: &Path, epoch: usize) {
    std::fs::create_dir(to.join("checkpoint")).unwrap();
    for part in ["model", "optim", "scheduler"] {
        let file = format!("checkpoint/{part}-{epoch}.mpk");
        std::fs::copy(from.join(&file), to.join(&file)).unwrap();
    }
}

#[test]
fn runs_that_make_no_sense_are_refused_before_any_work() {
    let directory = tempfile::tempdir().unwrap();
    let run_in = directory.path().join("run");
    let refused = |config: TrainingConfig| run(&config, &run_in).expect_err("refused");
    for (name, config) in [
        ("context", config().with_context(0)),
        ("batch_size", config().with_batch_size(0)),
        ("steps", config().with_steps(0)),
        ("epoch_steps", config().with_epoch_steps(0)),
        ("learning_rate", config().with_learning_rate(0.0)),
        ("weight_decay", config().with_weight_decay(-0.1)),
        ("grad_clip", config().with_grad_clip(Some(0.0))),
        ("valid_fraction", config().with_valid_fraction(1.0)),
    ] {
        let error = refused(config);
        assert!(
            matches!(error, TrainError::Range { field, .. } if field == name),
            "{error}"
        );
    }
    let error = refused(config().with_context(5000));
    assert!(
        matches!(error, TrainError::Context { context: 5000, .. }),
        "{error}"
    );
    let error = refused(config().with_context(1500));
    assert!(
        matches!(
            error,
            TrainError::TooFewTokens {
                found: 2000,
                needed: 3002
            }
        ),
        "{error}"
    );
    let mut small = config();
    small.model.vocab_size = 5;
    let error = refused(small);
    assert!(
        matches!(error, TrainError::OutOfVocabulary { vocab_size: 5, .. }),
        "{error}"
    );
    let mut odd = config();
    odd.model.head_dim = 3;
    assert!(matches!(refused(odd), TrainError::Config(_)));
    assert!(!run_in.exists());

    std::fs::write(&run_in, "a file").unwrap();
    let error = refused(config());
    assert!(
        matches!(&error, TrainError::File { path, .. } if *path == run_in),
        "{error}"
    );

    let error = train_bpe("text", MIN_VOCAB_SIZE - 1).err();
    assert!(matches!(
        error,
        Some(TrainError::VocabSize { vocab_size: 256 })
    ));
}

#[test]
fn a_saved_model_is_the_same_model() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the quick brown fox jumps over the lazy dog\n".repeat(20);
    let tokenizer = train_bpe(&text, 300).unwrap();
    let vocab = tokenizer.get_vocab_size(true);
    let plan = KvPlan::YocoPlusPlus { storage_layers: 3 };
    let model = FusedKvDecoderConfig::tiny(vocab, plan);
    let model = model.init::<Flex>(&Default::default()).unwrap();
    save_model(directory.path(), &model, &tokenizer).unwrap();
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(left.len(), 3, "{left:?}");

    let (loaded, same) = load_model::<Flex>(directory.path(), &Default::default()).unwrap();
    let ids = encode(&same, "the lazy fox").unwrap();
    assert_eq!(ids, encode(&tokenizer, "the lazy fox").unwrap());
    let batch = TokenBatch::from_rows(&[ids], vocab, &Default::default()).unwrap();
    let logits = |model: &fusedkv::FusedKvDecoder<Flex>| -> Tensor<Flex, 3> {
        model.forward(batch.clone()).unwrap()
    };
    assert_eq!(logits(&loaded).into_data(), logits(&model).into_data());

    for file in ["model.json", "model.mpk", "tokenizer.json"] {
        let path = directory.path().join(file);
        let whole = std::fs::read(&path).unwrap();
        for broken in [None, Some(&whole[..whole.len() / 2])] {
            match broken {
                None => std::fs::remove_file(&path).unwrap(),
                Some(half) => std::fs::write(&path, half).unwrap(),
            }
            let error = load_model::<Flex>(directory.path(), &Default::default());
            let error = error.err().expect("refused");
            assert!(
                matches!(&error, TrainError::File { path: p, .. } if *p == path),
                "{error}"
            );
        }
        std::fs::write(&path, whole).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Byte-level BPE spells any text, and its stream says the same as the whole.
    #[test]
    fn any_text_round_trips(text in any::<String>()) {
        let tokenizer = train_bpe("a few words to learn, a few words more", 280).unwrap();
        let ids = encode(&tokenizer, &text).unwrap();
        prop_assert_eq!(&tokenizer.decode(&ids, true).unwrap(), &text);
        let mut stream = TextStream::new(&tokenizer);
        let streamed: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        prop_assert_eq!(streamed, text);
    }

    /// Windows of both parts tile the text in order, and share no token.
    #[test]
    fn windows_tile_the_text(n in 0usize..300, context in 1usize..20, fraction in 0.01..0.99) {
        let tokens: Vec<u32> = (0..n as u32).collect();
        let split = TokenWindows::split(tokens, context, fraction);
        if n < 2 * (context + 1) {
            prop_assert!(matches!(split, Err(TrainError::TooFewTokens { found, .. }) if found == n));
            return Ok(());
        }
        let (train, valid) = split.unwrap();
        prop_assert!(train.len() >= 1 && valid.len() >= 1);
        let mut highest_train = 0;
        for (part, first) in [(&train, 0), (&valid, (n - valid.len() * context - 1) as u32)] {
            for i in 0..part.len() {
                let window = part.get(i).unwrap();
                let start = first + (i * context) as u32;
                prop_assert_eq!(&window, &(start..=start + context as u32).collect::<Vec<_>>());
                if std::ptr::eq(part, &train) {
                    highest_train = start + context as u32;
                } else {
                    prop_assert!(start > highest_train);
                }
            }
            prop_assert!(part.get(part.len()).is_none());
        }
        // No window's worth of tokens is wasted.
        prop_assert!((train.len() + valid.len() + 1) * context + 2 >= n - context.min(n));
        let asked = (fraction * (train.len() + valid.len()) as f64).round();
        prop_assert!((valid.len() as f64 - asked).abs() <= 1.0 || train.len() == 1 || valid.len() == 1);
    }
}
