//! The metadata of a model, key by key.

use super::error::GgufError;
use super::file::GgufFile;
use super::value::{GgufArray, GgufValue};

/// A file's keys, those of its architecture without their prefix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys<'f> {
    pub file: &'f GgufFile,
    architecture: &'f str,
}

impl<'f> Keys<'f> {
    pub fn of(file: &'f GgufFile, architecture: &'f str) -> Self {
        Self { file, architecture }
    }

    /// The whole of a key: ".block_count" is the architecture's.
    pub fn name(&self, key: &str) -> String {
        match key.starts_with('.') {
            true => format!("{}{key}", self.architecture),
            false => key.to_owned(),
        }
    }

    pub fn get(&self, key: &str) -> Option<&'f GgufValue> {
        self.file.metadata().get(&self.name(key))
    }

    pub fn wrong(&self, key: &str, expected: impl Into<String>) -> GgufError {
        GgufError::Metadata {
            path: self.file.path().to_owned(),
            key: self.name(key),
            found: self.get(key).map_or("missing".to_owned(), GgufValue::shown),
            expected: expected.into(),
        }
    }

    fn optional<T>(
        &self,
        key: &str,
        convert: impl Fn(&'f GgufValue) -> Option<T>,
        expected: &str,
    ) -> Result<Option<T>, GgufError> {
        let converted = |value| convert(value).ok_or_else(|| self.wrong(key, expected));
        self.get(key).map(converted).transpose()
    }

    /// A whole number, or a list of one per layer that are all the same.
    pub fn count(&self, key: &str) -> Result<Option<usize>, GgufError> {
        let whole = |value: &GgufValue| usize::try_from(value.as_unsigned()?).ok();
        let convert = |value: &GgufValue| match value {
            GgufValue::Array(GgufArray::Numbers(numbers)) => {
                let mut numbers = numbers.iter();
                let first = whole(&numbers.next()?)?;
                numbers
                    .all(|other| whole(&other) == Some(first))
                    .then_some(first)
            }
            value => whole(value),
        };
        self.optional(key, convert, "a whole number, the same for every layer")
    }

    pub fn needed_count(&self, key: &str) -> Result<usize, GgufError> {
        match self.count(key)? {
            Some(count) if count > 0 => Ok(count),
            _ => Err(self.wrong(key, "a whole number above 0")),
        }
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        let convert = |value: &GgufValue| value.as_number().filter(|number| number.is_finite());
        self.optional(key, convert, "a number")
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.optional(key, GgufValue::as_bool, "true or false")
    }

    pub fn text(&self, key: &str) -> Result<Option<&'f str>, GgufError> {
        self.optional(key, GgufValue::as_text, "a text")
    }

    pub fn texts(&self, key: &str) -> Result<Option<&'f [String]>, GgufError> {
        let convert = |value: &'f GgufValue| match value.as_array()? {
            GgufArray::Texts(texts) => Some(&texts[..]),
            // An empty array may be of any kind.
            array => array.is_empty().then_some(&[][..]),
        };
        self.optional(key, convert, "a list of texts")
    }

    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, GgufError> {
        let convert = |value: &GgufValue| match value.as_array()? {
            GgufArray::Numbers(numbers) => {
                let number = |value: GgufValue| match value {
                    GgufValue::Bool(flag) => Some(f64::from(u8::from(flag))),
                    value => value.as_number(),
                };
                numbers.iter().map(number).collect()
            }
            array => array.is_empty().then(Vec::new),
        };
        self.optional(key, convert, "a list of numbers")
    }

    /// The id of a token.
    pub fn token(&self, key: &str) -> Result<Option<u32>, GgufError> {
        let convert = |value: &GgufValue| u32::try_from(value.as_unsigned()?).ok();
        self.optional(key, convert, "the id of a token")
    }
}
