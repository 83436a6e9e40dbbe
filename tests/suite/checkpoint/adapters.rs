//! Adapters in files: those that Python's PEFT has written (`tests/reference/adapters.py`), what comes
//! back of our own, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::backend::Autodiff;
use burn::module::AutodiffModule;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{
    CheckpointError, SaveOptions, load_adapter, save_adapter, save_checkpoint,
};
use fusedkv::{FusedKvDecoder, KvPlan, LoraConfig, LoraError, TokenBatch, WeightFormat};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::{Value, json};
use tempfile::tempdir;

use super::{load, parameters};
use crate::lora::learned;
use crate::models::{any_case, fixed, model, off, values};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

fn golden() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adapters");
    let cases = fs::read_dir(directory).unwrap();
    let mut cases: Vec<_> = cases.map(|case| case.unwrap().path()).collect();
    cases.sort();
    cases
}

fn config(directory: &Path) -> Value {
    serde_json::from_slice(&fs::read(directory.join(CONFIG)).unwrap()).unwrap()
}

fn base(directory: &Path) -> FusedKvDecoder<Flex> {
    let base = config(directory)["base_model_name_or_path"].clone();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    load(&root.join(base.as_str().unwrap())).unwrap().model
}

fn logits(model: &FusedKvDecoder<Flex>, rows: &[Vec<u32>]) -> Vec<f64> {
    let batch = TokenBatch::from_rows(rows, model.config().vocab_size, &FlexDevice).unwrap();
    values(&model.forward(batch).unwrap())
}

/// The tensors of a file: shapes and numbers by their names.
fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let file = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let tensors = file.tensors().into_iter();
    tensors
        .map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())))
        .collect()
}

fn targets(names: &[&str]) -> LoraConfig {
    let names = names.iter().map(|&name| name.to_owned()).collect();
    LoraConfig::new(3, 4.5).with_targets(names)
}

#[test]
fn adapters_of_peft_compute_what_they_do_there() {
    let cases = golden();
    assert_eq!(cases.len(), 3);
    for directory in cases {
        let model = load_adapter(&directory, base(&directory)).unwrap();
        let file = fs::read(directory.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        let numbers = |name, bytes| file.tensor(name).unwrap().data().chunks(bytes);
        let tokens =
            numbers("tokens", 8).map(|token| i64::from_le_bytes(token.try_into().unwrap()));
        let rows = [tokens.map(|token| token as u32).collect()];
        let expected = numbers("logits", 4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
        let expected: Vec<_> = expected.map(f64::from).collect();
        let name = directory.display();
        assert!(off(&logits(&model, &rows), &expected) < 1e-4, "{name}");
        assert!(off(&logits(&base(&directory), &rows), &expected) > 1e-2);
        let merged = model.clone().merge_lora().unwrap();
        assert!(off(&logits(&merged, &rows), &expected) < 1e-4, "{name}");

        // What we write of them is what PEFT does.
        let saved = tempdir().unwrap();
        save_adapter(saved.path(), &model, "base").unwrap();
        let theirs = tensors(&directory.join(WEIGHTS));
        assert_eq!(tensors(&saved.path().join(WEIGHTS)), theirs, "{name}");
        let (ours, theirs) = (config(saved.path()), config(&directory));
        assert_eq!(ours["base_model_name_or_path"], "base");
        let differ = ["base_model_name_or_path", "lora_alpha", "use_rslora"];
        for (key, value) in ours.as_object().unwrap() {
            if !differ.contains(&key.as_str()) {
                assert_eq!(*value, theirs[key], "{name}: {key}");
            }
        }
        let scale = |config: &Value| {
            let rank = config["r"].as_f64().unwrap();
            let alpha = config["lora_alpha"].as_f64().unwrap();
            match config["use_rslora"].as_bool().unwrap() {
                true => alpha / rank.sqrt(),
                false => alpha / rank,
            }
        };
        assert!((scale(&ours) - scale(&theirs)).abs() < 1e-12);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any plan and block, matrices in any format, floats of any type.
    #[test]
    fn what_is_saved_is_loaded(
        case in any_case(1..10),
        format in prop::sample::select(WeightFormat::NAMES.to_vec()),
    ) {
        let directory = tempdir().unwrap();
        let path = directory.path().join("adapter");
        let base = case.model::<Flex>().with_weights(format.1).unwrap();
        let model = learned(base.clone(), &targets(&["q_proj", "o_proj", "mlp.down_proj"]));
        save_adapter(&path, &model, "base").unwrap();
        let loaded = load_adapter(&path, base.clone()).unwrap();
        prop_assert_eq!(loaded.lora(), model.lora());
        prop_assert_eq!(loaded.weight_bytes(), base.weight_bytes());
        prop_assert_eq!(parameters(&loaded), parameters(&model));
        prop_assert_eq!(logits(&loaded, &case.tokens), logits(&model, &case.tokens));
        // To be trained on.
        let tracked = FusedKvDecoder::<Autodiff<Flex>>::from_inner(base);
        let tracked = load_adapter(&path, tracked).unwrap();
        prop_assert_eq!(parameters(&tracked.valid()), parameters(&model));
        // Beside what is there already.
        std::fs::write(path.join("README.md"), "kept").unwrap();
        save_adapter(&path, &model, "other").unwrap();
        let names: Vec<_> = std::fs::read_dir(&path).unwrap().collect();
        prop_assert_eq!(names.len(), 3);
    }
}

#[test]
fn a_decoder_with_adapters_is_no_checkpoint() {
    let directory = tempdir().unwrap();
    let base = model::<Flex>(&fixed(KvPlan::Standard), 2);
    let error = save_adapter(directory.path(), &base, "base").unwrap_err();
    assert!(matches!(error, CheckpointError::NoAdapter), "{error}");
    let model = learned(base, &targets(&["q_proj"]));
    let error = save_checkpoint(directory.path(), &model, &SaveOptions::new()).unwrap_err();
    assert!(matches!(error, CheckpointError::Adapted), "{error}");
    let merged = model.merge_lora().unwrap();
    save_checkpoint(directory.path(), &merged, &SaveOptions::new()).unwrap();
    assert_eq!(
        parameters(&load(directory.path()).unwrap().model),
        parameters(&merged)
    );
}

/// A directory of adapters beside the bottom two of four layers' values and all layers' queries.
struct Saved {
    directory: tempfile::TempDir,
    base: FusedKvDecoder<Flex>,
}

impl Saved {
    fn new() -> Self {
        let base = model::<Flex>(&fixed(KvPlan::Yoco { storage_layers: 2 }), 2);
        let directory = tempdir().unwrap();
        let model = learned(base.clone(), &targets(&["q_proj", "v_proj"]));
        save_adapter(directory.path(), &model, "base").unwrap();
        Self { directory, base }
    }

    fn load(&self) -> CheckpointError {
        load_adapter(self.directory.path(), self.base.clone()).unwrap_err()
    }

    fn with(&self, key: &str, value: Value) -> CheckpointError {
        let path = self.directory.path().join(CONFIG);
        let kept = fs::read(&path).unwrap();
        let mut config = config(self.directory.path());
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        let error = self.load();
        fs::write(&path, kept).unwrap();
        error
    }
}

#[test]
fn settings_that_ask_for_more_are_refused() {
    let saved = Saved::new();
    for (key, value) in [
        ("peft_type", json!("LOHA")),
        ("bias", json!("all")),
        ("use_dora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("rank_pattern", json!({ "q_proj": 2 })),
        ("alpha_pattern", json!({ "q_proj": 2 })),
        ("modules_to_save", json!(["lm_head"])),
        ("layers_to_transform", json!([1])),
        ("init_lora_weights", json!("pissa")),
        ("target_modules", json!("all-linear")),
        ("target_modules", Value::Null),
        ("r", json!(2.5)),
        ("lora_alpha", Value::Null),
    ] {
        let error = saved.with(key, value.clone());
        assert!(
            matches!(&error, CheckpointError::Setting { key: found, .. } if found == key),
            "{key} {value}: {error}"
        );
    }
    for (key, value, expected) in [
        ("r", json!(0), LoraError::Rank),
        ("lora_alpha", json!(-1.0), LoraError::Alpha(-1.0)),
    ] {
        match saved.with(key, value) {
            CheckpointError::Adapter { source, path } => {
                assert_eq!((source, path.ends_with(CONFIG)), (expected, true));
            }
            error => panic!("{error}"),
        }
    }
    let error = saved.with("target_modules", json!(["q_proj", "qkv_proj"]));
    assert!(
        matches!(&error, CheckpointError::Adapter { source: LoraError::UnknownTarget { target, .. }, .. }
            if target == "qkv_proj"),
        "{error}"
    );
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let saved = Saved::new();
    let error = saved.with("r", json!(2));
    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    assert!(
        matches!(&error, CheckpointError::Shape { tensor, found, expected, .. }
            if tensor == name && found == &[3, 12] && expected == &[2, 12]),
        "{error}"
    );
    // Nothing is allocated for what is not there.
    let error = saved.with("r", json!(1_u64 << 50));
    assert!(matches!(error, CheckpointError::Shape { .. }), "{error}");
    // Those beside values are of no target then, and those beside outputs missing.
    let error = saved.with("target_modules", json!(["q_proj"]));
    assert!(
        matches!(&error, CheckpointError::UnexpectedTensor { tensor, .. } if tensor.contains("v_proj")),
        "{error}"
    );
    let error = saved.with("target_modules", json!(["q_proj", "v_proj", "o_proj"]));
    assert!(
        matches!(&error, CheckpointError::MissingTensor { tensor, shape, .. }
            if tensor.contains("o_proj.lora_A") && shape == &[3, 24]),
        "{error}"
    );
    let path = saved.directory.path().join(WEIGHTS);
    let whole = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&whole).unwrap();
    let ints = file.tensors().into_iter().map(|(tensor, view)| {
        let dtype = if tensor == name {
            Dtype::I32
        } else {
            Dtype::F32
        };
        let (shape, data) = (view.shape().to_vec(), view.data().to_vec());
        (tensor, dtype, shape, data)
    });
    let ints: Vec<_> = ints.collect();
    let views = ints.iter().map(|(name, dtype, shape, data)| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    serialize_to_file(views, None, &path).unwrap();
    let error = saved.load();
    assert!(
        matches!(&error, CheckpointError::Dtype { tensor, found, .. } if tensor == name && found == "I32"),
        "{error}"
    );
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let error = saved.load();
    assert!(
        matches!(error, CheckpointError::Truncated { .. }),
        "{error}"
    );
    fs::remove_file(&path).unwrap();
    let error = saved.load();
    assert!(
        matches!(error, CheckpointError::MissingFile { file: WEIGHTS, .. }),
        "{error}"
    );
}

#[test]
fn adapters_of_another_base_are_refused() {
    let saved = Saved::new();
    let other = |config| load_adapter(saved.directory.path(), model::<Flex>(&config, 2));
    let plan = KvPlan::Yoco { storage_layers: 2 };
    // What changes nothing that is computed.
    let more = fixed(plan.clone())
        .with_max_positions(80)
        .with_init_std(0.5);
    other(more).unwrap();
    for (config, field) in [
        (fixed(KvPlan::FusedKv { storage_layers: 2 }), "plan"),
        (fixed(plan.clone()).with_ffn_size(11), "ffn_size"),
        (fixed(plan).with_rope_theta(100.0), "rope_theta"),
    ] {
        let error = other(config).unwrap_err();
        assert!(
            matches!(&error, CheckpointError::OtherBase { field: found, .. } if found == field),
            "{error}"
        );
    }
    let adapted = load_adapter(saved.directory.path(), saved.base.clone()).unwrap();
    let error = load_adapter(saved.directory.path(), adapted).unwrap_err();
    assert!(
        matches!(
            error,
            CheckpointError::Adapter {
                source: LoraError::Adapted,
                ..
            }
        ),
        "{error}"
    );
}
