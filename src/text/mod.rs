//! From text to text: prompts or chats in, pieces of text out as they are certain.
//!
//! A [`TextGenerator`] is a decoder with its tokenizer, its own chat template and the defaults of its
//! `generation_config.json`. [`TextGenerator::generate`] continues a batch of [`Prompt`]s;
//! [`Conversation`] keeps the cache from one answer to the next. Pieces are whole characters, and
//! end before the first of any [`StopStrings`], wherever tokens divide either.
//!
//! ```no_run
//! use fusedkv::CacheDtype;
//! use fusedkv::backend::{Flex, FlexDevice};
//! use fusedkv::checkpoint::WeightDtype;
//! use fusedkv::text::{ChatMessage, TextError, TextGenerator};
//!
//! let device = FlexDevice::default();
//! let generator = TextGenerator::<Flex>::load("path/to/model", WeightDtype::F32, &device)?;
//! let mut conversation = generator.conversation(2048, CacheDtype::Model)?;
//! let mut chat = vec![ChatMessage::user("How far is the moon?")];
//! let answer = conversation.write_with(&chat[..], generator.defaults(), |piece| {
//!     print!("{}", piece.text);
//!     Ok::<(), TextError>(())
//! })?;
//! chat.push(ChatMessage::assistant(&answer.text));
//! # Ok::<(), TextError>(())
//! ```

mod answers;
mod chat_error;
mod config;
mod conversation;
mod directory;
mod environment;
mod error;
mod generation;
mod generator;
mod message;
mod prompt;
mod python;
mod stop;
mod template;

pub use answers::ChatAnswer;
pub use chat_error::ChatError;
pub use config::TextConfig;
pub use conversation::Conversation;
pub use error::TextError;
pub use generation::{Completion, TextFinish, TextGeneration, TextPiece};
pub use generator::TextGenerator;
pub use message::ChatMessage;
pub use prompt::Prompt;
pub use stop::{Scanned, StopScan, StopStrings};
pub use template::{ChatOptions, ChatTemplate};
