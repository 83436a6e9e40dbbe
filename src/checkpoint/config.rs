//! `config.json` and `generation_config.json`: a family's keys, and `kv_plan`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::error::CheckpointError;
use super::families;
use super::keys::Keys;
use super::numbers::WeightDtype;
use super::{CONFIG, GENERATION_CONFIG};
use crate::config::{ConfigError, FusedKvDecoderConfig};

/// What `config.json` and `generation_config.json` say.
#[derive(Clone, Debug)]
pub(super) struct ModelConfig {
    pub path: PathBuf,
    /// Its plan is not resolved yet.
    pub decoder: FusedKvDecoderConfig,
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// The error of a configuration that describes no decoder.
    pub fn invalid(&self, source: ConfigError) -> CheckpointError {
        CheckpointError::Config {
            path: self.path.clone(),
            source,
        }
    }
}

/// Reads both files.
pub(super) fn read(directory: &Path) -> Result<ModelConfig, CheckpointError> {
    let path = directory.join(CONFIG);
    if !path.is_file() {
        return Err(CheckpointError::MissingFile {
            directory: directory.to_owned(),
            file: CONFIG,
        });
    }
    let config = Keys::read(path)?;
    let generation = directory.join(GENERATION_CONFIG);
    let mut eos = None;
    if generation.is_file() {
        eos = Keys::read(generation)?.token_ids("eos_token_id")?;
    }
    of_keys(&config, eos)
}

/// What the keys of a `config.json` say; `eos` are those of a `generation_config.json`.
pub(super) fn of_keys(
    config: &Keys,
    eos: Option<Vec<u32>>,
) -> Result<ModelConfig, CheckpointError> {
    let decoder = families::read(config)?;
    config.only("weight_format", &json!(INT8))?;
    let eos = match eos {
        Some(eos) => Some(eos),
        None => config.token_ids("eos_token_id")?,
    };
    Ok(ModelConfig {
        path: config.path.clone(),
        decoder,
        eos: eos.unwrap_or_default(),
    })
}

/// What `weight_format` says of matrices of 8-bit codes in groups of 32.
const INT8: &str = "int8_g32";

/// The `config.json` of a decoder whose weights are saved as `dtype`, its matrices as 8-bit codes
/// where `int8`.
///
/// # Errors
/// [`CheckpointError::Family`] if the decoder's family has no key for what its block is.
pub(super) fn to_json(
    config: &FusedKvDecoderConfig,
    dtype: WeightDtype,
    int8: bool,
    eos: &[u32],
) -> Result<Value, CheckpointError> {
    let mut json = families::write(config)?;
    json["eos_token_id"] = eos_json(eos);
    json["torch_dtype"] = json!(dtype.torch_name());
    if int8 {
        mark_int8(&mut json);
    }
    Ok(json)
}

/// Says of a `config.json` that its matrices are 8-bit codes.
pub(super) fn mark_int8(json: &mut Value) {
    json["weight_format"] = json!(INT8);
}

/// The `generation_config.json` of a model that ends with any of `eos`.
pub(super) fn generation_json(eos: &[u32]) -> Value {
    json!({ "eos_token_id": eos_json(eos) })
}

fn eos_json(eos: &[u32]) -> Value {
    match eos {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    }
}
