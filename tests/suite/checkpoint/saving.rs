//! A directory is the old or the new one.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use burn::tensor::Tensor;
use fusedkv::KvPlan;
use fusedkv::backend::Flex;
use fusedkv::checkpoint::{
    CheckpointError, RowWriter, SaveOptions, WeightDtype, check_destination, save_checkpoint,
};
use fusedkv::tokenizer::Tokenizer;
use safetensors::SafeTensors;
use tempfile::tempdir;

use super::{load, parameters};
use crate::models::{changed, fixed, model};

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn a_save_that_fails_leaves_the_old_directory() {
    let parent = tempdir().unwrap();
    let directory = parent.path().join("model");
    let old = model::<Flex>(&fixed(KvPlan::Standard), 0);
    save_checkpoint(&directory, &old, &SaveOptions::new()).unwrap();

    // The last tensor is found to be too large when all others are written.
    let huge = model(&fixed(KvPlan::Yoco { storage_layers: 2 }), 1);
    let large = |gain: Tensor<Flex, 1>| gain * 1e6;
    let huge = changed(huge, "model.norm.weight", large);
    let options = SaveOptions::new()
        .with_dtype(WeightDtype::F16)
        .with_shard_bytes(500);
    let error = save_checkpoint(&directory, &huge, &options).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Overflow { tensor, dtype: WeightDtype::F16, .. }
            if tensor == "model.norm.weight"),
        "{error}"
    );
    assert_eq!(
        parameters(&load(&directory).unwrap().model),
        parameters(&old)
    );
    assert_eq!(names(parent.path()), BTreeSet::from(["model".to_owned()]));
}

#[test]
fn a_save_replaces_a_checkpoint_and_nothing_else() {
    let parent = tempdir().unwrap();
    let directory = parent.path().join("model");
    let old = model::<Flex>(&fixed(KvPlan::Standard), 0);
    let options = SaveOptions::new().with_shard_bytes(1000).with_eos(vec![4]);
    save_checkpoint(&directory, &old, &options).unwrap();
    fs::write(directory.join("README.md"), "mine").unwrap();
    fs::write(directory.join("adapter.safetensors"), "mine").unwrap();
    fs::create_dir_all(directory.join("run/checkpoint")).unwrap();
    fs::write(directory.join("run/checkpoint/model-1.mpk"), "mine").unwrap();
    // What a save that was killed has left.
    fs::create_dir(parent.path().join(".model.saving")).unwrap();
    fs::write(parent.path().join(".model.saving/config.json"), "{").unwrap();

    let new = model::<Flex>(&fixed(KvPlan::FusedKv { storage_layers: 2 }), 1);
    save_checkpoint(&directory, &new, &SaveOptions::new()).unwrap();
    let loaded = load(&directory).unwrap();
    assert_eq!(parameters(&loaded.model), parameters(&new));
    assert_eq!(loaded.eos, [4], "kept, because the save names none");
    let expected = [
        "README.md",
        "adapter.safetensors",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "run",
    ];
    assert_eq!(names(&directory), expected.map(str::to_owned).into());
    for kept in [
        "README.md",
        "adapter.safetensors",
        "run/checkpoint/model-1.mpk",
    ] {
        assert_eq!(fs::read(directory.join(kept)).unwrap(), b"mine");
    }
    assert_eq!(names(parent.path()), BTreeSet::from(["model".to_owned()]));
}

#[cfg(unix)]
#[test]
fn a_link_to_a_directory_stays_a_link() {
    let parent = tempdir().unwrap();
    let directory = parent.path().join("model");
    fs::create_dir(&directory).unwrap();
    let link = parent.path().join("link");
    std::os::unix::fs::symlink(&directory, &link).unwrap();
    let saved = model::<Flex>(&fixed(KvPlan::Standard), 0);
    save_checkpoint(&link, &saved, &SaveOptions::new()).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(
        parameters(&load(&directory).unwrap().model),
        parameters(&saved)
    );
}

/// As the save itself would be, and nothing is there afterwards that was not before.
#[test]
fn a_place_that_cannot_be_saved_to_is_said_before() {
    let parent = tempdir().unwrap();
    let saved = model::<Flex>(&fixed(KvPlan::Standard), 0);
    let file = parent.path().join("file");
    fs::write(&file, "mine").unwrap();
    let mut refused = vec![file.clone(), file.join("model"), "".into()];
    // Elsewhere it may be a directory as others are.
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &str| fs::metadata(path).map(|found| found.dev()).ok();
        if device("/dev/shm").is_some() && device("/dev/shm") != device("/dev") {
            refused.push("/dev/shm".into());
        }
    }
    for place in refused {
        for found in [
            check_destination(&place),
            save_checkpoint(&place, &saved, &SaveOptions::new()),
        ] {
            let error = found.unwrap_err();
            let named = matches!(&error, CheckpointError::Write { path, .. } if *path == place);
            assert!(named, "{}: {error:?}", place.display());
        }
    }
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    assert_eq!(names(parent.path()), BTreeSet::from(["file".to_owned()]));

    let new = parent.path().join("a/model");
    check_destination(&new).unwrap();
    assert_eq!(names(&parent.path().join("a")), BTreeSet::new());
    save_checkpoint(&new, &saved, &SaveOptions::new()).unwrap();
    check_destination(&new).unwrap();
    assert_eq!(parameters(&load(&new).unwrap().model), parameters(&saved));
}

#[test]
fn what_cannot_be_saved_is_said() {
    let parent = tempdir().unwrap();
    let directory = parent.path().join("model");
    let saved = model::<Flex>(&fixed(KvPlan::Standard), 0);
    let fails = |directory: &Path, options: SaveOptions| {
        save_checkpoint(directory, &saved, &options).unwrap_err()
    };
    let tokenizer = Tokenizer::train_bpe("", 257).unwrap();
    let error = fails(&directory, SaveOptions::new().with_tokenizer(tokenizer));
    assert!(
        matches!(
            error,
            CheckpointError::Vocabulary {
                tokenizer: 257,
                decoder: 11,
                ..
            }
        ),
        "{error}"
    );
    let error = fails(&directory, SaveOptions::new().with_shard_bytes(0));
    assert!(matches!(error, CheckpointError::ShardBytes), "{error}");
    let file = parent.path().join("file");
    fs::write(&file, "").unwrap();
    for place in [file.clone(), file.join("model")] {
        let error = fails(&place, SaveOptions::new());
        assert!(matches!(error, CheckpointError::Write { .. }), "{error}");
    }
    assert!(!directory.exists());
}

#[test]
fn rows_become_one_tensor() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("logits.safetensors");
    let mut writer = RowWriter::create(&path, "logits", [3, 2]).unwrap();
    writer.write(&[1.0, 2.0]).unwrap();
    assert!(!path.exists());
    writer.write(&[3.0, 4.0, 5.0, 6.0]).unwrap();
    let error = writer.write(&[7.0]).unwrap_err();
    assert!(
        matches!(
            error,
            CheckpointError::Rows {
                found: 7,
                expected: 6,
                ..
            }
        ),
        "{error}"
    );
    writer.finish().unwrap();
    let file = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let logits = tensors.tensor("logits").unwrap();
    assert_eq!(
        (logits.shape(), logits.dtype()),
        (&[3, 2][..], safetensors::Dtype::F32)
    );
    let expected: Vec<u8> = (1..=6).flat_map(|x| (x as f32).to_le_bytes()).collect();
    assert_eq!(logits.data(), expected);

    let mut writer = RowWriter::create(&path, "logits", [2, 2]).unwrap();
    writer.write(&[1.0, 2.0]).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(
        matches!(
            error,
            CheckpointError::Rows {
                found: 2,
                expected: 4,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(fs::read(&path).unwrap(), file);
}

#[test]
fn rows_that_are_not_finished_leave_nothing_behind() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("logits.safetensors");
    let mut dropped = RowWriter::create(&path, "logits", [2, 2]).unwrap();
    dropped.write(&[1.0, 2.0]).unwrap();
    drop(dropped);
    let short = RowWriter::create(&path, "logits", [2, 2]).unwrap();
    let error = short.finish().unwrap_err();
    assert!(matches!(error, CheckpointError::Rows { .. }), "{error}");
    assert_eq!(names(directory.path()), BTreeSet::new());

    // Nor does one that cannot take its name, because a directory has it.
    fs::create_dir(&path).unwrap();
    let mut whole = RowWriter::create(&path, "logits", [1, 1]).unwrap();
    whole.write(&[1.0]).unwrap();
    let error = whole.finish().unwrap_err();
    assert!(matches!(error, CheckpointError::Write { .. }), "{error}");
    let left = BTreeSet::from(["logits.safetensors".to_owned()]);
    assert_eq!(names(directory.path()), left);
}
