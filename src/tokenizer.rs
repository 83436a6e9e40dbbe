//! Byte-level BPE: text to tokens and back, without loss.

mod stream;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use thiserror::Error;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use crate::file;
pub use stream::TextStream;

/// The special token that ends a text.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// A byte-level vocabulary has a token per byte, and the end of text.
const MIN_VOCAB: usize = 256 + 1;

/// A tokenizer in the format of Hugging Face's `tokenizer.json`.
///
/// One made by [`train_bpe`](Self::train_bpe) gives back any text it is given, byte by byte. One
/// that is [loaded](Self::load) does what it was made for.
///
/// ```
/// use fusedkv::tokenizer::Tokenizer;
///
/// let tokenizer = Tokenizer::train_bpe("to be or not to be", 260)?;
/// let tokens = tokenizer.encode("to be 🙂")?;
/// assert_eq!(tokenizer.decode(&tokens)?, "to be 🙂");
/// # Ok::<(), fusedkv::tokenizer::TokenizerError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: HfTokenizer,
}

impl Tokenizer {
    /// Learns a byte-level BPE of up to `vocab_size` tokens from `text`, [`END_OF_TEXT`] among
    /// them; fewer if the text has no more pairs to merge.
    ///
    /// # Errors
    /// [`TokenizerError::VocabTooSmall`] below 257 tokens.
    pub fn train_bpe(text: &str, vocab_size: usize) -> Result<Self, TokenizerError> {
        Self::train_bpe_on(std::iter::once(text), vocab_size)
    }

    /// [`train_bpe`](Self::train_bpe) of a text in pieces.
    pub(crate) fn train_bpe_on<S: AsRef<str> + Send>(
        text: impl Iterator<Item = S> + Send,
        vocab_size: usize,
    ) -> Result<Self, TokenizerError> {
        if vocab_size < MIN_VOCAB {
            return Err(TokenizerError::VocabTooSmall {
                found: vocab_size,
                min: MIN_VOCAB,
            });
        }
        let mut inner = HfTokenizer::new(BPE::default());
        // No space is added in front: what comes out must be what went in.
        let byte_level = ByteLevel::new(false, true, true);
        inner.with_pre_tokenizer(Some(byte_level));
        inner.with_decoder(Some(byte_level));
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .show_progress(false)
            .build();
        inner
            .train(&mut TrainerWrapper::BpeTrainer(trainer), text)
            .map_err(failed)?;
        Ok(Self { inner })
    }

    /// Reads a `tokenizer.json`. Truncation and padding that it asks for are left to whoever makes
    /// batches.
    ///
    /// # Errors
    /// [`TokenizerError::Unreadable`] if it is missing or no tokenizer.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let inner = HfTokenizer::from_file(path).map_err(|error| TokenizerError::Unreadable {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        Self::of(inner)
    }

    /// That of the text of a `tokenizer.json`.
    pub(crate) fn from_json(json: &str) -> Result<Self, TokenizerError> {
        Self::of(json.parse().map_err(failed)?)
    }

    fn of(mut inner: HfTokenizer) -> Result<Self, TokenizerError> {
        inner.with_padding(None);
        inner.with_truncation(None).map_err(failed)?;
        Ok(Self { inner })
    }

    /// Writes a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Write`] if that fails.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), TokenizerError> {
        let path = path.as_ref();
        let json = self.inner.to_string(true).map_err(failed)?;
        file::write(path, json).map_err(|source| TokenizerError::Write {
            path: path.to_owned(),
            source,
        })
    }

    /// Number of tokens, special ones included; ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.size(true)
    }

    /// Number of tokens that texts are made of, without those added to the vocabulary; ids are below it.
    pub(crate) fn base_vocab_size(&self) -> usize {
        self.size(false)
    }

    fn size(&self, with_added: bool) -> usize {
        let ids = self.inner.get_vocab(with_added).into_values();
        ids.max().map_or(0, |largest| largest as usize + 1)
    }

    /// The id of [`END_OF_TEXT`], if the vocabulary has it.
    pub fn end_of_text(&self) -> Option<u32> {
        self.inner.token_to_id(END_OF_TEXT)
    }

    /// The tokens of a text. [`END_OF_TEXT`] in it becomes the special token; no other is added.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] if a loaded tokenizer cannot take the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, false).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a text, as [`encode`](Self::encode), each with the bytes that it is of.
    ///
    /// ```
    /// use fusedkv::tokenizer::Tokenizer;
    ///
    /// let tokenizer = Tokenizer::train_bpe("to be or not to be", 258)?;
    /// let tokens = tokenizer.encode_with_places("be or")?;
    /// let ids: Vec<u32> = tokens.iter().map(|(token, _)| *token).collect();
    /// assert_eq!(ids, tokenizer.encode("be or")?);
    /// assert_eq!((tokens[0].1.start, tokens[tokens.len() - 1].1.end), (0, 5));
    /// # Ok::<(), fusedkv::tokenizer::TokenizerError>(())
    /// ```
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_places(
        &self,
        text: &str,
    ) -> Result<Vec<(u32, Range<usize>)>, TokenizerError> {
        let encoding = self.inner.encode(text, false).map_err(failed)?;
        let places = encoding.get_offsets().iter();
        let places = places.map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(places).collect())
    }

    /// The tokens of a text that begins a prompt: with the special ones the tokenizer adds, such as
    /// the beginning of a text.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, true).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The one token with which the tokenizer has a prompt begin, if it has: the beginning of a text.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn bos(&self) -> Result<Option<u32>, TokenizerError> {
        let [with, without] = [self.encode_prompt("a")?, self.encode("a")?];
        // Some put an end behind it as well, or instead; some put more in front.
        Ok(match &with[..] {
            [bos, rest @ ..] if rest.starts_with(&without) && !with.starts_with(&without) => {
                Some(*bos)
            }
            _ => None,
        })
    }

    /// The id of a token by its spelling in the vocabulary, if it is one.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether a token is special: part of no text, as the end of one.
    pub fn is_special(&self, token: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        let token = added.get_added_tokens_decoder().get(&token);
        token.is_some_and(|token| token.special)
    }

    /// The text of tokens, special ones spelled out. Bytes that are no UTF-8 become `U+FFFD`.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] if a loaded tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(tokens, false).map_err(failed)
    }

    /// Decodes one token at a time, e.g. while they are generated.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }
}

fn failed(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Failed(error.to_string())
}

/// A tokenizer that cannot be trained, read, written or used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// Every byte and the end-of-text token need an entry.
    #[error(
        "a vocabulary of {found} tokens, expected at least {min}: every byte and a special token"
    )]
    VocabTooSmall {
        /// Tokens asked for.
        found: usize,
        /// The fewest possible.
        min: usize,
    },
    /// The file is missing or is no tokenizer.
    #[error("cannot read the tokenizer {}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file cannot be written.
    #[error("cannot write the tokenizer {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The tokenizer refused, as one loaded from a file can; one trained here does not.
    #[error("the tokenizer failed: {0}")]
    Failed(String),
}
