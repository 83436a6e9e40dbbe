//! Chats that cannot be rendered.

use thiserror::Error;

/// A chat that cannot be made a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The model has no chat template.
    #[error(
        "the model has no chat template, expected chat_template.jinja or `chat_template` in \
         tokenizer_config.json"
    )]
    NoTemplate,
    /// Of several templates none has the name asked for.
    #[error("no chat template is called `{name}`, expected one of {}", known.join(", "))]
    UnknownTemplate {
        /// The name asked for; `default` where none was.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// The template is not Jinja.
    #[error("the chat template has an error at line {line}: {message}")]
    Syntax {
        /// Where, counted from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// The template cannot be rendered with these messages.
    #[error("the chat template failed at line {line}: {message}")]
    Render {
        /// Where, counted from 1.
        line: usize,
        /// Why.
        message: String,
    },
    /// The template refuses these messages, by `raise_exception`.
    #[error("the chat template refuses the messages: {0}")]
    Refused(String),
    /// Nothing to say.
    #[error("a chat without messages, expected at least 1")]
    NoMessages,
    /// What should be a message is none.
    #[error("message {index} {reason}")]
    Message {
        /// The message.
        index: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No message of the role `assistant`.
    #[error("a chat without an answer, expected a message of the role `assistant`")]
    NoAnswer,
    /// An answer to nothing.
    #[error("message 0 is an answer, expected a message before it")]
    Opening,
    /// What the template writes of an answer is not behind what it writes to ask for one.
    #[error(
        "the chat template writes message {index} otherwise than behind the beginning of an answer, \
         expected it behind"
    )]
    Beginning {
        /// The answer.
        index: usize,
    },
    /// The template leaves a message out: it does not know the role.
    #[error("message {index} has the role `{role}`, which the chat template does not know")]
    UnknownRole {
        /// The message.
        index: usize,
        /// Its role.
        role: String,
    },
}
