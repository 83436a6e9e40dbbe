//! `config.json` and `generation_config.json`: Qwen3's keys, and `kv_plan`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::error::CheckpointError;
use super::numbers::WeightDtype;
use super::{CONFIG, GENERATION_CONFIG};
use crate::config::FusedKvDecoderConfig;
use crate::plan::KvPlan;

/// More than any model reads: a larger number is a mistake.
const MAX_POSITIONS: usize = 1 << 24;

/// Qwen3's own defaults for keys that a file may leave out.
const DEFAULT_MAX_POSITIONS: usize = 32768;
const DEFAULT_ROPE_THETA: f64 = 1e4;
const DEFAULT_RMS_NORM_EPS: f64 = 1e-6;
const DEFAULT_INIT_STD: f64 = 0.02;

/// What `config.json` and `generation_config.json` say.
#[derive(Clone, Debug)]
pub(super) struct ModelConfig {
    pub path: PathBuf,
    /// Its plan is not resolved yet.
    pub decoder: FusedKvDecoderConfig,
    pub eos: Vec<u32>,
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
    let config = Keys::read(path.clone())?;
    let decoder = config.decoder()?;
    let generation = directory.join(GENERATION_CONFIG);
    let mut eos = None;
    if generation.is_file() {
        eos = Keys::read(generation)?.token_ids("eos_token_id")?;
    }
    if eos.is_none() {
        eos = config.token_ids("eos_token_id")?;
    }
    Ok(ModelConfig {
        path,
        decoder,
        eos: eos.unwrap_or_default(),
    })
}

/// Reads a file that holds a JSON object.
pub(super) fn read_object(path: &Path) -> Result<Map<String, Value>, CheckpointError> {
    let bytes = fs::read(path).map_err(|source| CheckpointError::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&bytes).map_err(|error| CheckpointError::Json {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

/// A value as JSON, cut short.
pub(super) fn shown(value: &Value) -> String {
    let mut text = value.to_string();
    if let Some((end, _)) = text.char_indices().nth(60) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// The keys of an object in a file.
struct Keys {
    path: PathBuf,
    /// What the object's keys are called in errors, as in "rope_parameters.".
    prefix: String,
    map: Map<String, Value>,
}

impl Keys {
    fn read(path: PathBuf) -> Result<Self, CheckpointError> {
        Ok(Self {
            map: read_object(&path)?,
            path,
            prefix: String::new(),
        })
    }

    /// A value that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: impl Into<String>) -> CheckpointError {
        CheckpointError::Setting {
            path: self.path.clone(),
            key: format!("{}{key}", self.prefix),
            found: self.get(key).map_or("missing".to_owned(), shown),
            expected: expected.into(),
        }
    }

    fn optional<T>(
        &self,
        key: &str,
        convert: impl Fn(&Value) -> Option<T>,
        expected: &str,
    ) -> Result<Option<T>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match convert(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.wrong(key, expected)),
            },
        }
    }

    fn count(&self, key: &str) -> Result<usize, CheckpointError> {
        self.optional_count(key)?
            .ok_or_else(|| self.wrong(key, "a whole number"))
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        let convert = |value: &Value| usize::try_from(value.as_u64()?).ok();
        self.optional(key, convert, "a whole number")
    }

    fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.optional(key, Value::as_f64, "a number")
    }

    fn flag(&self, key: &str) -> Result<bool, CheckpointError> {
        let flag = self.optional(key, Value::as_bool, "true or false")?;
        Ok(flag.unwrap_or(false))
    }

    fn object(&self, key: &str) -> Result<Option<Self>, CheckpointError> {
        let map = self.optional(key, |value| value.as_object().cloned(), "an object")?;
        Ok(map.map(|map| Self {
            path: self.path.clone(),
            prefix: format!("{}{key}.", self.prefix),
            map,
        }))
    }

    /// Refuses a value that is there and not `allowed`.
    fn only(&self, key: &str, allowed: &Value) -> Result<(), CheckpointError> {
        match self.get(key) {
            Some(value) if value != allowed => Err(self.wrong(key, allowed.to_string())),
            _ => Ok(()),
        }
    }

    fn absent(&self, key: &str) -> Result<(), CheckpointError> {
        match self.get(key) {
            Some(_) => Err(self.wrong(key, "none")),
            None => Ok(()),
        }
    }

    /// A token id or several.
    fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>, CheckpointError> {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let ids = |value: &Value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => Some(vec![id(one)?]),
        };
        self.optional(key, ids, "a token id or a list of them")
    }

    fn decoder(&self) -> Result<FusedKvDecoderConfig, CheckpointError> {
        let plan = self.plan()?;
        self.check_supported()?;
        let n_heads = self.count("num_attention_heads")?;
        let max_positions = self.optional_count("max_position_embeddings")?;
        let max_positions = max_positions.unwrap_or(DEFAULT_MAX_POSITIONS);
        if max_positions > MAX_POSITIONS {
            return Err(self.wrong(
                "max_position_embeddings",
                format!("at most {MAX_POSITIONS}"),
            ));
        }
        Ok(FusedKvDecoderConfig::new(self.count("vocab_size")?, plan)
            .with_hidden_size(self.count("hidden_size")?)
            .with_n_layers(self.count("num_hidden_layers")?)
            .with_n_heads(n_heads)
            .with_n_kv_heads(
                self.optional_count("num_key_value_heads")?
                    .unwrap_or(n_heads),
            )
            .with_head_dim(self.count("head_dim")?)
            .with_ffn_size(self.count("intermediate_size")?)
            .with_rope_theta(self.rope_theta()?)
            .with_rms_norm_eps(self.number("rms_norm_eps")?.unwrap_or(DEFAULT_RMS_NORM_EPS))
            .with_tie_embeddings(self.flag("tie_word_embeddings")?)
            .with_max_positions(max_positions)
            .with_init_std(
                self.number("initializer_range")?
                    .unwrap_or(DEFAULT_INIT_STD),
            ))
    }

    fn plan(&self) -> Result<KvPlan, CheckpointError> {
        let plan = self.get("kv_plan").map(|value| {
            serde_json::from_value::<KvPlan>(value.clone())
                .map_err(|error| self.wrong("kv_plan", format!("a plan ({error})")))
        });
        let plan = plan.transpose()?;
        match (self.get("model_type").and_then(Value::as_str), plan) {
            (Some("qwen3"), None | Some(KvPlan::Standard)) => Ok(KvPlan::Standard),
            (Some("qwen3"), Some(_)) => {
                Err(self.wrong("kv_plan", "none, for the model_type \"qwen3\""))
            }
            (Some("fusedkv"), Some(plan)) => Ok(plan),
            (Some("fusedkv"), None) => {
                Err(self.wrong("kv_plan", "a plan, for the model_type \"fusedkv\""))
            }
            _ => Err(self.wrong("model_type", "\"qwen3\" or \"fusedkv\"")),
        }
    }

    /// Refuses what Qwen3's configuration can say and this decoder does not do.
    fn check_supported(&self) -> Result<(), CheckpointError> {
        self.only("hidden_act", &json!("silu"))?;
        self.only("attention_bias", &json!(false))?;
        self.only("mlp_bias", &json!(false))?;
        self.absent("quantization_config")?;
        let full = |layers: &Value| {
            let layers = layers.as_array()?;
            layers
                .iter()
                .all(|layer| layer == "full_attention")
                .then_some(())
        };
        let layer_types =
            self.optional("layer_types", full, "\"full_attention\" for every layer")?;
        // Without a list of types, layers from max_window_layers on slide.
        let slides = self.flag("use_sliding_window")? && self.get("sliding_window").is_some();
        if slides && layer_types.is_none() {
            let from = self.optional_count("max_window_layers")?.unwrap_or(28);
            if from < self.count("num_hidden_layers")? {
                return Err(self.wrong("use_sliding_window", "false"));
            }
        }
        Ok(())
    }

    /// Older files have the base beside the scaling, newer ones in one object.
    fn rope_theta(&self) -> Result<f64, CheckpointError> {
        let mut theta = self.number("rope_theta")?;
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(rope) = self.object(key)? else {
                continue;
            };
            for kind in ["rope_type", "type"] {
                rope.only(kind, &json!("default"))?;
            }
            if rope
                .number("partial_rotary_factor")?
                .is_some_and(|factor| factor != 1.0)
            {
                return Err(rope.wrong("partial_rotary_factor", "1"));
            }
            if let Some(found) = rope.number("rope_theta")? {
                if theta.is_some_and(|theta| theta != found) {
                    return Err(self.wrong("rope_theta", format!("{found}, as in `{key}`")));
                }
                theta = Some(found);
            }
        }
        Ok(theta.unwrap_or(DEFAULT_ROPE_THETA))
    }
}

/// The `config.json` of a decoder whose weights are saved as `dtype`.
pub(super) fn to_json(config: &FusedKvDecoderConfig, dtype: WeightDtype, eos: &[u32]) -> Value {
    let standard = config.plan == KvPlan::Standard;
    let mut json = json!({
        "architectures": [if standard { "Qwen3ForCausalLM" } else { "FusedKvForCausalLM" }],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "eos_token_id": eos_json(eos),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_positions,
        "model_type": if standard { "qwen3" } else { "fusedkv" },
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": { "rope_theta": config.rope_theta, "rope_type": "default" },
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype.torch_name(),
        "use_cache": true,
        "use_sliding_window": false,
        "vocab_size": config.vocab_size,
    });
    if !standard {
        json["kv_plan"] = json!(config.plan);
    }
    json
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
