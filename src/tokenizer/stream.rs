//! Text as its tokens arrive.

use std::mem;
use std::str;
use std::sync::LazyLock;

use tokenizers::DecoderWrapper;

use super::{Tokenizer, TokenizerError};

/// The bytes of a character are at most this many, and so are the tokens it is spread over.
const MOST_BYTES: usize = 4;
/// More tokens without any text than what comes after them can depend on.
const MOST_SILENT: usize = 8;

/// Text as its tokens arrive. A character whose bytes are spread over several tokens comes out
/// with the last of them; bytes that are part of none come out as `U+FFFD`.
///
/// The pieces together are the text that [`Tokenizer::decode`] gives, with one exception: of tokens
/// that stand for bytes (`<0xE2>`, beside SentencePiece's) it replaces the whole run where a part is
/// no UTF-8, when characters before that part have long been read.
///
/// ```
/// use fusedkv::tokenizer::Tokenizer;
///
/// let tokenizer = Tokenizer::train_bpe("", 257)?; // a token per byte
/// let mut stream = tokenizer.stream();
/// let pieces: Result<Vec<_>, _> = tokenizer
///     .encode("aé")?
///     .into_iter()
///     .map(|token| stream.push(token))
///     .collect();
/// assert_eq!(pieces?, ["a", "", "é"]);
/// # Ok::<(), fusedkv::tokenizer::TokenizerError>(())
/// ```
#[derive(Clone, Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    spelling: Spelling,
    without_special: bool,
    /// Bytes that are the beginning of a character so far.
    bytes: Vec<u8>,
    /// The tokens of the last piece and those after it: decoders may look back, e.g. for a space.
    tokens: Vec<u32>,
    /// How many of them have been given out.
    said: usize,
}

/// How a tokenizer spells text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// Every token is bytes, by themselves (byte-level BPE).
    Bytes,
    /// Tokens are text, which the tokenizer joins; some may stand for a byte.
    Text { bytes: bool },
}

impl Spelling {
    fn of(decoder: Option<&DecoderWrapper>) -> Self {
        match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => Self::Bytes,
            Some(DecoderWrapper::Sequence(sequence)) => match sequence.get_decoders() {
                [one] => Self::of(Some(one)),
                several => Self::Text {
                    bytes: several.iter().any(is_byte_fallback),
                },
            },
            other => Self::Text {
                bytes: other.is_some_and(is_byte_fallback),
            },
        }
    }
}

fn is_byte_fallback(decoder: &DecoderWrapper) -> bool {
    matches!(decoder, DecoderWrapper::ByteFallback(_))
}

impl<'t> TextStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> Self {
        Self {
            tokenizer,
            spelling: Spelling::of(tokenizer.inner.get_decoder()),
            without_special: false,
            bytes: Vec::new(),
            tokens: Vec::new(),
            said: 0,
        }
    }

    /// Leaves special tokens out instead of spelling them.
    #[must_use]
    pub fn without_special(self) -> Self {
        Self {
            without_special: true,
            ..self
        }
    }

    /// Goes on behind a text of these tokens, on the last of which the space before the first piece
    /// may depend.
    #[must_use]
    pub fn after(mut self, tokens: &[u32]) -> Self {
        let special = |token: &&u32| self.tokenizer.is_special(**token);
        let last = tokens.iter().rev().find(|token| !special(token));
        self.tokens = last.copied().into_iter().collect();
        self.said = self.tokens.len();
        self
    }

    /// The text that `token` completes, possibly none.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        if self.without_special && self.tokenizer.is_special(token) {
            return Ok(String::new());
        }
        match self.spelling {
            Spelling::Bytes => {
                let spelled = self.tokenizer.inner.id_to_token(token);
                self.bytes.extend(bytes(&spelled.unwrap_or_default()));
                Ok(self.characters())
            }
            Spelling::Text { bytes } => {
                let spelled = bytes.then(|| self.tokenizer.inner.id_to_token(token));
                let byte = spelled.flatten().as_deref().and_then(byte);
                let is_first = self.tokens.is_empty() && self.bytes.is_empty();
                match byte {
                    // A space that begins a text may be none, which the tokenizer knows.
                    Some(b' ') if is_first => self.push_text(token),
                    Some(byte) => self.push_byte(token, byte),
                    None => self.push_text(token),
                }
            }
        }
    }

    /// What is left when no more tokens come: incomplete characters, as `U+FFFD`.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String, TokenizerError> {
        let held = self.held()?;
        let mut text = self.characters();
        text.push_str(&String::from_utf8_lossy(&self.bytes));
        text.push_str(&held);
        Ok(text)
    }

    fn push_byte(&mut self, token: u32, byte: u8) -> Result<String, TokenizerError> {
        let mut text = self.held()?;
        self.bytes.push(byte);
        text.push_str(&self.characters());
        self.tokens = vec![token];
        self.said = 1;
        Ok(text)
    }

    fn push_text(&mut self, token: u32) -> Result<String, TokenizerError> {
        self.tokens.push(token);
        let piece = self.held()?;
        let held = self.tokens.len() - self.said;
        // A replacement character at the end is most likely one whose bytes are still to come.
        let incomplete = piece.ends_with(char::REPLACEMENT_CHARACTER) && held < MOST_BYTES;
        if incomplete || (piece.is_empty() && held < MOST_SILENT) {
            return Ok(String::new());
        }
        self.tokens.drain(..self.said);
        self.said = self.tokens.len();
        self.bytes.extend(piece.bytes());
        Ok(self.characters())
    }

    /// The text of the tokens that have not been given out.
    fn held(&self) -> Result<String, TokenizerError> {
        let (said, held) = self.tokens.split_at(self.said);
        if held.is_empty() {
            return Ok(String::new());
        }
        let before = self.tokenizer.decode(said)?;
        let text = self.tokenizer.decode(&self.tokens)?;
        match text.strip_prefix(&before) {
            Some(piece) => Ok(piece.to_owned()),
            // What has been said reads differently now; it cannot be taken back.
            None => self.tokenizer.decode(held),
        }
    }

    /// Takes the bytes that are characters, or cannot become any.
    fn characters(&mut self) -> String {
        let bytes = mem::take(&mut self.bytes);
        let mut rest = &bytes[..];
        let mut text = String::new();
        while let Err(error) = str::from_utf8(rest) {
            let (valid, after) = rest.split_at(error.valid_up_to());
            text.push_str(&String::from_utf8_lossy(valid));
            let Some(len) = error.error_len() else {
                self.bytes = after.to_vec();
                return text;
            };
            text.push(char::REPLACEMENT_CHARACTER);
            rest = &after[len..];
        }
        text.push_str(&String::from_utf8_lossy(rest));
        text
    }
}

/// The byte that a token such as `<0xE2>` stands for.
fn byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The bytes of a byte-level token; one that has other characters is spelled as it is.
fn bytes(token: &str) -> Vec<u8> {
    let known: Option<Vec<u8>> = token
        .chars()
        .map(|c| BYTES.get(c as usize).copied().flatten())
        .collect();
    known.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// GPT-2's spelling of bytes by character: visible Latin-1 characters are themselves, the other
/// bytes, in order, the characters from 256.
static BYTES: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut bytes: Vec<_> = (0..=u8::MAX).map(|b| visible(b).then_some(b)).collect();
    bytes.extend((0..=u8::MAX).filter(|&b| !visible(b)).map(Some));
    bytes
});
