//! What a model's directory says of chats and of how its texts are drawn.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::config::TextConfig;
use super::template::{ChatTemplate, DEFAULT};
use crate::checkpoint::CheckpointError;
use crate::generate::GenerationConfig;

const GENERATION_CONFIG: &str = "generation_config.json";
/// The second is where older programs wrote special tokens.
const TOKENIZER_CONFIGS: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const OTHER_TEMPLATES: &str = "additional_chat_templates";

/// What transformers draws among where a file says nothing.
const DEFAULT_TOP_K: u64 = 50;

/// Settings of how tokens are drawn that this crate has not, with the value that asks for nothing.
const UNKNOWN: [(&str, f64); 13] = [
    ("min_p", 0.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("num_beams", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("penalty_alpha", 0.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("guidance_scale", 1.0),
    ("length_penalty", 1.0),
    ("encoder_repetition_penalty", 1.0),
    ("top_h", 0.0),
];
/// The same for lists and objects, none of which asks for nothing.
const UNKNOWN_LISTS: [&str; 5] = [
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "forced_eos_token_id",
];

impl ChatTemplate {
    /// The templates of a model's directory, and the special tokens they may write:
    /// `chat_template.jinja` and those of `additional_chat_templates`, or else `chat_template` of
    /// `tokenizer_config.json`, one or several by name. None if there is none.
    ///
    /// # Errors
    /// [`CheckpointError`] if a file cannot be read or is not what it should be.
    pub fn from_directory(directory: impl AsRef<Path>) -> Result<Option<Self>, CheckpointError> {
        let directory = directory.as_ref();
        let mut sources = files(directory)?;
        let mut tokens = BTreeMap::new();
        for name in TOKENIZER_CONFIGS {
            let path = directory.join(name);
            if !path.is_file() {
                continue;
            }
            let config = read_object(&path)?;
            if sources.is_empty() {
                sources = named(&path, &config)?;
            }
            for (name, token) in &config {
                let text = token.get("content").unwrap_or(token).as_str();
                if let (true, Some(text)) = (name.ends_with("_token"), text) {
                    tokens.entry(name.clone()).or_insert(text.to_owned());
                }
            }
        }
        if sources.is_empty() {
            return Ok(None);
        }
        let template = Self::named(sources);
        let with =
            |template: Self, (name, token): (String, String)| template.with_token(&name, &token);
        Ok(Some(tokens.into_iter().fold(template, with)))
    }
}

/// Templates in files of their own.
fn files(directory: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let mut sources = BTreeMap::new();
    let path = directory.join(CHAT_TEMPLATE);
    if path.is_file() {
        sources.insert(DEFAULT.to_owned(), read(&path)?);
    }
    let others = directory.join(OTHER_TEMPLATES);
    if others.is_dir() {
        let failed = |source| CheckpointError::Read {
            path: others.clone(),
            source,
        };
        for entry in fs::read_dir(&others).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if let (Some("jinja"), Some(name)) = (
                path.extension().and_then(|extension| extension.to_str()),
                path.file_stem().and_then(|stem| stem.to_str()),
            ) {
                sources.insert(name.to_owned(), read(&path)?);
            }
        }
    }
    Ok(sources)
}

/// `chat_template`: a template, or several objects of `name` and `template`.
fn named(
    path: &Path,
    config: &Map<String, Value>,
) -> Result<BTreeMap<String, String>, CheckpointError> {
    let Some(value) = config.get("chat_template").filter(|value| !value.is_null()) else {
        return Ok(BTreeMap::new());
    };
    let one = |value: &Value| {
        let [name, template] = ["name", "template"].map(|key| value.get(key)?.as_str());
        Some((name?.to_owned(), template?.to_owned()))
    };
    let sources = match value {
        Value::String(source) => Some([(DEFAULT.to_owned(), source.clone())].into()),
        Value::Array(several) => several.iter().map(one).collect(),
        _ => None,
    };
    let expected = "a template, or a list of objects of `name` and `template`";
    sources.ok_or_else(|| wrong(path, "chat_template", value, expected))
}

/// What `generation_config.json` says, with transformers' defaults for what it leaves out: nothing
/// is drawn unless `do_sample` is true; and the keys that ask for what this crate does not do.
pub(super) fn defaults(
    directory: &Path,
    eos: &[u32],
) -> Result<(TextConfig, Vec<String>), CheckpointError> {
    let path = directory.join(GENERATION_CONFIG);
    let config = match path.is_file() {
        true => read_object(&path)?,
        false => Map::new(),
    };
    let get = |key: &str| config.get(key).filter(|value| !value.is_null());
    let number = |key: &str| -> Result<Option<f64>, CheckpointError> {
        let value = get(key);
        let number = value.map(|value| value.as_f64().ok_or(value)).transpose();
        number.map_err(|value| wrong(&path, key, value, "a number"))
    };
    let count = |key: &str| -> Result<Option<u64>, CheckpointError> {
        let value = get(key);
        let count = value.map(|value| value.as_u64().ok_or(value)).transpose();
        count.map_err(|value| wrong(&path, key, value, "a whole number"))
    };
    let mut generation = GenerationConfig::new().with_stop_tokens(eos.to_vec());
    if let Some(tokens) = count("max_new_tokens")? {
        generation.max_new_tokens = tokens as usize;
    }
    if let Some(penalty) = number("repetition_penalty")? {
        generation.repetition_penalty = penalty;
    }
    let sampled = match get("do_sample") {
        None => false,
        Some(value) => value
            .as_bool()
            .ok_or_else(|| wrong(&path, "do_sample", value, "true or false"))?,
    };
    let temperature = number("temperature")?.unwrap_or(1.0);
    let top_k = count("top_k")?.unwrap_or(DEFAULT_TOP_K);
    let top_p = number("top_p")?;
    if sampled {
        generation.temperature = temperature;
        generation.top_k = (top_k > 0).then_some(top_k as usize);
        generation.top_p = top_p.filter(|&p| p < 1.0);
    }
    let stops = match get("stop_strings") {
        None => Some(Vec::new()),
        Some(Value::String(stop)) => Some(vec![stop.clone()]),
        Some(Value::Array(stops)) => stops
            .iter()
            .map(|stop| Some(stop.as_str()?.to_owned()))
            .collect(),
        Some(_) => None,
    };
    let stops = stops.ok_or_else(|| {
        let value = get("stop_strings").unwrap_or(&Value::Null);
        wrong(&path, "stop_strings", value, "a text or a list of texts")
    })?;
    let asked = |(key, nothing): &(&'static str, f64)| {
        get(key)
            .and_then(Value::as_f64)
            .is_some_and(|value| value != *nothing)
    };
    let numbers = UNKNOWN
        .iter()
        .filter(|known| asked(known))
        .map(|(key, _)| *key);
    let lists = UNKNOWN_LISTS
        .iter()
        .copied()
        .filter(|key| get(key).is_some());
    let ignored = numbers.chain(lists).map(str::to_owned).collect();
    let config = TextConfig::new(generation).with_stop_strings(stops);
    Ok((config, ignored))
}

fn read(path: &Path) -> Result<String, CheckpointError> {
    fs::read_to_string(path).map_err(|source| CheckpointError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_object(path: &Path) -> Result<Map<String, Value>, CheckpointError> {
    serde_json::from_str(&read(path)?).map_err(|error| CheckpointError::Json {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn wrong(path: &Path, key: &str, found: &Value, expected: &str) -> CheckpointError {
    CheckpointError::Setting {
        path: path.to_owned(),
        key: key.to_owned(),
        found: found.to_string(),
        expected: expected.to_owned(),
    }
}
