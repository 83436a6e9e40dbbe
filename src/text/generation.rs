//! Texts as they are written.

use std::iter::FusedIterator;

use burn::tensor::backend::Backend;

use super::error::TextError;
use super::stop::{StopScan, StopStrings};
use crate::cache::FusedKvCache;
use crate::generate::{FinishReason, GeneratedToken, Generation};
use crate::tokenizer::TextStream;

/// A token and the text that is certain with it.
#[derive(Clone, Debug, PartialEq)]
pub struct TextPiece {
    /// What was drawn; its `finish` is why the tokens end, which a stop string does before.
    pub token: GeneratedToken,
    /// The text that is certain now, possibly none, of this token and those before it: whole
    /// characters that no stop string can have a part of. Special tokens are no text.
    pub text: String,
    /// Set on the last piece of a row.
    pub finish: Option<TextFinish>,
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TextFinish {
    /// A stop token was drawn.
    StopToken(u32),
    /// This stop string was written. It is not part of the text.
    StopString(String),
    /// `max_new_tokens` were drawn.
    Length,
}

/// A whole text.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The text, without the prompt.
    pub text: String,
    /// Its tokens, those of a stop string or a stop token included.
    pub tokens: Vec<GeneratedToken>,
    /// Why it ended.
    pub finish: TextFinish,
}

/// Texts being written: an iterator over their pieces, one for each token.
#[derive(Debug)]
pub struct TextGeneration<'g, B: Backend> {
    generation: Generation<'g, B>,
    rows: Vec<(TextStream<'g>, StopScan)>,
    stops: StopStrings,
}

impl<'g, B: Backend> TextGeneration<'g, B> {
    pub(super) fn new(
        generation: Generation<'g, B>,
        rows: Vec<(TextStream<'g>, StopScan)>,
        stops: StopStrings,
    ) -> Self {
        Self {
            generation,
            rows,
            stops,
        }
    }

    /// The cache, e.g. for its size.
    pub fn cache(&self) -> &FusedKvCache<B> {
        self.generation.cache()
    }

    pub(super) fn into_cache(self) -> FusedKvCache<B> {
        self.generation.into_cache()
    }

    /// Ends a row before its time; the others go on. Text that was held back is not given.
    pub fn end(&mut self, row: usize) {
        self.generation.end(row);
    }

    /// Writes all texts to their ends, row by row.
    ///
    /// # Errors
    /// The first of the iterator's.
    pub fn completions(self) -> Result<Vec<Completion>, TextError> {
        let empty = Completion {
            text: String::new(),
            tokens: Vec::new(),
            finish: TextFinish::Length,
        };
        let mut all = vec![empty; self.rows.len()];
        for piece in self {
            let piece = piece?;
            all[piece.token.row].take(piece);
        }
        Ok(all)
    }

    fn piece(&mut self, token: GeneratedToken) -> Result<TextPiece, TextError> {
        let (stream, scan) = &mut self.rows[token.row];
        let new = match token.finish {
            Some(FinishReason::Stop) => String::new(),
            _ => stream.push(token.id)?,
        };
        let mut scanned = scan.push(&new);
        if token.finish.is_some() && scanned.stop.is_none() {
            let rest = stream.clone().finish()?;
            let last = scan.push(&rest);
            scanned.text.push_str(&last.text);
            scanned.stop = last.stop;
            if last.stop.is_none() {
                scanned.text.push_str(&scan.clone().finish());
            }
        }
        let finish = match (scanned.stop, token.finish) {
            (Some(stop), _) => {
                self.generation.end(token.row);
                Some(TextFinish::StopString(self.stops.strings()[stop].clone()))
            }
            (None, Some(FinishReason::Stop)) => Some(TextFinish::StopToken(token.id)),
            (None, Some(FinishReason::Length)) => Some(TextFinish::Length),
            (None, None) => None,
        };
        Ok(TextPiece {
            token,
            text: scanned.text,
            finish,
        })
    }
}

impl<B: Backend> Iterator for TextGeneration<'_, B> {
    type Item = Result<TextPiece, TextError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.generation.next()? {
            Ok(token) => Some(self.piece(token)),
            Err(error) => Some(Err(error.into())),
        }
    }
}

impl<B: Backend> FusedIterator for TextGeneration<'_, B> {}

impl Completion {
    pub(super) fn take(&mut self, piece: TextPiece) {
        self.text.push_str(&piece.text);
        self.tokens.push(piece.token);
        if let Some(finish) = piece.finish {
            self.finish = finish;
        }
    }
}
