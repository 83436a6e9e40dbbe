//! What is saved is what is loaded, bit by bit.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use burn_ndarray::NdArray;
use fusedkv::backend::{Autodiff, Flex, FlexDevice};
use fusedkv::checkpoint::{
    CheckpointError, LoadOptions, SaveOptions, WeightDtype, load_checkpoint, save_checkpoint,
};
use fusedkv::tokenizer::Tokenizer;
use fusedkv::{BlockConfig, KvPlan};
use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::tempdir;

use super::{load, parameters};
use crate::models::{any_case, changed, fixed, model, plans};

const DTYPES: [WeightDtype; 3] = [WeightDtype::F32, WeightDtype::F16, WeightDtype::Bf16];

fn in_memory(dtype: WeightDtype) -> DType {
    match dtype {
        WeightDtype::F32 => DType::F32,
        WeightDtype::F16 => DType::F16,
        WeightDtype::Bf16 => DType::BF16,
    }
}

/// All files of weights, by name.
fn weight_files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

fn converted(all: Vec<TensorData>, dtype: WeightDtype) -> Vec<TensorData> {
    let convert = |data: TensorData| data.convert_dtype(in_memory(dtype));
    all.into_iter().map(convert).collect()
}

#[test]
fn every_plan_in_every_dtype() {
    let directory = tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| directory.path().join(name));
    for plan in plans(4) {
        let config = fixed(plan.clone()).with_tie_embeddings(plan != KvPlan::Standard);
        let original = model::<Flex>(&config, 1);
        for dtype in DTYPES {
            let options = SaveOptions::new().with_dtype(dtype);
            save_checkpoint(&first, &original, &options).unwrap();
            let loaded = load_checkpoint::<Flex>(&first, dtype, &FlexDevice)
                .unwrap()
                .model;
            assert_eq!(loaded.config(), &config);
            let expected = converted(parameters(&original), dtype);
            assert_eq!(parameters(&loaded), expected, "{plan:?} {dtype:?}");

            // And again, now in the model's own type.
            save_checkpoint(&second, &loaded, &SaveOptions::new()).unwrap();
            assert_eq!(
                weight_files(&first),
                weight_files(&second),
                "{plan:?} {dtype:?}"
            );

            // Widening loses nothing.
            let wide = load_checkpoint::<NdArray>(&first, WeightDtype::F32, &Default::default());
            let wide = parameters(&wide.unwrap().model);
            assert_eq!(
                wide,
                converted(expected, WeightDtype::F32),
                "{plan:?} {dtype:?}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any shape, any size of shards; under autodiff the parameters take gradients again.
    #[test]
    fn any_shape_in_any_shards(mut case in any_case(1..4), shard_bytes in 1u64..4000) {
        // No family's files can say any block; `families` has theirs.
        case.config.block = BlockConfig::default();
        let directory = tempdir().unwrap();
        let original = case.model::<Flex>();
        let options = SaveOptions::new().with_shard_bytes(shard_bytes);
        save_checkpoint(directory.path(), &original, &options).unwrap();
        for (name, file) in weight_files(directory.path()) {
            let tensors = SafeTensors::deserialize(&file).unwrap();
            let bytes: usize = tensors.tensors().iter().map(|(_, view)| view.data().len()).sum();
            prop_assert!(tensors.len() == 1 || bytes as u64 <= shard_bytes, "{}", name);
        }
        let loaded = load(directory.path()).unwrap().model;
        prop_assert_eq!(parameters(&loaded), parameters(&original));
        let trainable = load_checkpoint::<Autodiff<Flex>>(
            directory.path(), WeightDtype::F32, &FlexDevice,
        ).unwrap().model;
        let embedding = trainable.parameter::<2>("model.embed_tokens.weight").unwrap();
        prop_assert!(embedding.is_require_grad());
    }
}

#[test]
fn linear_weights_are_stored_output_first() {
    let directory = tempdir().unwrap();
    let original = model::<Flex>(&fixed(KvPlan::Standard), 0);
    save_checkpoint(directory.path(), &original, &SaveOptions::new()).unwrap();
    let file = fs::read(directory.path().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let name = "model.layers.2.mlp.down_proj.weight";
    let stored = tensors.tensor(name).unwrap();
    assert_eq!(stored.shape(), [12, 10]);
    let weight = original.parameter::<2>(name).unwrap().transpose();
    assert_eq!(stored.data(), weight.into_data().as_bytes());
}

#[test]
fn a_tied_head_is_not_stored_and_its_copy_is_accepted() {
    let directory = tempdir().unwrap();
    let path = directory.path();
    let untied = model::<Flex>(&fixed(KvPlan::Standard).with_tie_embeddings(false), 0);
    save_checkpoint(path, &untied, &SaveOptions::new()).unwrap();
    let config_path = path.join("config.json");
    let tie = || {
        let config = fs::read_to_string(&config_path).unwrap();
        let tied = config.replace(
            "\"tie_word_embeddings\": false",
            "\"tie_word_embeddings\": true",
        );
        fs::write(&config_path, tied).unwrap();
    };
    tie();
    let error = load(path).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::UnexpectedTensor { tensor, .. } if tensor == "lm_head.weight"),
        "{error}"
    );

    let embedding = untied.parameter::<2>("model.embed_tokens.weight");
    let embedding = embedding.unwrap().transpose();
    let copied = changed(untied, "lm_head.weight", |_| embedding);
    save_checkpoint(path, &copied, &SaveOptions::new()).unwrap();
    tie();
    let loaded = load(path).unwrap().model;
    assert!(loaded.parameter::<2>("lm_head.weight").is_none());
    save_checkpoint(path, &loaded, &SaveOptions::new()).unwrap();
    let file = fs::read(path.join("model.safetensors")).unwrap();
    assert!(
        SafeTensors::deserialize(&file)
            .unwrap()
            .tensor("lm_head.weight")
            .is_err()
    );
}

#[test]
fn tokenizer_and_eos_come_along() {
    let directory = tempdir().unwrap();
    let tokenizer = Tokenizer::train_bpe("to be or not to be", 260).unwrap();
    let mut config = fixed(KvPlan::Yoco { storage_layers: 2 });
    config.vocab_size = 260;
    let original = model::<Flex>(&config, 0);
    for eos in [vec![], vec![7], vec![7, 9]] {
        let path = directory.path().join(eos.len().to_string());
        let options = SaveOptions::new()
            .with_tokenizer(tokenizer.clone())
            .with_eos(eos.clone());
        save_checkpoint(&path, &original, &options).unwrap();
        let loaded = load(&path).unwrap();
        assert_eq!(loaded.eos, eos);
        let found = loaded.tokenizer.unwrap().encode("not to").unwrap();
        assert_eq!(found, tokenizer.encode("not to").unwrap());
    }
}

/// The projections that a plan does not need stay in the file, and everything else is as converted;
/// what it needs beyond the file is named.
#[test]
fn a_directory_is_narrowed_to_a_plan() {
    let directory = tempdir().unwrap();
    let standard = model::<Flex>(&fixed(KvPlan::Standard), 3);
    save_checkpoint(directory.path(), &standard, &SaveOptions::new()).unwrap();
    let narrowed = |plan: &KvPlan| {
        let options = LoadOptions::new().with_plan(plan.clone());
        load_checkpoint::<Flex>(directory.path(), options, &FlexDevice)
    };
    for plan in [
        KvPlan::Standard,
        KvPlan::Yoco { storage_layers: 2 },
        KvPlan::FusedKvLite { storage_layers: 1 },
        KvPlan::Cla { factor: 2 },
    ] {
        let loaded = narrowed(&plan).unwrap().model;
        let converted = fusedkv::convert::convert(&standard, &plan).unwrap();
        assert_eq!(loaded.config(), converted.config());
        assert_eq!(parameters(&loaded), parameters(&converted));
    }
    let error = narrowed(&KvPlan::FusedKv { storage_layers: 2 }).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::MissingTensor { tensor, .. } if tensor.contains("kv_fusion")),
        "{error}"
    );
    let error = narrowed(&KvPlan::Yoco { storage_layers: 9 }).unwrap_err();
    assert!(matches!(error, CheckpointError::Config { .. }), "{error}");
}
