//! Comparisons: what is kept, resumed and refused, and the tasks generated for them.

#[path = "compare/kept.rs"]
mod kept;
#[path = "compare/repeats.rs"]
mod repeats;

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use burn_dataset::Dataset;
use fusedkv::backend::{Autodiff, Flex, FlexDevice};
use fusedkv::train::compare::{
    Comparison, DEFAULT_METHODS, MeanDeviation, Method, MethodError, RunEvent, RunResult, markdown,
    measure_speed, summarise,
};
use fusedkv::train::{
    AssociativeRecall, Needle, Progress, Run, TokenWindow, TrainError, TrainingConfig, Windows,
    evaluate, train_on,
};
use fusedkv::{CacheDtype, FusedKvDecoderConfig, FusionInit, KvPlan, LayerKv};
use proptest::prelude::*;
use tempfile::tempdir;

const VOCAB: usize = 32;
type Train = Autodiff<Flex>;

/// A backend's random numbers are global: trainings that must repeat take turns.
static TURN: Mutex<()> = Mutex::new(());

fn base() -> FusedKvDecoderConfig {
    FusedKvDecoderConfig::new(VOCAB, KvPlan::Standard)
        .with_hidden_size(32)
        .with_n_layers(4)
        .with_n_heads(4)
        .with_n_kv_heads(4)
        .with_head_dim(8)
        .with_ffn_size(64)
        .with_max_positions(64)
}

fn comparison(directory: &Path, methods: &[&str], seeds: u64) -> Comparison {
    Comparison {
        training: TrainingConfig::new(base(), 24, 4, 12)
            .with_epochs(4)
            .with_learning_rate(1e-2),
        methods: methods
            .iter()
            .map(|name| Method::parse(name, &base()).unwrap())
            .collect(),
        seeds: (0..seeds).collect(),
        tokenizer: None,
        directory: directory.to_owned(),
        cache_dtypes: Vec::new(),
    }
}

fn task(seed: u64) -> AssociativeRecall {
    AssociativeRecall::new(VOCAB, 24, 4, 48).with_seed(seed)
}

fn run(comparison: &Comparison) -> Result<Vec<RunResult>, TrainError> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    comparison.run::<Train>(&task(0), &task(1), &[FlexDevice], |_| {})
}

/// But for the time it took.
fn untimed(mut results: Vec<RunResult>) -> Vec<RunResult> {
    for result in &mut results {
        result.tokens_per_second = None;
    }
    results
}

#[test]
fn an_interrupted_comparison_ends_bit_by_bit_like_one_that_was_not() {
    let [whole, cut] = [tempdir().unwrap(), tempdir().unwrap()];
    let methods = ["standard", "fused-kv", "yoco-plus-plus"];
    let expected = run(&comparison(whole.path(), &methods, 2)).unwrap();
    assert_eq!(expected.len(), 6);

    // One run is finished and one was killed after its second epoch.
    run(&comparison(cut.path(), &methods[..1], 1)).unwrap();
    let kept = cut.path().join("runs/standard-seed-0/result.json");
    let written = fs::metadata(&kept).unwrap().modified().unwrap();
    let killed = cut.path().join("runs/fused-kv-seed-0");
    let done = whole.path().join("runs/fused-kv-seed-0");
    fs::create_dir_all(killed.join("checkpoint")).unwrap();
    for file in ["training.json", "data.json", "losses.json"] {
        fs::copy(done.join(file), killed.join(file)).unwrap();
    }
    for part in ["model", "optim", "scheduler"] {
        let file = format!("checkpoint/{part}-3.mpk");
        fs::copy(done.join(&file), killed.join(&file)).unwrap();
    }

    let results = run(&comparison(cut.path(), &methods, 2)).unwrap();
    assert_eq!(fs::metadata(&kept).unwrap().modified().unwrap(), written);
    assert_eq!(untimed(results), untimed(expected.clone()));

    // All is finished: the results are those on the disk.
    assert_eq!(
        run(&comparison(whole.path(), &methods, 2)).unwrap(),
        expected
    );
}

#[test]
fn a_comparison_goes_on_only_with_its_own_data_and_settings() {
    let directory = tempdir().unwrap();
    let first = comparison(directory.path(), &["standard"], 1);
    run(&first).unwrap();

    let mut other = first.clone();
    other.training.learning_rate = 2e-2;
    let error = run(&other).unwrap_err();
    assert!(
        matches!(&error, TrainError::OtherRun { field, .. } if field == "training.learning_rate"),
        "{error}"
    );

    let watch = |_: RunEvent<'_>| {};
    let error = first
        .run::<Train>(&task(7), &task(1), &[FlexDevice], watch)
        .unwrap_err();
    assert!(
        matches!(&error, TrainError::OtherRun { field, .. } if field == "data"),
        "{error}"
    );

    // While it is gone on with, another cannot be.
    let (found, again) = (Arc::new(Mutex::new(Vec::new())), first.clone());
    let watch = {
        let found = found.clone();
        move |_: RunEvent<'_>| {
            let other = again.run::<Train>(&task(0), &task(1), &[FlexDevice], |_| {});
            found.lock().unwrap().push(other.unwrap_err());
        }
    };
    let both = [task(0), task(1)];
    first
        .run::<Train>(&both[0], &both[1], &[FlexDevice], watch)
        .unwrap();
    let [TrainError::InUse(path)] = &found.lock().unwrap()[..] else {
        panic!("one event, that of the kept run: {found:?}");
    };
    assert_eq!(*path, first.directory);

    // As it was when data were hashed otherwise.
    let mark = directory.path().join("comparison.json");
    let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&mark).unwrap()).unwrap();
    old.as_object_mut().unwrap().remove("hash").unwrap();
    fs::write(&mark, old.to_string()).unwrap();
    let error = run(&first).unwrap_err();
    let older = matches!(&error, TrainError::OlderComparison(path) if *path == first.directory);
    assert!(older, "{error}");
}

#[test]
fn caches_of_other_numbers_are_tried_with_the_models_that_were_trained() {
    let directory = tempdir().unwrap();
    let mut comparison = comparison(directory.path(), &["standard", "fused-kv"], 2);
    let before = run(&comparison).unwrap();
    assert!(before.iter().all(|result| result.cached.is_empty()));

    // The runs are kept; their models come from the checkpoints.
    comparison.cache_dtypes = vec![CacheDtype::Model, CacheDtype::F16, CacheDtype::Int8];
    let results = run(&comparison).unwrap();
    for (result, before) in results.iter().zip(before) {
        let without = RunResult {
            cached: Vec::new(),
            ..result.clone()
        };
        assert_eq!(without, before);
        let dtypes: Vec<_> = result.cached.iter().map(|cached| cached.dtype).collect();
        assert_eq!(dtypes, comparison.cache_dtypes);
        // Two tensors per layer that stores, four heads of eight channels; a scale per head.
        let stores = if result.method == "standard" { 4 } else { 2 };
        let bytes = result.cached.iter().map(|c| c.cache_bytes_per_token);
        let per_head = [8 * 4, 8 * 2, 8 + 4].map(|bytes| 2 * stores * 4 * bytes);
        assert_eq!(bytes.collect::<Vec<_>>(), per_head);
        for (cached, tolerance) in result.cached.iter().zip([1e-5, 1e-3, 1e-1]) {
            let error = (cached.evaluation.loss - result.valid_loss).abs();
            assert!(error < tolerance, "{cached:?}: {}", result.valid_loss);
            assert!(error > 0.0 || cached.dtype == CacheDtype::Model);
        }
        assert_eq!(result.cached[0].evaluation.accuracy, result.accuracy);
    }
    for summary in summarise(&results) {
        let runs = results.iter().filter(|run| run.method == summary.method);
        let int8: Vec<f64> = runs.map(|run| run.cached[2].evaluation.loss).collect();
        assert_eq!(summary.cached[2].valid_loss, MeanDeviation::of(&int8));
    }
    let tables = markdown(&results, &[]);
    let rows = tables.lines().filter(|line| line.contains("| int8 |"));
    assert_eq!(rows.count(), 2);

    // Nothing is left to do.
    assert_eq!(run(&comparison).unwrap(), results);
}

/// Windows that say there is one where there is none.
struct Hollow;

impl Dataset<TokenWindow> for Hollow {
    fn get(&self, _index: usize) -> Option<TokenWindow> {
        None
    }

    fn len(&self) -> usize {
        1
    }
}

impl Windows for Hollow {
    fn context(&self) -> usize {
        8
    }

    fn check_vocabulary(&self, _vocab_size: usize) -> Result<(), TrainError> {
        Ok(())
    }

    fn fingerprint(&self) -> u64 {
        0
    }
}

#[test]
fn windows_that_are_not_there_are_an_error() {
    let model = base().init::<Flex>(&FlexDevice).unwrap();
    for cache in [None, Some(CacheDtype::Model)] {
        let error = evaluate(&model, &Hollow, 4, cache).unwrap_err();
        let refused = matches!(
            error,
            TrainError::MissingWindow {
                index: 0,
                windows: 1
            }
        );
        assert!(refused, "{error}");
    }
}

#[test]
fn summaries_are_over_seeds() {
    let directory = tempdir().unwrap();
    let comparison = comparison(directory.path(), &["standard", "gqa", "fused-kv"], 3);
    let results = run(&comparison).unwrap();
    let summaries = summarise(&results);
    let names: Vec<_> = summaries.iter().map(|s| s.method.as_str()).collect();
    assert_eq!(names, ["standard", "gqa", "fused-kv"]);
    let bytes: Vec<_> = summaries.iter().map(|s| s.cache_bytes_per_token).collect();
    assert_eq!(bytes, [4 * 2 * 32 * 4, 4 * 2 * 16 * 4, 2 * 2 * 32 * 4]);
    for (i, summary) in summaries.iter().enumerate() {
        let losses: Vec<f64> = results[3 * i..3 * i + 3]
            .iter()
            .map(|result| result.valid_loss)
            .collect();
        assert_eq!(summary.valid_loss, MeanDeviation::of(&losses));
        assert!(summary.valid_loss.deviation > 0.0);
    }
    let speeds = measure_speed::<Flex>(&comparison.methods, 8, 2, 1, &FlexDevice).unwrap();
    assert!(speeds.iter().all(|s| s.ttft > 0.0 && s.tpot > 0.0));
    let tables = markdown(&results, &speeds);
    let tables: Vec<Vec<Vec<&str>>> = tables
        .split("\n\n")
        .map(|table| {
            let lines = table.lines();
            lines
                .map(|line| line.split('|').map(str::trim).collect())
                .collect()
        })
        .collect();
    let [table, distances] = &tables[..] else {
        panic!("expected a table and one by distance");
    };
    for rows in [table, distances] {
        assert_eq!(rows.len(), 2 + 3);
        assert!(rows.iter().all(|row| row.len() == rows[0].len()));
        assert_eq!(rows[4][1], "fused-kv");
    }
    for (column, distance) in distances[0].iter().enumerate() {
        let Ok(distance) = distance.parse::<usize>() else {
            continue;
        };
        let shares: Vec<f64> = results[..3]
            .iter()
            .flat_map(|result| &result.accuracy)
            .filter(|bucket| bucket.up_to == distance)
            .map(|bucket| bucket.correct as f64 / bucket.total as f64)
            .collect();
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        let shown: f64 = distances[2][column]
            .split(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert!((shown - mean).abs() <= 0.000_51, "{shown} {mean}");
    }
}

#[test]
fn deviations_are_those_of_a_sample() {
    let MeanDeviation { mean, deviation } = MeanDeviation::of(&[1.0, 2.0, 4.0, 5.0]);
    assert_eq!(mean, 3.0);
    assert!((deviation - (10f64 / 3.0).sqrt()).abs() < 1e-12);
    assert_eq!(MeanDeviation::of(&[7.0]).deviation, 0.0);
}

#[test]
fn methods_are_read_with_their_options() {
    let base = base();
    let parse = |text: &str| Method::parse(text, &base);
    for &name in DEFAULT_METHODS {
        assert_eq!(parse(name).unwrap().name, name);
    }
    let method = parse("fused_kv:n=3,kv-heads=2,init=equal,noise=0.1").unwrap();
    assert_eq!(method.model.plan, KvPlan::FusedKv { storage_layers: 3 });
    assert_eq!(method.model.n_kv_heads, 2);
    assert_eq!(
        method.model.fusion_init,
        FusionInit::equal().with_noise(0.1)
    );
    assert_eq!(parse("gqa").unwrap().model.n_kv_heads, 2);
    assert_eq!(parse("yoco:ffn=80").unwrap().model.ffn_size, 80);
    let alpha = parse("yoco-plus-plus:noise=0.2,alpha=0.1,init=equal").unwrap();
    assert_eq!(
        alpha.model.fusion_init,
        FusionInit::equal().with_noise(0.2).with_residual(0.1)
    );
    let cla = parse("cla:factor=4").unwrap().model;
    assert_eq!(cla.costs().unwrap().cache_bytes_per_token(4), 2 * 32 * 4);

    let option = |text: &str| matches!(parse(text), Err(MethodError::UnknownOption { .. }));
    assert!(option("standard:n=2") && option("fused-kv:factor=2") && option("yoco:depth=1"));
    assert!(option("yoco:alpha=0.1"));
    let value = |text: &str| matches!(parse(text), Err(MethodError::OptionValue { .. }));
    assert!(value("yoco:n=few") && value("yoco:n") && value("fused-kv:init=none"));
    assert!(matches!(parse("mystery"), Err(MethodError::Plan { .. })));
    let config = |text: &str| matches!(parse(text), Err(MethodError::Config { .. }));
    assert!(config("yoco:n=9") && config("standard:kv-heads=3"));

    let twice = [parse("yoco").unwrap(), parse("yoco").unwrap()];
    let error = Method::check_names(&twice).unwrap_err();
    assert!(matches!(error, MethodError::Duplicate(name) if name == "yoco"));
}

#[test]
fn plans_are_read_from_json() {
    let store = LayerKv::OWN;
    let plan = KvPlan::Custom {
        layers: vec![store; 4],
    };
    let json = serde_json::json!([
        { "name": "mine", "plan": plan, "n_kv_heads": 1, "alpha": 0.5 },
        { "name": "theirs", "plan": { "method": "yoco", "storage_layers": 1 } },
    ])
    .to_string();
    let methods = Method::from_plans(&json, &base()).unwrap();
    assert_eq!(methods[0].model.plan, plan);
    assert_eq!(
        (methods[0].model.n_kv_heads, methods[1].model.n_kv_heads),
        (1, 4)
    );
    let alphas = methods
        .iter()
        .map(|method| method.model.fusion_init.residual);
    assert_eq!(alphas.collect::<Vec<_>>(), [0.5, 0.0]);
    let error = Method::from_plans("[{}]", &base()).unwrap_err();
    assert!(matches!(error, MethodError::Plans(_)), "{error}");
}

#[test]
fn a_model_that_reads_the_task_learns_to_recall() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempdir().unwrap();
    let train = Needle::new(8, 8, 3200);
    let valid = Needle::new(8, 8, 200).with_seed(1);
    let model = FusedKvDecoderConfig::new(8, KvPlan::Standard)
        .with_hidden_size(32)
        .with_n_layers(2)
        .with_n_heads(2)
        .with_n_kv_heads(2)
        .with_head_dim(16)
        .with_ffn_size(64)
        .with_max_positions(8);
    let config = TrainingConfig::new(model, 8, 16, 200)
        .with_epochs(1)
        .with_learning_rate(1e-2);
    let run = Run::new(directory.path()).with_progress(Progress::Quiet);
    let trained = train_on::<Train>(&config, train, valid.clone(), &run, &[FlexDevice]).unwrap();
    let found = evaluate(&trained.model, &valid, 64, None).unwrap();
    let buckets = &found.accuracy;
    let total: usize = buckets.iter().map(|bucket| bucket.total).sum();
    let correct: usize = buckets.iter().map(|bucket| bucket.correct).sum();
    assert_eq!(total, 200);
    // Guessing one of seven tokens is right in 29 of 200.
    assert!(correct > 60, "{buckets:?}");
    assert!((found.loss - trained.valid_loss).abs() < 1e-5);
    assert!(found.loss < 7f64.ln());
    let few = evaluate(&trained.model, &valid, 7, None).unwrap();
    assert!((few.loss - found.loss).abs() < 1e-5);
    assert_eq!(few.accuracy, found.accuracy);
}

#[test]
fn tasks_that_cannot_be_made_are_refused() {
    let fits = |task: AssociativeRecall| task.check_vocabulary(VOCAB);
    assert!(fits(task(0)).is_ok());
    for (broken, field) in [
        (AssociativeRecall::new(VOCAB, 24, 0, 1), "pairs"),
        (AssociativeRecall::new(VOCAB, 200, 16, 1), "pairs"),
        (AssociativeRecall::new(VOCAB, 24, 7, 1), "context"),
        (AssociativeRecall::new(VOCAB + 1, 24, 4, 1), "vocab_size"),
    ] {
        let error = fits(broken).unwrap_err();
        let found = matches!(&error, TrainError::Setting { field: f, .. } if *f == field);
        assert!(found, "{field}: {error}");
    }
    assert!(Needle::new(3, 9, 1).validate().is_err());
    assert!(Needle::new(9, 4, 1).validate().is_err());
}

proptest! {
    #[test]
    fn answers_are_the_values_of_the_keys_that_return(
        pairs in 1usize..12,
        extra in 0usize..60,
        vocab in 26usize..300,
        seed in any::<u64>(),
    ) {
        let context = 4 * pairs + extra;
        let task = AssociativeRecall::new(vocab, context, pairs, 5).with_seed(seed);
        let window = task.get(4).unwrap();
        prop_assert_eq!(&task.get(4).unwrap(), &window);
        prop_assert!(task.get(3).unwrap() != window);
        prop_assert!(task.get(5).is_none());
        prop_assert_eq!((window.inputs.len(), window.targets.len()), (context, context));
        prop_assert!(window.inputs.iter().all(|&token| (token as usize) < vocab));
        let answers = window.answers.unwrap();
        let mut asked = Vec::new();
        for answer in &answers {
            let source = answer.position - answer.distance;
            prop_assert!(source % 2 == 0 && source < 2 * pairs && answer.position >= 2 * pairs);
            prop_assert_eq!(window.inputs[source], window.inputs[answer.position]);
            prop_assert_eq!(window.inputs[source + 1], window.targets[answer.position]);
            prop_assert!((window.inputs[source] as usize) < vocab / 2);
            prop_assert!((window.inputs[source + 1] as usize) >= vocab / 2);
            asked.push(source);
        }
        asked.sort_unstable();
        asked.dedup();
        prop_assert_eq!(asked.len(), pairs);
    }

    #[test]
    fn the_needle_is_where_the_answer_says(context in 5usize..80, seed in any::<u64>()) {
        let window = Needle::new(50, context, 1).with_seed(seed).get(0).unwrap();
        let answers = window.answers.unwrap();
        let answer = answers[0];
        let key = answer.position - answer.distance;
        prop_assert_eq!(answer.position, context - 1);
        prop_assert_eq!(window.inputs[key - 1], 0);
        prop_assert_eq!(window.inputs[context - 2], 0);
        prop_assert_eq!(window.inputs[key], window.inputs[context - 1]);
        prop_assert_eq!(window.inputs[key + 1], window.targets[context - 1]);
        prop_assert_eq!(window.inputs.iter().filter(|&&token| token == 0).count(), 2);
    }
}

#[test]
fn devices_and_parts_of_a_batch_give_the_same_training() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let train = |accumulation, devices: usize| {
        let directory = tempdir().unwrap();
        let model = Method::parse("fused-kv", &base()).unwrap().model;
        let config = TrainingConfig::new(model, 24, 8, 10)
            .with_epochs(3)
            .with_warmup_steps(2)
            .with_accumulation(accumulation);
        let run = Run::new(directory.path()).with_progress(Progress::Quiet);
        let devices = vec![FlexDevice; devices];
        train_on::<Train>(&config, task(0), task(1), &run, &devices)
    };
    let expected = train(1, 1).unwrap();
    for (accumulation, devices) in [(2, 1), (8, 1), (1, 2), (1, 4), (2, 2)] {
        let found = train(accumulation, devices).unwrap();
        assert_eq!(found.tokens, expected.tokens);
        for (found, expected) in found.epochs.iter().zip(&expected.epochs) {
            let off = (found.train - expected.train).abs() + (found.valid - expected.valid).abs();
            assert!(
                off < 1e-4,
                "{accumulation} {devices}: {found:?} {expected:?}"
            );
        }
    }
    // Seven parts have no equal share of eight windows.
    for (accumulation, devices) in [(7, 1), (1, 3), (4, 4), (1, 0)] {
        let error = train(accumulation, devices).unwrap_err();
        assert!(matches!(error, TrainError::Setting { .. }), "{error}");
    }
}

#[test]
fn checkpointed_activations_give_the_same_training() {
    use fusedkv::backend::BalancedCheckpointing;
    fn losses<B: burn::tensor::backend::AutodiffBackend<Device = FlexDevice>>() -> [f64; 2] {
        let directory = tempdir().unwrap();
        let model = Method::parse("fused-kv", &base()).unwrap().model;
        let config = TrainingConfig::new(model, 24, 4, 6);
        let run = Run::new(directory.path()).with_progress(Progress::Quiet);
        let trained = train_on::<B>(&config, task(0), task(1), &run, &[FlexDevice]).unwrap();
        [trained.train_loss, trained.valid_loss]
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let expected = losses::<Train>();
    let found = losses::<Autodiff<Flex, BalancedCheckpointing>>();
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
}

#[test]
fn a_training_without_patience_left_ends_and_stays_ended() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempdir().unwrap();
    // A rate at which the loss soon goes up.
    let config = TrainingConfig::new(base(), 24, 4, 40)
        .with_epochs(20)
        .with_learning_rate(0.5)
        .with_patience(Some(2));
    let go = |resume| {
        let run = Run::new(directory.path())
            .with_progress(Progress::Quiet)
            .with_resume(resume);
        train_on::<Train>(&config, task(0), task(1), &run, &[FlexDevice]).unwrap()
    };
    let trained = go(false);
    let best = trained
        .epochs
        .iter()
        .min_by(|a, b| a.valid.total_cmp(&b.valid))
        .unwrap();
    let last = trained.epochs.last().unwrap().epoch;
    assert_eq!(last, best.epoch + 2);
    assert!(last < 20);
    assert_eq!(trained.tokens, 2 * last * 4 * 24);
    assert_eq!(go(true).epochs, trained.epochs);
}
