//! How tokens are drawn, and when to stop.

use burn::config::Config;

use super::GenerateError;
use crate::cache::CacheDtype;

/// How tokens are drawn, and when to stop.
#[derive(Config, Debug, PartialEq)]
pub struct GenerationConfig {
    /// Stop after this many tokens per row.
    #[config(default = 64)]
    pub max_new_tokens: usize,
    /// Divides the logits; 0 takes the most likely token.
    #[config(default = 0.0)]
    pub temperature: f64,
    /// Draw among this many most likely tokens.
    pub top_k: Option<usize>,
    /// Draw among the most likely tokens that together reach this probability (arXiv 1904.09751).
    pub top_p: Option<f64>,
    /// Divides positive and multiplies negative logits of tokens that are in the row already,
    /// prompt included (arXiv 1909.05858); 1 is none.
    #[config(default = 1.0)]
    pub repetition_penalty: f64,
    /// A row ends with the first of these, which is returned too.
    #[config(default = "Vec::new()")]
    pub stop_tokens: Vec<u32>,
    /// Continuations of each prompt, which is read once for all of them: prompt i is continued by
    /// the rows from `i * samples`.
    #[config(default = 1)]
    pub samples: usize,
    /// Tell how likely each token was, and this many of the likeliest in its place.
    pub log_probabilities: Option<usize>,
    /// What numbers the cache keeps.
    #[config(default = "CacheDtype::Model")]
    pub cache_dtype: CacheDtype,
    /// The same seed, settings and model draw the same tokens.
    #[config(default = 0)]
    pub seed: u64,
}

impl GenerationConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`GenerateError::Setting`] naming the first that is out of range.
    pub fn validate(&self) -> Result<(), GenerateError> {
        let top_k = self.top_k.unwrap_or(1) as f64;
        let top_p = self.top_p.unwrap_or(1.0);
        let (temperature, penalty) = (self.temperature, self.repetition_penalty);
        for (field, value, fits, expected) in [
            (
                "max_new_tokens",
                self.max_new_tokens as f64,
                self.max_new_tokens > 0,
                "1 or more",
            ),
            (
                "temperature",
                temperature,
                temperature >= 0.0 && temperature.is_finite(),
                "0 or more",
            ),
            ("top_k", top_k, top_k >= 1.0, "1 or more"),
            (
                "top_p",
                top_p,
                top_p > 0.0 && top_p <= 1.0,
                "above 0 and at most 1",
            ),
            (
                "repetition_penalty",
                penalty,
                penalty > 0.0 && penalty.is_finite(),
                "above 0",
            ),
            (
                "samples",
                self.samples as f64,
                self.samples > 0,
                "1 or more",
            ),
        ] {
            if !fits {
                return Err(GenerateError::Setting {
                    field,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }
}
