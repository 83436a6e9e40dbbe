//! From text to text.

mod chat_error;
mod message;
mod python;
mod template;

pub use chat_error::ChatError;
pub use message::ChatMessage;
pub use template::{ChatOptions, ChatTemplate};
