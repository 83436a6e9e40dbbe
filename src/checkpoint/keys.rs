//! The keys of a JSON object in a file, with errors that name file, key and value.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::CheckpointError;

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
pub(super) struct Keys {
    pub path: PathBuf,
    /// What the object's keys are called in errors, as in "rope_parameters.".
    prefix: String,
    map: Map<String, Value>,
}

impl Keys {
    pub fn read(path: PathBuf) -> Result<Self, CheckpointError> {
        Ok(Self {
            map: read_object(&path)?,
            path,
            prefix: String::new(),
        })
    }

    /// Those of an object that is not read from a file, as if it were that of `path`.
    pub fn of(path: PathBuf, map: Map<String, Value>) -> Self {
        Self {
            path,
            prefix: String::new(),
            map,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The keys that say something.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let said = self.map.iter().filter(|(_, value)| !value.is_null());
        said.map(|(key, _)| key.as_str())
    }

    /// What the object itself is called.
    pub fn name(&self) -> &str {
        self.prefix.trim_end_matches('.')
    }

    /// Whether a key is there, but says nothing.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// A value that is there and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn wrong(&self, key: &str, expected: impl Into<String>) -> CheckpointError {
        CheckpointError::Setting {
            path: self.path.clone(),
            key: format!("{}{key}", self.prefix),
            found: self.get(key).map_or("missing".to_owned(), shown),
            expected: expected.into(),
        }
    }

    pub fn optional<T>(
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

    pub fn count(&self, key: &str) -> Result<usize, CheckpointError> {
        self.optional_count(key)?
            .ok_or_else(|| self.wrong(key, "a whole number"))
    }

    pub fn optional_count(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        let convert = |value: &Value| usize::try_from(value.as_u64()?).ok();
        self.optional(key, convert, "a whole number")
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.optional(key, Value::as_f64, "a number")
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.optional(key, Value::as_bool, "true or false")
    }

    pub fn text(&self, key: &str) -> Result<Option<String>, CheckpointError> {
        self.optional(key, |value| value.as_str().map(str::to_owned), "a string")
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, CheckpointError> {
        let numbers = |value: &Value| value.as_array()?.iter().map(Value::as_f64).collect();
        self.optional(key, numbers, "a list of numbers")
    }

    pub fn object(&self, key: &str) -> Result<Option<Self>, CheckpointError> {
        let map = self.optional(key, |value| value.as_object().cloned(), "an object")?;
        Ok(map.map(|map| Self {
            path: self.path.clone(),
            prefix: format!("{}{key}.", self.prefix),
            map,
        }))
    }

    /// Refuses a value that is there and not `allowed`.
    pub fn only(&self, key: &str, allowed: &Value) -> Result<(), CheckpointError> {
        match self.get(key) {
            Some(value) if value != allowed => Err(self.wrong(key, allowed.to_string())),
            _ => Ok(()),
        }
    }

    pub fn absent(&self, key: &str) -> Result<(), CheckpointError> {
        match self.get(key) {
            Some(_) => Err(self.wrong(key, "none")),
            None => Ok(()),
        }
    }

    /// A token id or several.
    pub fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>, CheckpointError> {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let ids = |value: &Value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => Some(vec![id(one)?]),
        };
        self.optional(key, ids, "a token id or a list of them")
    }
}
