//! What can be wrong with a chat to learn from.

use thiserror::Error;

use crate::text::ChatError;
use crate::tokenizer::TokenizerError;

/// A line of a file of chats that is none to learn from.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChatDataError {
    /// Not an object as expected.
    #[error(
        "{0}, expected a JSON object {{\"messages\": [{{\"role\": \"user\", \"content\": …}}, …]}}"
    )]
    Json(String),
    /// What the template cannot write, or has no answer: without messages, of a role it does not know.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// More than a window.
    #[error(
        "the chat has {tokens} tokens, expected at most {}: the context, {context}, and one more",
        context + 1
    )]
    TooLong {
        /// Tokens up to the end of its last answer.
        tokens: usize,
        /// Tokens per window.
        context: usize,
    },
    /// The tokenizer refuses the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}
