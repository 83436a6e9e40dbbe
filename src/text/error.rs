//! What can be wrong between text and text.

use std::path::PathBuf;

use thiserror::Error;

use super::chat_error::ChatError;
use crate::cache::CacheError;
use crate::checkpoint::CheckpointError;
use crate::generate::GenerateError;
use crate::tokenizer::TokenizerError;

/// A text that cannot be continued.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TextError {
    /// The directory has a model, but nothing that makes tokens of text.
    #[error("{} has no tokenizer.json", directory.display())]
    NoTokenizer {
        /// The directory.
        directory: PathBuf,
    },
    /// The directory cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer refuses the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat cannot be made a prompt.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A prompt of no tokens.
    #[error("prompt {row} has no tokens, expected at least 1")]
    EmptyPrompt {
        /// The prompt.
        row: usize,
    },
    /// A prompt that leaves no room for what is to be written.
    #[error(
        "prompt {row} has {tokens} tokens, expected at most {}: the model has {max_positions} \
         positions, and {max_new_tokens} are to be written",
        max_positions.saturating_sub(*max_new_tokens)
    )]
    PromptTooLong {
        /// The prompt.
        row: usize,
        /// Its tokens.
        tokens: usize,
        /// Tokens to be written.
        max_new_tokens: usize,
        /// Positions of the model.
        max_positions: usize,
    },
    /// A conversation that has become longer than its cache.
    #[error(
        "the conversation has {tokens} tokens and {max_new_tokens} are to be written, expected at \
         most the {capacity} of its cache"
    )]
    ConversationTooLong {
        /// Tokens of the conversation.
        tokens: usize,
        /// Tokens to be written.
        max_new_tokens: usize,
        /// Tokens that the cache holds.
        capacity: usize,
    },
    /// An empty string ends every text before it begins.
    #[error("stop string {index} is empty, expected at least 1 character")]
    EmptyStopString {
        /// Which of them.
        index: usize,
    },
    /// The decoder cannot go on.
    #[error(transparent)]
    Generate(#[from] GenerateError),
}

impl From<CacheError> for TextError {
    fn from(error: CacheError) -> Self {
        Self::Generate(error.into())
    }
}
