//! What is kept of a run: its model, and that it diverged.

use std::fs;

use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{CheckpointError, WeightDtype, load_checkpoint};
use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::compare::{RunResult, markdown, summarise};
use fusedkv::train::{TrainError, evaluate};
use tempfile::tempdir;

use super::{VOCAB, comparison, run, task};

#[test]
fn a_run_that_diverges_is_kept_as_such_and_the_others_go_on() {
    let directory = tempdir().unwrap();
    // Blends beyond the largest float.
    let methods = ["fused-kv:noise=1e38", "standard"];
    let comparison = comparison(directory.path(), &methods, 2);
    let results = run(&comparison).unwrap();
    let [diverged @ .., _, _] = &results[..] else {
        panic!("four runs: {results:?}");
    };
    for result in diverged {
        assert_eq!(result.diverged, Some(1));
        assert!(!result.valid_loss.is_finite() && !result.perplexity.is_finite());
        assert_eq!(result.tokens, 3 * 4 * 24);
        let [epoch] = &result.epochs[..] else {
            panic!("one epoch: {result:?}");
        };
        assert!(!epoch.train.is_finite() || !epoch.valid.is_finite());
    }
    assert!(results[2..].iter().all(|result| result.diverged.is_none()));
    let runs = directory.path().join("runs");
    assert!(!runs.join("fused-kv-noise-1e38-seed-0/model").exists());

    // What is read back is what was written, numbers that are none included.
    let kept = runs.join("fused-kv-noise-1e38-seed-0/result.json");
    let written = fs::read_to_string(&kept).unwrap();
    let modified = fs::metadata(&kept).unwrap().modified().unwrap();
    let again = run(&comparison).unwrap();
    let json = |results: &[RunResult]| serde_json::to_string(results).unwrap();
    assert_eq!(json(&again), json(&results));
    assert_eq!(fs::metadata(&kept).unwrap().modified().unwrap(), modified);
    let read: RunResult = serde_json::from_str(&written).unwrap();
    assert!(read.valid_loss.is_nan() && results[0].valid_loss.is_nan());

    // Neither a mean nor its spread knows of them.
    let summaries = summarise(&results);
    assert_eq!((summaries[0].seeds, summaries[0].diverged), (0, 2));
    assert_eq!((summaries[1].seeds, summaries[1].diverged), (2, 0));
    let some = RunResult {
        method: "standard".to_owned(),
        ..results[0].clone()
    };
    let mixed = [&results[2..], &[some]].concat();
    let [summary] = &summarise(&mixed)[..] else {
        panic!("one method");
    };
    assert_eq!((summary.seeds, summary.diverged), (2, 1));
    assert_eq!(summary.valid_loss, summaries[1].valid_loss);
    assert_eq!(summary.accuracy, summaries[1].accuracy);
    let table = markdown(&results, &[]);
    let of_none = "| fused-kv:noise=1e38 | 0, 2 diverged | diverged | – | – |";
    assert!(table.contains(of_none), "{table}");
    assert!(!table.contains("NaN"), "{table}");
    let table = markdown(&mixed, &[]);
    assert!(table.contains("| standard | 2, 1 diverged | "), "{table}");
}

#[test]
fn results_of_before_runs_could_diverge_are_read() {
    let directory = tempdir().unwrap();
    let comparison = comparison(directory.path(), &["standard"], 1);
    let results = run(&comparison).unwrap();
    let mut old = serde_json::to_value(&results[0]).unwrap();
    old.as_object_mut().unwrap().remove("diverged").unwrap();
    let read: RunResult = serde_json::from_value(old).unwrap();
    assert_eq!(read, results[0]);
}

#[test]
fn every_model_is_saved_where_it_can_be_loaded() {
    let directory = tempdir().unwrap();
    let mut comparison = comparison(directory.path(), &["fused-kv"], 2);
    let tokenizer = Tokenizer::train_bpe("", 257).unwrap();
    comparison.tokenizer = Some(tokenizer.clone());
    let error = run(&comparison).unwrap_err();
    let larger = matches!(
        error,
        TrainError::Checkpoint(CheckpointError::Vocabulary {
            tokenizer: 257,
            decoder: VOCAB,
            ..
        })
    );
    assert!(larger, "{error}");
    // Refused before anything was made.
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);

    comparison.tokenizer = None;
    let results = run(&comparison).unwrap();
    let check = |seed: usize| {
        let path = comparison.model_directory(&comparison.methods[0], seed as u64);
        let loaded = load_checkpoint::<Flex>(&path, WeightDtype::F32, &FlexDevice).unwrap();
        let found = evaluate(&loaded.model, &task(1), 4, None).unwrap();
        assert!((found.loss - results[seed].valid_loss).abs() < 1e-5);
        path
    };
    check(0);
    // One that has gone is made again, as long as there is a checkpoint.
    let gone = check(1);
    fs::remove_dir_all(&gone).unwrap();
    run(&comparison).unwrap();
    check(1);
    fs::remove_dir_all(&gone).unwrap();
    fs::remove_dir_all(gone.with_file_name("checkpoint")).unwrap();
    assert_eq!(run(&comparison).unwrap(), results);
    assert!(!gone.exists());
}
