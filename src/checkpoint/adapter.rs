//! Adapters in files of their own, in the layout of Hugging Face's PEFT: `adapter_config.json` and
//! `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::directory;
use super::error::CheckpointError;
use super::keys::{Keys, shown};
use super::numbers::{Overflow, WeightDtype, encode};
use super::read::{Kind, Loaded, Reading, read_all};
use super::safetensors::{SafetensorsFile, weight_dtype};
use super::save::{header_with, write_json};
use super::stored::FloatRows;
use crate::config::FusedKvDecoderConfig;
use crate::decoder::{FusedKvDecoder, LoraConfig};
use crate::parameters::TensorSpec;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// The key of the file's metadata that says what the adapters were made for.
const BASE: &str = "fusedkv_base";

/// Settings of PEFT that ask for more than adapters of one rank beside projections, with the values
/// that ask for nothing.
fn plain_settings() -> [(&'static str, Value); 7] {
    [
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("rank_pattern", json!({})),
        ("alpha_pattern", json!({})),
        ("use_dora", json!(false)),
        ("lora_bias", json!(false)),
        ("use_qalora", json!(false)),
    ]
}

/// The same for those that ask for nothing where they are null.
const ABSENT_SETTINGS: [&str; 10] = [
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "exclude_modules",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
];

/// Saves a decoder's adapters, and nothing of the decoder, as PEFT does; the numbers are in the
/// decoder's float type.
///
/// `base` is what PEFT is to load them beside: a directory, or a name on the hub. The directory
/// changes in one step, as [`save_checkpoint`](super::save_checkpoint)'s does; other files in it stay.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::checkpoint::{load_adapter, save_adapter};
/// use fusedkv::{FusedKvDecoderConfig, KvPlan, LoraConfig};
///
/// # let directory = tempfile::tempdir()?;
/// # let directory = directory.path().join("adapter");
/// let config = FusedKvDecoderConfig::tiny(256, KvPlan::FusedKv { storage_layers: 3 });
/// let base = config.init::<Flex>(&FlexDevice::default())?;
/// let model = base.clone().with_lora(&LoraConfig::new(4, 8.0))?;
/// save_adapter(&directory, &model, "path/to/base")?;
///
/// let same = load_adapter(&directory, base)?;
/// assert_eq!(same.lora(), model.lora());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`CheckpointError::NoAdapter`] if the decoder has none, [`CheckpointError::Write`].
pub fn save_adapter<B: Backend>(
    directory: impl AsRef<Path>,
    model: &FusedKvDecoder<B>,
    base: &str,
) -> Result<(), CheckpointError> {
    let lora = model.lora().ok_or(CheckpointError::NoAdapter)?;
    let replaced = |name: &str| name == CONFIG || name == WEIGHTS;
    directory::replace(directory.as_ref(), replaced, |partial| {
        write_json(&partial.join(CONFIG), &config_json(lora, base))?;
        let path = partial.join(WEIGHTS);
        let bytes = weights(model, &path)?;
        fs::write(&path, bytes)
            .and_then(|()| fs::File::open(&path)?.sync_all())
            .map_err(|source| CheckpointError::Write { path, source })
    })
}

fn config_json(lora: &LoraConfig, base: &str) -> Value {
    let mut json = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": true,
        "init_lora_weights": true,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": lora.targets,
        "use_rslora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "rank_pattern": {},
        "alpha_pattern": {},
    });
    // As PEFT writes it, where a whole number is one exactly.
    if lora.alpha.fract() == 0.0 && lora.alpha < 1e15 {
        json["lora_alpha"] = json!(lora.alpha as u64);
    }
    json
}

/// What a file calls both matrices of an adapter, `[rank, input]` and `[output, rank]`.
fn names(layer: usize, projection: &str) -> [String; 2] {
    ["lora_A", "lora_B"]
        .map(|matrix| format!("base_model.model.model.layers.{layer}.{projection}.{matrix}.weight"))
}

/// What a file has of an adapter beside a projection `[input, output]`.
fn specs(
    layer: usize,
    projection: &str,
    [input, output]: [usize; 2],
    rank: usize,
) -> [TensorSpec; 2] {
    let [a, b] = names(layer, projection);
    [(a, [rank, input]), (b, [output, rank])].map(|(name, shape)| TensorSpec {
        name,
        shape: shape.into(),
    })
}

/// The whole file of weights: small, so that it is made in memory.
fn weights<B: Backend>(model: &FusedKvDecoder<B>, path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let dtype = WeightDtype::of_model(model.dtype());
    let (mut entries, mut bytes) = (Vec::new(), Vec::new());
    for (layer, projection, lora) in model.adapters() {
        let [input, rank] = lora.a.dims();
        let [_, output] = lora.b.dims();
        let specs = specs(layer, &projection, [input, output], rank);
        for (spec, matrix) in specs.into_iter().zip([&lora.a, &lora.b]) {
            let data = matrix.val().transpose().into_data();
            encode(data.iter::<f64>(), dtype, &mut bytes).map_err(|Overflow(value)| {
                CheckpointError::Overflow {
                    path: path.to_owned(),
                    tensor: spec.name.clone(),
                    value,
                    dtype,
                }
            })?;
            entries.push((spec, dtype.stored()));
        }
    }
    let base = Value::Object(described(model.config()).into_iter().collect());
    let mut file = header_with(&entries, [(BASE, base.to_string())]);
    file.extend(bytes);
    Ok(file)
}

/// What of a decoder's configuration its adapters depend on.
fn described(config: &FusedKvDecoderConfig) -> BTreeMap<String, Value> {
    const FIELDS: [&str; 11] = [
        "vocab_size",
        "hidden_size",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "ffn_size",
        "plan",
        "rope_theta",
        "rms_norm_eps",
        "block",
    ];
    let json = json!(config);
    let field = |name: &str| (name.to_owned(), json[name].clone());
    FIELDS.map(field).into()
}

/// Loads adapters beside a decoder's projections, whatever its plan and whatever its matrices are kept
/// in: those that [`save_adapter`] saved, or PEFT.
///
/// Everything is checked before any number is read. Of PEFT's settings, adapters of one rank and alpha
/// beside projections named by a list are known, rank-stabilised ones included (as the alpha that
/// gives their scale). Where `model.safetensors` of a family has several projections in one tensor
/// (Phi-3), adapters are of this crate's projections.
///
/// # Errors
/// [`CheckpointError`], naming the file and the key or tensor: [`CheckpointError::Adapter`] for
/// adapters that the decoder cannot have, as beside projections that it has not, or a second time;
/// [`CheckpointError::OtherBase`] for those that were saved here of another decoder;
/// [`CheckpointError::Shape`], [`CheckpointError::MissingTensor`] and
/// [`CheckpointError::UnexpectedTensor`] for tensors that do not fit rank, targets or decoder.
pub fn load_adapter<B: Backend>(
    directory: impl AsRef<Path>,
    model: FusedKvDecoder<B>,
) -> Result<FusedKvDecoder<B>, CheckpointError> {
    let directory = directory.as_ref();
    for file in [CONFIG, WEIGHTS] {
        if !directory.join(file).is_file() {
            return Err(CheckpointError::MissingFile {
                directory: directory.to_owned(),
                file,
            });
        }
    }
    let config_path = directory.join(CONFIG);
    let config = read_config(config_path.clone())?;
    let file = SafetensorsFile::open(&directory.join(WEIGHTS))?;
    check_base(&file, model.config())?;
    let unfit = |source| CheckpointError::Adapter {
        path: config_path.clone(),
        source,
    };
    // Nothing is made as large as the configuration says before the file is found to be.
    check_tensors(
        &file,
        model.lora_targets(&config).map_err(unfit)?,
        config.rank,
    )?;
    let mut model = model.with_lora(&config).map_err(unfit)?;
    let (dtype, device) = (model.dtype(), model.device());
    model.try_for_each_adapter(|layer, projection, lora| {
        let [a, b] = names(layer, projection);
        for (name, matrix) in [(a, &mut lora.a), (b, &mut lora.b)] {
            let data = transposed(&file, name, WeightDtype::of_model(dtype))?;
            let numbers = Tensor::<B, 2>::from_data(data, (&device, dtype));
            *matrix = Param::from_tensor(numbers);
        }
        Ok::<_, CheckpointError>(())
    })?;
    Ok(model)
}

/// A matrix of the file, its rows as columns.
fn transposed(
    file: &SafetensorsFile,
    name: String,
    dtype: WeightDtype,
) -> Result<TensorData, CheckpointError> {
    let place = file.tensors()[&name].clone();
    let shape = place.shape.clone();
    let rows = FloatRows {
        dtype: weight_dtype(file.path(), &name, &place)?,
        dims: [shape[0], shape[1]],
        tensor: (file, place),
        name,
    };
    let transposed = true;
    let mut readings = [Reading::new(
        Box::new(rows),
        Kind::Float { dtype, transposed },
    )];
    read_all(&mut readings)?;
    let [reading] = readings;
    match reading.finish(shape) {
        Loaded::Float(data) => Ok(data),
        Loaded::Packed(_) => unreachable!("floats were asked for"),
    }
}

fn read_config(path: PathBuf) -> Result<LoraConfig, CheckpointError> {
    let keys = Keys::read(path)?;
    let needed = |key: &str, expected: &str| keys.wrong(key, expected);
    if keys.text("peft_type")?.as_deref() != Some("LORA") {
        return Err(needed("peft_type", "\"LORA\""));
    }
    for (key, value) in plain_settings() {
        keys.only(key, &value)?;
    }
    for key in ABSENT_SETTINGS {
        keys.absent(key)?;
    }
    // Others have changed the base beneath the adapters.
    let initial = |value: &Value| (value.is_boolean() || value == "gaussian").then_some(());
    keys.optional("init_lora_weights", initial, "true, false or \"gaussian\"")?;
    let rank = keys.count("r")?;
    let alpha = keys.number("lora_alpha")?;
    let mut alpha = alpha.ok_or_else(|| needed("lora_alpha", "a number"))?;
    if keys.flag("use_rslora")? == Some(true) {
        // α / √r, as α' / r.
        alpha *= (rank as f64).sqrt();
    }
    let names = |value: &Value| {
        let names = value.as_array()?.iter();
        names.map(|name| Some(name.as_str()?.to_owned())).collect()
    };
    let expected = "a list of names of projections";
    let targets = keys.optional("target_modules", names, expected)?;
    let targets = targets.ok_or_else(|| needed("target_modules", expected))?;
    Ok(LoraConfig {
        rank,
        alpha,
        targets,
    })
}

/// That the adapters were made for such a decoder, if the file says.
fn check_base(
    file: &SafetensorsFile,
    config: &FusedKvDecoderConfig,
) -> Result<(), CheckpointError> {
    let Some(base) = file.metadata().get(BASE) else {
        return Ok(());
    };
    let base: BTreeMap<String, Value> =
        serde_json::from_str(base).map_err(|error| CheckpointError::Header {
            path: file.path().to_owned(),
            reason: format!("`{BASE}` of its metadata is no JSON object: {error}"),
        })?;
    for (field, expected) in described(config) {
        let found = base.get(&field).unwrap_or(&Value::Null);
        if *found != expected {
            return Err(CheckpointError::OtherBase {
                path: file.path().to_owned(),
                field,
                found: shown(found),
                expected: shown(&expected),
            });
        }
    }
    Ok(())
}

/// That the file has the tensors of adapters beside these projections, and no others.
fn check_tensors(
    file: &SafetensorsFile,
    targets: Vec<(usize, String, [usize; 2])>,
    rank: usize,
) -> Result<(), CheckpointError> {
    let path = file.path().to_owned();
    let mut left = file.tensors().clone();
    for (layer, projection, dims) in targets {
        for TensorSpec { name, shape } in specs(layer, &projection, dims, rank) {
            let Some(place) = left.remove(&name) else {
                return Err(CheckpointError::MissingTensor {
                    path,
                    tensor: name,
                    shape,
                });
            };
            if place.shape != shape {
                return Err(CheckpointError::Shape {
                    path,
                    tensor: name,
                    found: place.shape,
                    expected: shape,
                });
            }
            if !matches!(place.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                return Err(CheckpointError::Dtype {
                    path,
                    tensor: name,
                    found: place.dtype.to_string(),
                });
            }
        }
    }
    match left.into_keys().next() {
        Some(tensor) => Err(CheckpointError::UnexpectedTensor {
            path,
            tensor,
            reason: "is of no projection of the decoder that the configuration names",
        }),
        None => Ok(()),
    }
}
