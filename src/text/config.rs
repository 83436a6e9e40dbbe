//! How texts are written, and where they end.

use burn::config::Config;

use crate::generate::GenerationConfig;

/// How texts are written, and where they end.
#[derive(Config, Debug, PartialEq)]
pub struct TextConfig {
    /// How tokens are drawn.
    pub generation: GenerationConfig,
    /// The text ends before the first of these. One that is a special token's name is a stop token.
    #[config(default = "Vec::new()")]
    pub stop_strings: Vec<String>,
}
