//! A run and a model as the crate wrote them before records knew their plan (`tests/golden/run-0.1`,
//! 8 steps of `train_tiny` on a nursery rhyme).

use std::path::PathBuf;

use burn::tensor::{Distribution, Tensor};

use super::*;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/run-0.1")
}

/// A copy of the run, because resuming writes.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn logits(model: &FusedKvDecoder<Flex>) -> Vec<f32> {
    let logits =
        model.forward(TokenBatch::from_rows(&[vec![5, 17, 100]], 260, &FlexDevice).unwrap());
    logits.unwrap().into_data().to_vec().unwrap()
}

#[test]
fn a_run_of_before_gives_its_model() {
    // Burn counts an optional module's parameters before it loads them, and draws them for that.
    let last = || Run::new(golden().join("run")).last::<Flex>(&FlexDevice);
    let (model, losses) = in_turn(last).unwrap();
    let saved = load_checkpoint::<Flex>(golden(), WeightDtype::F32, &FlexDevice).unwrap();
    assert_eq!(logits(&model), logits(&saved.model));
    assert_eq!(losses.epoch, 2);
}

/// A number drawn after a seed and `work`.
fn drawn(work: impl FnOnce()) -> f32 {
    in_turn(|| {
        Flex::seed(&FlexDevice, 7);
        work();
        Tensor::<Flex, 1>::random([1], Distribution::Default, &FlexDevice).into_scalar()
    })
}

/// Weights that files have are not drawn first.
#[test]
fn loading_a_directory_draws_no_random_numbers() {
    let expected = drawn(|| {});
    let directory = || {
        let saved = load_checkpoint::<Flex>(golden(), WeightDtype::F32, &FlexDevice).unwrap();
        logits(&saved.model);
    };
    assert_eq!(drawn(directory), expected);
}

#[test]
fn a_run_of_before_goes_on() {
    let directory = tempdir().unwrap();
    copy(&golden().join("run"), directory.path());
    // As if it had died in its second epoch.
    for part in ["model", "optim", "scheduler"] {
        fs::remove_file(directory.path().join(format!("checkpoint/{part}-2.mpk"))).unwrap();
    }
    let config = fs::read(directory.path().join("training.json")).unwrap();
    let config: TrainingConfig = serde_json::from_slice(&config).unwrap();
    let saved = load_checkpoint::<Flex>(golden(), WeightDtype::F32, &FlexDevice).unwrap();
    let text = "one fish two fish red fish blue fish\n".repeat(60);
    let tokens = saved.tokenizer.unwrap().encode(&text).unwrap();
    let run = Run::new(directory.path())
        .with_progress(Progress::Quiet)
        .with_resume(true);
    let trained = in_turn(|| train::<Autodiff<Flex>>(&config, tokens, &run, &FlexDevice)).unwrap();
    let epochs: Vec<_> = trained.epochs.iter().map(|losses| losses.epoch).collect();
    assert_eq!(epochs, [1, 2]);
    assert!(trained.valid_loss < trained.epochs[0].valid);
}
