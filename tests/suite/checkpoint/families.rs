//! Small models of every family, written by Hugging Face's transformers with their logits
//! (`tests/reference/families.py`). `FAMILIES=DIR` reads those of a directory instead, where that
//! script wrote others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs};

use burn::backend::Autodiff;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, backend::Backend};
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{
    CheckpointError, SaveOptions, WeightDtype, load_checkpoint, save_checkpoint,
};
use fusedkv::config::{Family, LayerKind, RopeScaling};
use fusedkv::{FusedKvDecoder, FusedKvDecoderConfig, KvPlan, Logits, TokenBatch};

use super::parameters;
use crate::models::{model, off, plans as every_plan, values};

/// f32 on both sides, after up to eight layers.
const SAME: f64 = 1e-4;

/// A directory, the tokens of a text, and the logits after each.
struct Case {
    name: String,
    directory: PathBuf,
    tokens: Vec<u32>,
    logits: Vec<f64>,
}

impl Case {
    fn model(&self) -> FusedKvDecoder<Flex> {
        let loaded = load_checkpoint(&self.directory, WeightDtype::F32, &FlexDevice);
        loaded.unwrap_or_else(|error| panic!("{error}")).model
    }
}

fn name(directory: &Path) -> String {
    directory
        .file_name()
        .unwrap()
        .to_string_lossy()
        .into_owned()
}

fn cases() -> Vec<Case> {
    cases_in(env::var_os("FAMILIES").map_or_else(committed, PathBuf::from))
}

fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families")
}

fn cases_in(root: PathBuf) -> Vec<Case> {
    let directories = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut cases: Vec<Case> = directories
        .filter(|directory| directory.join("config.json").is_file())
        .map(|directory| {
            let bytes = fs::read(directory.join("expected.safetensors")).unwrap();
            let expected = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let tokens = expected.tensor("tokens").unwrap();
            let logits = expected.tensor("logits").unwrap();
            Case {
                name: name(&directory),
                tokens: tokens
                    .data()
                    .chunks_exact(8)
                    .map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as u32)
                    .collect(),
                logits: logits
                    .data()
                    .chunks_exact(4)
                    .map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap())))
                    .collect(),
                directory,
            }
        })
        .collect();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    cases
}

fn batch<B: Backend>(model: &FusedKvDecoder<B>, rows: &[Vec<u32>]) -> TokenBatch<B> {
    TokenBatch::from_rows(rows, model.config().vocab_size, &B::Device::default()).unwrap()
}

/// Whether angles depend on the last position of a pass: cached keys then keep those they had.
fn depends_on_length(model: &FusedKvDecoder<Flex>) -> bool {
    matches!(
        model.config().block.rope_scaling,
        RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. }
    )
}

#[test]
fn every_family_has_the_logits_of_transformers() {
    let mut families = BTreeMap::new();
    for case in cases() {
        let model = case.model();
        *families
            .entry(format!("{:?}", model.config().block.family))
            .or_insert(0) += 1;
        let whole = values(
            &model
                .forward(batch(&model, std::slice::from_ref(&case.tokens)))
                .unwrap(),
        );
        let error = off(&whole, &case.logits);
        assert!(error < SAME, "{}: {error}", case.name);
    }
    assert_eq!(families.len(), 10, "{families:?}");
}

#[test]
fn every_family_reads_the_same_in_chunks_and_beside_a_shorter_row() {
    for case in cases() {
        let model = case.model();
        if depends_on_length(&model) {
            continue;
        }
        let vocab = model.config().vocab_size;
        let mut cache = model.new_cache(2, case.tokens.len()).unwrap();
        let mut done = 0;
        for chunk in [7, 1, 1, 13, 1, usize::MAX] {
            let end = case.tokens.len().min(done + chunk.min(case.tokens.len()));
            let row = case.tokens[done..end].to_vec();
            // The second row starts with a shorter chunk.
            let short = match done {
                0 => row[..2].to_vec(),
                _ => row.clone(),
            };
            let rows = [row, short];
            let logits = model.forward_cached(batch(&model, &rows), &mut cache, Logits::All);
            let logits = values(&logits.unwrap().narrow(0, 0, 1));
            let error = off(&logits, &case.logits[done * vocab..end * vocab]);
            assert!(error < 2.0 * SAME, "{} from {done}: {error}", case.name);
            done = end;
        }
        assert_eq!(done, case.tokens.len());
    }
}

/// The same weights to the bit, and the same block. With `FAMILIES_OUT=DIR` what is saved stays there,
/// for `tests/reference/open_in_transformers.py` to open.
#[test]
fn every_family_is_saved_as_it_was() {
    for case in cases() {
        let model = case.model();
        let directory = tempfile::tempdir().unwrap();
        let kept = env::var_os("FAMILIES_OUT").map(|kept| Path::new(&kept).join(&case.name));
        let target = kept
            .clone()
            .unwrap_or_else(|| directory.path().join("model"));
        let options = SaveOptions::new();
        save_checkpoint(&target, &model, &options)
            .unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let json = |directory: &Path| -> serde_json::Value {
            let text = fs::read_to_string(directory.join("config.json")).unwrap();
            serde_json::from_str(&text).unwrap()
        };
        let (was, is) = (json(&case.directory), json(&target));
        assert_eq!(was["model_type"], is["model_type"], "{}", case.name);
        if let Some(kept) = kept {
            let expected = "expected.safetensors";
            fs::copy(case.directory.join(expected), kept.join(expected)).unwrap();
        }
        let again = Case {
            directory: target,
            ..case
        };
        let again_model = again.model();
        assert_eq!(model.config(), again_model.config(), "{}", again.name);
        assert_eq!(
            parameters(&model),
            parameters(&again_model),
            "{}",
            again.name
        );
    }
}

/// Every plan that there is for the family's kinds of layers.
fn plans(config: &FusedKvDecoderConfig) -> impl Iterator<Item = FusedKvDecoderConfig> {
    let n_layers = config.n_layers;
    let plans = every_plan(n_layers)
        .into_iter()
        .map(move |plan| FusedKvDecoderConfig {
            plan,
            ..config.clone()
        });
    plans.filter(|config| config.validate().is_ok())
}

/// Saved and loaded to the bit; in two chunks what it is at once; gradients of every parameter that
/// are numbers.
#[test]
fn every_plan_of_every_family_saves_caches_and_trains() {
    let mut plans_of = BTreeMap::new();
    for case in cases() {
        let seen: &mut usize = plans_of.entry(case.name.clone()).or_default();
        let original = case.model().config().clone();
        for config in plans(&original).step_by(3) {
            *seen += 1;
            let context = format!("{} {:?}", case.name, config.plan);
            let model = model::<Flex>(&config, 5);
            let directory = tempfile::tempdir().unwrap();
            save_checkpoint(directory.path(), &model, &SaveOptions::new()).unwrap();
            let loaded = load_checkpoint::<Flex>(directory.path(), WeightDtype::F32, &FlexDevice);
            let loaded = loaded.unwrap().model;
            assert_eq!(loaded.config().block, config.block, "{context}");
            assert_eq!(parameters(&loaded), parameters(&model), "{context}");

            let whole = model
                .forward(batch(&model, &[case.tokens[..20].to_vec()]))
                .unwrap();
            let mut cache = model.new_cache(1, 20).unwrap();
            // Where angles depend on the length, all at once.
            let cut = if depends_on_length(&model) { 20 } else { 11 };
            for range in [0..cut, cut..20] {
                if range.is_empty() {
                    continue;
                }
                let tokens = batch(&model, &[case.tokens[range.clone()].to_vec()]);
                let logits = model
                    .forward_cached(tokens, &mut cache, Logits::All)
                    .unwrap();
                let expected = whole.clone().narrow(1, range.start, range.len());
                let error = off(&values(&logits), &values(&expected));
                assert!(error < SAME, "{context}: {error}");
            }

            let training = crate::models::model::<Autodiff<Flex>>(&config, 5);
            let logits = training
                .forward(batch(&training, &[case.tokens[..12].to_vec()]))
                .unwrap();
            let gradients = logits.powi_scalar(2).mean().backward();
            let gradients = GradientsParams::from_grads(gradients, &training);
            let mut check = Finite { gradients, context };
            training.visit(&mut check);
        }
    }
    assert!(plans_of.values().all(|&seen| seen > 0), "{plans_of:?}");
}

/// That every parameter has a gradient of numbers.
struct Finite {
    gradients: GradientsParams,
    context: String,
}

impl ModuleVisitor<Autodiff<Flex>> for Finite {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Autodiff<Flex>, D>>) {
        let gradient = self.gradients.get::<Flex, D>(param.id);
        let gradient = gradient.unwrap_or_else(|| panic!("{}: no gradient", self.context));
        assert!(
            values(&gradient).iter().all(|x| x.is_finite()),
            "{}",
            self.context
        );
    }
}

/// One that stands in the repository.
fn case(name: &str) -> Case {
    let mut cases = cases_in(committed()).into_iter();
    let case = cases.find(|case| case.name == name);
    case.unwrap_or_else(|| panic!("a directory {name}"))
}

/// Saves, and returns `config.json` once what is loaded is the same.
fn saved(config: &FusedKvDecoderConfig) -> serde_json::Value {
    let model = model::<Flex>(config, 7);
    let directory = tempfile::tempdir().unwrap();
    save_checkpoint(directory.path(), &model, &SaveOptions::new()).unwrap();
    let loaded = load_checkpoint::<Flex>(directory.path(), WeightDtype::F32, &FlexDevice);
    let loaded = loaded.unwrap().model;
    assert_eq!(loaded.config(), config);
    assert_eq!(parameters(&loaded), parameters(&model));
    let text = fs::read_to_string(directory.path().join("config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Its own upper layers are wide and share; another plan leaves them as wide as they are.
#[test]
fn the_plan_of_a_familys_own_files_is_said_by_its_own_keys() {
    let mut config = case("gemma4").model().config().clone();
    let KvPlan::Yoco { storage_layers: n } = config.plan else {
        panic!("{:?}", config.plan);
    };
    let n_layers = config.n_layers;
    let json = saved(&config);
    assert_eq!(json["model_type"], "gemma4_text");
    assert_eq!(json["num_kv_shared_layers"], n_layers - n);
    assert_eq!(json["use_double_wide_mlp"], true);
    assert!(json.get("kv_plan").is_none());
    let wide = 2 * config.ffn_size;
    config.plan = KvPlan::Yoco {
        storage_layers: n - 1,
    };
    let json = saved(&config);
    assert_eq!(json["model_type"], "fusedkv");
    assert_eq!(json["base_model_type"], "gemma4_text");
    assert_eq!(json["num_kv_shared_layers"], 0);
    for layer in n..n_layers {
        let sizes = &json["per_layer_config"][layer.to_string()];
        assert_eq!(sizes["intermediate_size"], wide, "{layer}");
    }
    config.block.ffn_sizes.clear();
    let json = saved(&config);
    assert_eq!(json["num_kv_shared_layers"], n_layers - n + 1);
    assert_eq!(json["use_double_wide_mlp"], false);
}

/// Also of a family whose own files have several projections in one tensor.
#[test]
fn widths_that_a_family_cannot_say_are_said_of_layers() {
    for name in ["llama", "phi3", "gemma3"] {
        let mut config = case(name).model().config().clone();
        assert_ne!(saved(&config)["model_type"], "fusedkv", "{name}");
        config.block.ffn_sizes = (0..config.n_layers).map(|layer| 9 + layer).collect();
        let json = saved(&config);
        assert_eq!(json["model_type"], "fusedkv", "{name}");
        assert_eq!(json["kv_plan"]["method"], "standard", "{name}");
        config.block.ffn_sizes.clear();
        let mut layers: Vec<_> = (0..config.n_layers)
            .map(|layer| LayerKind {
                head_dim: None,
                n_kv_heads: None,
                ..config.layer(layer).kind
            })
            .collect();
        layers[1].n_kv_heads = Some(config.n_heads);
        layers[2].head_dim = Some(config.head_dim + 4);
        config.block.layers = layers;
        let json = saved(&config);
        assert_eq!(
            json["per_layer_config"]["1"]["num_key_value_heads"],
            config.n_heads
        );
    }
}

/// Files of Gemma 4 have keys and values of layers that do not read them; under a plan that is not the
/// family's own, they are one tensor too many.
#[test]
fn tensors_that_a_familys_own_plan_does_not_read_are_skipped() {
    let case = case("gemma4_hub");
    let unread = "model.layers.5.self_attn.k_proj.weight";
    let file = fs::read(case.directory.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert!(tensors.tensor(unread).is_ok());
    assert!(case.model().parameter::<2>(unread).is_none());
    let directory = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(case.directory.join("config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["model_type"] = "fusedkv".into();
    json["base_model_type"] = "gemma4_text".into();
    json["kv_plan"] = serde_json::json!({ "method": "fused_kv_lite", "storage_layers": 4 });
    fs::write(directory.path().join("config.json"), json.to_string()).unwrap();
    fs::write(directory.path().join("model.safetensors"), &file).unwrap();
    let error = load_checkpoint::<Flex>(directory.path(), WeightDtype::F32, &FlexDevice);
    let error = error.unwrap_err();
    assert!(
        matches!(&error, CheckpointError::UnexpectedTensor { tensor, .. }
            if tensor.starts_with("model.layers.4.self_attn.k_")),
        "{error}"
    );
}

#[test]
fn a_block_that_a_family_cannot_say_is_refused() {
    let case = case("olmo2");
    let mut config = case.model().config().clone();
    config.block.family = Family::Llama;
    let model = config.init::<Flex>(&FlexDevice).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("model");
    let error = save_checkpoint(&target, &model, &SaveOptions::new()).unwrap_err();
    assert!(
        error.to_string().contains("block.norm_placement"),
        "{error}"
    );
    assert!(!target.exists());
}
