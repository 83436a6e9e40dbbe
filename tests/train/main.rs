//! Training, its data and files: what is learned, resumed, kept, refused.

mod before;
mod chats;
mod distilling;
mod lora;
mod precision;
mod routing;
mod saving;
mod targets;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::backend::Backend;
use burn_dataset::Dataset;
use fusedkv::backend::{Autodiff, Flex, FlexDevice};
use fusedkv::checkpoint::{SaveOptions, WeightDtype, load_checkpoint, save_checkpoint};
use fusedkv::train::{
    LogLine, Progress, Run, TokenWindows, TrainError, Trained, TrainingConfig, Windows, evaluate,
    perplexity, train, train_from, train_on,
};
use fusedkv::{FusedKvDecoder, FusedKvDecoderConfig, FusionInit, KvPlan, TokenBatch};
use proptest::prelude::*;
use tempfile::tempdir;

const VOCAB: usize = 16;

/// Does what draws random numbers, or trains, while no other test does. A backend's random numbers are
/// global: whoever draws some in the middle of a training that must repeat changes it.
fn in_turn<R>(work: impl FnOnce() -> R) -> R {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    work()
}

fn decoder(plan: KvPlan) -> FusedKvDecoderConfig {
    FusedKvDecoderConfig::new(VOCAB, plan)
        .with_hidden_size(32)
        .with_n_layers(4)
        .with_n_heads(2)
        .with_n_kv_heads(2)
        .with_head_dim(16)
        .with_ffn_size(64)
        .with_max_positions(64)
}

fn config() -> TrainingConfig {
    TrainingConfig::new(decoder(KvPlan::FusedKv { storage_layers: 2 }), 16, 4, 40)
        .with_epochs(4)
        .with_learning_rate(1e-2)
        .with_warmup_steps(3)
        .with_valid_fraction(0.2)
}

fn short() -> TrainingConfig {
    TrainingConfig {
        steps: 4,
        ..config()
    }
}

/// A sequence that is determined by its last two tokens.
fn tokens() -> Vec<u32> {
    let mut tokens = vec![1, 2];
    while tokens.len() < 1000 {
        let last = tokens.len() - 1;
        tokens.push((tokens[last] + 3 * tokens[last - 1] + 1) % VOCAB as u32);
    }
    tokens
}

fn run(
    config: &TrainingConfig,
    directory: &Path,
    resume: bool,
) -> Result<Trained<Flex>, TrainError> {
    let run = Run::new(directory)
        .with_resume(resume)
        .with_progress(Progress::Quiet);
    in_turn(|| train::<Autodiff<Flex>>(config, tokens(), &run, &FlexDevice))
}

fn logits<B: Backend>(model: &FusedKvDecoder<B>, device: &B::Device) -> burn::tensor::TensorData {
    let batch = TokenBatch::from_rows(&[tokens()[..20].to_vec()], VOCAB, device).unwrap();
    model.forward(batch).unwrap().into_data()
}

#[test]
fn every_method_learns_a_repetitive_text() {
    for method in KvPlan::methods() {
        let directory = tempdir().unwrap();
        let mut config = config();
        config.model.plan = KvPlan::from_method(method, 4).unwrap();
        let trained = run(&config, directory.path(), false).unwrap();
        let (first, last) = (&trained.epochs[0], &trained.epochs[3]);
        assert!(
            last.train < 0.5 * first.train,
            "{method}: {first:?} {last:?}"
        );
        assert!(
            last.valid < 0.5 * first.valid,
            "{method}: {first:?} {last:?}"
        );
        assert_eq!(trained.tokens, 40 * 4 * 16);
    }
}

#[test]
fn fusion_weights_have_a_learning_rate_and_a_decay_of_their_own() {
    let n = 2;
    let losses = |plan, ratio, decay| {
        let directory = tempdir().unwrap();
        let config = TrainingConfig {
            model: decoder(plan),
            ..config()
        };
        // The norm of all gradients, by which others are clipped, counts those of fusion weights.
        let config = config
            .with_grad_clip(1e9)
            .with_fusion_learning_rate_ratio(ratio)
            .with_fusion_weight_decay(decay);
        run(&config, directory.path(), false).unwrap().valid_loss
    };
    let lite = losses(KvPlan::FusedKvLite { storage_layers: n }, 1.0, 0.0);
    let fused = |ratio, decay| losses(KvPlan::FusedKv { storage_layers: n }, ratio, decay);
    // Where they do not learn, they stay where they start: at Lite.
    assert!((fused(0.0, 0.5) - lite).abs() < 1e-4 * lite);
    let learned = fused(1.0, 0.0);
    assert!((learned - lite).abs() > 1e-3 * lite);
    assert!((fused(2.0, 0.0) - learned).abs() > 1e-4 * learned);
    assert!((fused(1.0, 0.5) - learned).abs() > 1e-4 * learned);
}

#[test]
fn alpha_is_a_fusion_weight() {
    let n = 2;
    let alphas = |start, ratio, decay| {
        let directory = tempdir().unwrap();
        let mut config = config()
            .with_fusion_learning_rate_ratio(ratio)
            .with_fusion_weight_decay(decay);
        config.model = decoder(KvPlan::YocoPlusPlus { storage_layers: n })
            .with_fusion_init(FusionInit::lite().with_residual(start));
        let trained = run(&config, directory.path(), false).unwrap();
        ["key", "value"].map(|part| {
            let name = format!("model.layers.1.self_attn.kv_residual.{part}_weight");
            trained.model.parameter::<1>(&name).unwrap().into_scalar()
        })
    };
    // Where they do not learn, they stay where they start.
    assert_eq!(alphas(0.5, 0.0, 0.5), [0.5; 2]);
    let [learned, faster, decayed] =
        [(1.0, 0.0), (2.0, 0.0), (1.0, 0.5)].map(|(ratio, decay)| alphas(0.5, ratio, decay));
    for i in 0..2 {
        assert!((learned[i] - 0.5).abs() > 1e-3, "{learned:?}");
        assert!(
            (faster[i] - learned[i]).abs() > 1e-3,
            "{faster:?} {learned:?}"
        );
        assert!(
            decayed[i].abs() < learned[i].abs(),
            "{decayed:?} {learned:?}"
        );
    }
}

#[test]
fn results_agree_with_each_other() {
    let directory = tempdir().unwrap();
    let config = config();
    let trained = run(&config, directory.path(), false).unwrap();
    assert_eq!(trained.perplexity(), trained.valid_loss.exp());
    assert_eq!(perplexity(0.0), 1.0);
    assert_eq!(trained.valid_loss, trained.epochs[3].valid);
    assert_eq!(trained.train_loss, trained.epochs[3].train);
    let (_, valid) = TokenWindows::split(tokens(), config.context, 0.2).unwrap();
    for batch_size in [1, 5, 100] {
        let loss = evaluate(&trained.model, &valid, batch_size, None)
            .unwrap()
            .loss;
        assert!((loss - trained.valid_loss).abs() < 1e-5);
    }
}

#[test]
fn a_resumed_run_ends_like_one_that_was_not_interrupted() {
    let directory = tempdir().unwrap();
    let directory = directory.path();
    let config = config();
    let whole = run(&config, directory, false).unwrap();

    // As if it had died while the last checkpoint was written.
    let checkpoint = directory.join("checkpoint");
    fs::remove_file(checkpoint.join("optim-4.mpk")).unwrap();
    let resumed = run(&config, directory, true).unwrap();
    assert_eq!(resumed.epochs[..3], whole.epochs[..3]);
    assert_eq!(resumed.epochs.len(), 4);
    assert_eq!(resumed.train_loss, whole.train_loss);
    assert_eq!(resumed.valid_loss, whole.valid_loss);
    let device = FlexDevice;
    assert_eq!(
        logits(&resumed.model, &device),
        logits(&whole.model, &device)
    );

    // Nothing is left to do: the last checkpoint is the result.
    let again = run(&config, directory, true).unwrap();
    assert_eq!(again.epochs, resumed.epochs);
    assert_eq!(
        logits(&again.model, &device),
        logits(&resumed.model, &device)
    );
}

/// The lines of a run's log, without what depends on the time.
fn log(directory: &Path) -> Vec<LogLine> {
    let log = fs::read_to_string(directory.join("metrics.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str(line).unwrap());
    lines
        .map(|mut line| {
            if let LogLine::Train {
                tokens_per_second,
                memory_mib,
                ..
            } = &mut line
            {
                assert!(*tokens_per_second > 0.0);
                *tokens_per_second = 0.0;
                *memory_mib = None;
            }
            line
        })
        .collect()
}

#[test]
fn the_log_has_every_step_once() {
    let directory = tempdir().unwrap();
    let directory = directory.path();
    let config = config();
    let trained = run(&config, directory, false).unwrap();
    let lines = log(directory);
    assert_eq!(lines.len(), 40 + 4);
    let mut steps = Vec::new();
    for epoch in &trained.epochs {
        let mut losses = Vec::new();
        let mut norms = Vec::new();
        for line in &lines {
            match line {
                LogLine::Train {
                    epoch: of,
                    step,
                    tokens,
                    loss,
                    gradient_norms,
                    ..
                } if *of == epoch.epoch => {
                    assert_eq!(*tokens, step * config.tokens_per_step());
                    steps.push(*step);
                    losses.push(*loss);
                    norms.push(gradient_norms.clone().unwrap());
                }
                LogLine::Valid {
                    epoch: of,
                    loss,
                    perplexity,
                    ..
                } if *of == epoch.epoch => {
                    assert!((loss - epoch.valid).abs() < 1e-5, "{loss} {epoch:?}");
                    assert_eq!(*perplexity, loss.exp());
                }
                _ => {}
            }
        }
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        assert!((mean(losses) - epoch.train).abs() < 1e-5);
        let found = epoch.gradient_norms.as_ref().unwrap();
        assert_eq!(found.layers.len(), 4);
        assert!((mean(norms.iter().map(|n| n.all).collect()) - found.all).abs() < 1e-9);
        for layer in 0..4 {
            let expected = mean(norms.iter().map(|n| n.layers[layer]).collect());
            assert!((expected - found.layers[layer]).abs() < 1e-9);
            assert!(found.layers[layer] < found.all);
        }
    }
    assert_eq!(steps, (1..=40).collect::<Vec<_>>());

    // Killed in the middle of a line, after the third epoch was saved.
    fs::remove_file(directory.join("checkpoint/optim-4.mpk")).unwrap();
    let path = directory.join("metrics.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 30]).unwrap();
    run(&config, directory, true).unwrap();
    assert_eq!(log(directory), lines);
}

#[test]
fn observers_are_told_the_loss_of_all_parts_of_a_step() {
    let directory = tempdir().unwrap();
    let config = short().with_accumulation(4).with_epochs(1);
    let told = Arc::new(Mutex::new(Vec::new()));
    let run = {
        let told = told.clone();
        Run::new(directory.path())
            .with_progress(Progress::Quiet)
            .with_observer(move |report| told.lock().unwrap().push(report.loss))
    };
    in_turn(|| train::<Autodiff<Flex>>(&config, tokens(), &run, &FlexDevice)).unwrap();
    let logged = log(directory.path())
        .into_iter()
        .filter_map(|line| match line {
            LogLine::Train { loss, .. } => Some(loss),
            LogLine::Valid { .. } => None,
        });
    assert_eq!(*told.lock().unwrap(), logged.collect::<Vec<_>>());
}

#[test]
fn accumulated_gradients_have_the_norms_of_those_of_the_whole_batch() {
    let norms = |accumulation| {
        let directory = tempdir().unwrap();
        let config = short().with_accumulation(accumulation).with_epochs(1);
        let trained = run(&config, directory.path(), false).unwrap();
        assert_eq!(log(directory.path()).len(), 4 + 1);
        trained.epochs[0].gradient_norms.clone().unwrap()
    };
    let (whole, parts) = (norms(1), norms(4));
    for (a, b) in whole.layers.iter().zip(&parts.layers) {
        assert!((a - b).abs() < 1e-3 * a, "{whole:?} {parts:?}");
    }
}

#[test]
fn the_best_epochs_model_can_be_loaded() {
    let directory = tempdir().unwrap();
    let best = || in_turn(|| Run::new(directory.path()).best::<Flex>(&FlexDevice));
    let error = best().unwrap_err();
    assert!(matches!(error, TrainError::NoCheckpoint(_)), "{error}");
    // What is held out follows another rule: what is learned of the first makes it worse.
    let config = config();
    let mut tokens = tokens();
    for token in &mut tokens[800..] {
        *token = VOCAB as u32 - 1 - *token;
    }
    let run = Run::new(directory.path()).with_progress(Progress::Quiet);
    let train = || train::<Autodiff<Flex>>(&config, tokens.clone(), &run, &FlexDevice);
    let trained = in_turn(train).unwrap();
    let lowest = trained.epochs.iter().map(|losses| losses.valid);
    let lowest = lowest.fold(f64::MAX, f64::min);
    assert!(lowest < trained.valid_loss);
    let (model, losses) = best().unwrap();
    assert_eq!(losses.valid, lowest);
    let (_, valid) = TokenWindows::split(tokens, config.context, 0.2).unwrap();
    let loss = evaluate(&model, &valid, 4, None).unwrap().loss;
    assert!((loss - lowest).abs() < 1e-4 * lowest, "{loss} {lowest}");
}

#[test]
fn training_goes_on_from_a_given_model() {
    let directory = tempdir().unwrap();
    let config = config();
    let first = run(&config, directory.path(), false).unwrap();
    let saved = directory.path().join("model");
    save_checkpoint(&saved, &first.model, &SaveOptions::new()).unwrap();
    let load = || {
        let loaded = load_checkpoint::<Autodiff<Flex>>(&saved, WeightDtype::F32, &FlexDevice);
        loaded.unwrap().model
    };
    let more = |config: &TrainingConfig, name: &str| {
        let run = Run::new(directory.path().join(name)).with_progress(Progress::Quiet);
        in_turn(|| train_from::<Autodiff<Flex>>(config, load(), tokens(), &run, &FlexDevice))
    };
    // A rate so low that the model is still the one given.
    let still = short().with_learning_rate(1e-9);
    let second = more(&still, "second").unwrap();
    assert!((second.valid_loss - first.valid_loss).abs() < 1e-3);
    let third = more(&config, "third").unwrap();
    assert!(third.valid_loss < first.valid_loss, "{}", third.valid_loss);

    let mut other = config;
    other.model.plan = KvPlan::Yoco { storage_layers: 2 };
    let error = more(&other, "other").unwrap_err();
    assert!(matches!(error, TrainError::OtherModel { .. }), "{error}");
}

#[test]
fn the_last_two_and_the_best_checkpoints_are_kept() {
    let directory = tempdir().unwrap();
    // A learning rate at which losses go up again.
    let config = config()
        .with_epochs(8)
        .with_learning_rate(0.5)
        .with_warmup_steps(0);
    let trained = run(&config, directory.path(), false).unwrap();
    let best = trained
        .epochs
        .iter()
        .min_by(|a, b| a.valid.total_cmp(&b.valid))
        .unwrap();
    let kept: BTreeSet<String> = fs::read_dir(directory.path().join("checkpoint"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected = [best.epoch, 7, 8].into_iter().flat_map(|epoch| {
        ["model", "optim", "scheduler"].map(|part| format!("{part}-{epoch}.mpk"))
    });
    assert_eq!(kept, expected.collect());
}

#[test]
fn the_same_seed_gives_the_same_model() {
    let config = short();
    let losses = |seed| {
        let directory = tempdir().unwrap();
        let config = config.clone().with_seed(seed);
        run(&config, directory.path(), false).unwrap().valid_loss
    };
    assert_eq!(losses(1), losses(1));
    assert!((losses(1) - losses(2)).abs() > 1e-6);
}

#[test]
fn a_new_run_replaces_an_old_one_and_nothing_else() {
    let directory = tempdir().unwrap();
    let directory = directory.path();
    let config = short();
    run(&config, directory, false).unwrap();
    fs::write(directory.join("notes.txt"), "mine").unwrap();
    let trained = run(&config.clone().with_epochs(1), directory, false).unwrap();
    assert_eq!(trained.epochs.len(), 1);
    assert!(directory.join("notes.txt").exists());
    assert!(!directory.join("checkpoint/model-4.mpk").exists());

    let foreign = tempdir().unwrap();
    fs::create_dir(foreign.path().join("train")).unwrap();
    let error = run(&config, foreign.path(), false).unwrap_err();
    assert!(matches!(error, TrainError::NotARun(_)), "{error}");
    assert!(foreign.path().join("train").exists());
}

#[test]
fn a_run_is_resumed_only_by_its_own_configuration() {
    let directory = tempdir().unwrap();
    let directory = directory.path();
    let config = short();
    let error = run(&config, directory, true).unwrap_err();
    assert!(matches!(error, TrainError::NoCheckpoint(_)), "{error}");

    run(&config, directory, false).unwrap();
    let mut other = config.clone();
    other.model.ffn_size = 48;
    let error = run(&other, directory, true).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, TrainError::OtherRun { .. }), "{message}");
    assert!(
        message.contains("model.ffn_size 64, expected 48"),
        "{message}"
    );

    let model = directory.join("checkpoint/model-4.mpk");
    fs::write(&model, "not a model").unwrap();
    let error = run(&config, directory, true).unwrap_err();
    assert!(
        matches!(&error, TrainError::Unreadable { path, .. } if *path == model),
        "{error}"
    );

    for part in ["model", "optim", "scheduler"] {
        for epoch in 1..=4 {
            let _ = fs::remove_file(directory.join(format!("checkpoint/{part}-{epoch}.mpk")));
        }
    }
    let error = run(&config, directory, true).unwrap_err();
    assert!(matches!(error, TrainError::NoCheckpoint(_)), "{error}");
}

#[test]
fn a_run_is_resumed_only_with_its_own_data() {
    let directory = tempdir().unwrap();
    let directory = directory.path();
    let config = short();
    let go = |tokens: Vec<u32>| {
        let run = Run::new(directory)
            .with_resume(true)
            .with_progress(Progress::Quiet);
        in_turn(|| train::<Autodiff<Flex>>(&config, tokens, &run, &FlexDevice))
    };
    run(&config, directory, false).unwrap();
    fs::remove_file(directory.join("checkpoint/optim-4.mpk")).unwrap();
    let losses = fs::read(directory.join("losses.json")).unwrap();
    for (place, expected) in [(0, "training_data_hash"), (990, "validation_data_hash")] {
        let mut other = tokens();
        other[place] ^= 1;
        let error = go(other).unwrap_err();
        let refused = matches!(&error, TrainError::OtherRun { field, .. } if field == expected);
        assert!(refused, "{error}");
        assert_eq!(fs::read(directory.join("losses.json")).unwrap(), losses);
    }
    go(tokens()).unwrap();

    // A run of a version that did not write down what it read.
    let data = fs::read(directory.join("data.json")).unwrap();
    fs::remove_file(directory.join("data.json")).unwrap();
    go(tokens()).unwrap();
    assert_eq!(fs::read(directory.join("data.json")).unwrap(), data);
}

#[test]
fn a_directory_belongs_to_one_training_at_a_time() {
    let directory = tempdir().unwrap();
    let path = directory.path().to_owned();
    let config = short();
    let found = Arc::new(Mutex::new(Vec::new()));
    let observed = {
        let (path, config, found) = (path.clone(), config.clone(), found.clone());
        move |_| {
            for resume in [false, true] {
                let run = Run::new(&path)
                    .with_resume(resume)
                    .with_progress(Progress::Quiet);
                let error = train::<Autodiff<Flex>>(&config, tokens(), &run, &FlexDevice);
                found.lock().unwrap().push(error.unwrap_err());
            }
        }
    };
    let watched = Run::new(&path)
        .with_progress(Progress::Quiet)
        .with_observer(observed);
    in_turn(|| train::<Autodiff<Flex>>(&config, tokens(), &watched, &FlexDevice)).unwrap();
    let found = found.lock().unwrap();
    assert_eq!(found.len(), 2 * config.steps);
    for error in found.iter() {
        assert!(
            matches!(error, TrainError::InUse(of) if *of == path),
            "{error}"
        );
    }
    // It has ended.
    run(&config, &path, true).unwrap();

    // What a run leaves that dies at once is no hindrance.
    let died = tempdir().unwrap();
    for left in ["writer.lock", ".training.json.partial-ab.json"] {
        fs::write(died.path().join(left), "").unwrap();
    }
    run(&config, died.path(), false).unwrap();
}

#[test]
fn settings_out_of_range_are_named() {
    let directory = tempdir().unwrap();
    let base = config;
    for (config, field) in [
        (
            TrainingConfig {
                context: 0,
                ..base()
            },
            "context",
        ),
        (
            TrainingConfig {
                batch_size: 0,
                ..base()
            },
            "batch_size",
        ),
        (TrainingConfig { steps: 0, ..base() }, "steps"),
        (base().with_epochs(0), "epochs"),
        (base().with_epochs(41), "epochs"),
        (base().with_learning_rate(0.0), "learning_rate"),
        (base().with_learning_rate(f64::NAN), "learning_rate"),
        (
            base().with_min_learning_rate_ratio(1.5),
            "min_learning_rate_ratio",
        ),
        (base().with_warmup_steps(40), "warmup_steps"),
        (base().with_weight_decay(-0.1), "weight_decay"),
        (base().with_fusion_weight_decay(-0.1), "fusion_weight_decay"),
        (
            base().with_fusion_learning_rate_ratio(f64::NAN),
            "fusion_learning_rate_ratio",
        ),
        (
            base().with_embedding_learning_rate_ratio(Some(-0.1)),
            "embedding_learning_rate_ratio",
        ),
        (
            base().with_gain_learning_rate_ratio(Some(f64::NAN)),
            "gain_learning_rate_ratio",
        ),
        (base().with_beta_1(1.0), "beta_1"),
        (base().with_beta_2(-0.1), "beta_2"),
        (base().with_grad_clip(0.0), "grad_clip"),
        (base().with_valid_fraction(1.0), "valid_fraction"),
    ] {
        let error = run(&config, directory.path(), false).unwrap_err();
        assert!(
            matches!(&error, TrainError::Setting { field: found, .. } if *found == field),
            "{field}: {error}"
        );
        assert!(error.to_string().starts_with(field), "{error}");
    }
    // Refused before anything was made.
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn what_does_not_fit_the_decoder_is_refused() {
    let directory = tempdir().unwrap();
    let directory = directory.path();
    let mut no_heads = config();
    no_heads.model.n_heads = 0;
    let error = run(&no_heads, directory, false).unwrap_err();
    assert!(matches!(error, TrainError::Config(_)), "{error}");

    let error = run(
        &TrainingConfig {
            context: 65,
            ..config()
        },
        directory,
        false,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "context is 65 tokens, expected at most max_positions, 64"
    );

    let device = FlexDevice;
    let quiet = Run::new(directory).with_progress(Progress::Quiet);
    let error = train::<Autodiff<Flex>>(&config(), vec![0; 32], &quiet, &device).unwrap_err();
    assert_eq!(
        error.to_string(),
        "32 tokens, expected at least 33: 2 windows of 16 and one more"
    );
    let error = train::<Autodiff<Flex>>(&config(), vec![0, 3, 16], &quiet, &device).unwrap_err();
    assert_eq!(
        error.to_string(),
        "token 16 at 2, expected ids below the vocabulary's size, 16"
    );

    let file = directory.join("file");
    fs::write(&file, "").unwrap();
    let error = run(&config(), &file, false).unwrap_err();
    assert!(matches!(error, TrainError::Write { .. }), "{error}");

    let model = decoder(KvPlan::Standard).init::<Flex>(&device).unwrap();
    let (windows, _) = TokenWindows::split(vec![0; 200], 65, 0.5).unwrap();
    let error = evaluate(&model, &windows, 1, None).unwrap_err();
    assert!(
        matches!(error, TrainError::ContextTooLong { .. }),
        "{error}"
    );
    let error = evaluate(&model, &windows, 0, None).unwrap_err();
    assert!(matches!(error, TrainError::Setting { .. }), "{error}");
}

#[test]
fn a_loss_that_is_no_number_ends_the_training() {
    let directory = tempdir().unwrap();
    // Weights that grow beyond the largest float in two steps.
    let config = config()
        .with_learning_rate(1.0)
        .with_warmup_steps(0)
        .with_weight_decay(3e38);
    let error = run(&config, directory.path(), false).unwrap_err();
    assert!(
        matches!(error, TrainError::Diverged { epoch: 1, .. }),
        "{error}"
    );
}

proptest! {
    #[test]
    fn windows_cover_the_text_and_share_no_target(
        len in 3usize..400,
        context in 1usize..40,
        fraction in 0.01f64..0.99,
    ) {
        // Every token is its own position.
        let tokens: Vec<u32> = (0..len as u32).collect();
        let split = TokenWindows::split(tokens, context, fraction);
        if len < 2 * context + 1 {
            let refused = matches!(
                split,
                Err(TrainError::TooFewTokens { found, windows: 2, context: c })
                    if found == len && c == context
            );
            prop_assert!(refused);
            return Ok(());
        }
        let (train, valid) = split.unwrap();
        prop_assert!(train.len() > 0 && valid.len() > 0);
        prop_assert!(valid.get(valid.len()).is_none());
        let mut targets = Vec::new();
        for (windows, first) in [(&train, 0), (&valid, train.len() * context)] {
            for window in windows.iter() {
                prop_assert_eq!(window.inputs.len(), context);
                prop_assert!(window.inputs.iter().all(|&t| t as usize >= first));
                prop_assert!(window.inputs.iter().zip(&window.targets).all(|(i, t)| i + 1 == *t));
                targets.extend(window.targets);
            }
        }
        // Behind a beginning they have the same targets.
        let bos = len as u32;
        for windows in [&train, &valid] {
            let behind = windows.clone().with_bos(Some(bos));
            prop_assert_eq!(behind.len(), windows.len());
            prop_assert_ne!(behind.fingerprint(), windows.fingerprint());
            prop_assert!(windows.check_vocabulary(len).is_ok());
            let unknown = behind.check_vocabulary(len);
            let refused = matches!(unknown, Err(TrainError::Setting { field: "bos", .. }));
            prop_assert!(refused);
            for (window, mut of) in behind.iter().zip(windows.iter()) {
                of.inputs[0] = bos;
                prop_assert_eq!(window, of);
            }
        }
        // One after the other without gap or overlap, and less than a window left over.
        let expected: Vec<u32> = (1..=targets.len() as u32).collect();
        prop_assert_eq!(&targets, &expected);
        prop_assert!(len - 1 - targets.len() < context);
    }
}
