//! Windows of tokens to train on: what they are, and a text cut into them.

use std::borrow::Cow;
use std::iter;
use std::ops::Range;
use std::sync::Arc;

use burn_dataset::Dataset;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64_with_seed};

use super::error::TrainError;
use super::token_file::TokenFile;

/// `context` tokens to read and, for each, the token that follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenWindow {
    /// What the decoder reads.
    pub inputs: Vec<u32>,
    /// What it should predict, position by position.
    pub targets: Vec<u32>,
    /// The targets that count towards the loss, any number of them; none: all count.
    pub answers: Option<Vec<Answer>>,
}

impl TokenWindow {
    /// Whether each target counts, position by position.
    ///
    /// # Panics
    /// If there is an answer beyond the targets.
    pub fn counts(&self) -> Vec<bool> {
        let Some(answers) = &self.answers else {
            return vec![true; self.targets.len()];
        };
        let mut counts = vec![false; self.targets.len()];
        for answer in answers {
            counts[answer.position] = true;
        }
        counts
    }

    /// How many targets count.
    pub(super) fn counted(&self) -> usize {
        match self.answers {
            None => self.targets.len(),
            Some(_) => self.counts().into_iter().filter(|&counts| counts).count(),
        }
    }
}

/// A target that can be told from what was read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its position among the targets.
    pub position: usize,
    /// How many tokens before `position` what it must recall was read.
    pub distance: usize,
}

/// What [fingerprints](Windows::fingerprint) are made by.
pub(super) const HASH: &str = "xxh3";

/// Windows to train on or to validate with, all of one length.
pub trait Windows: Dataset<TokenWindow> {
    /// Tokens per window.
    fn context(&self) -> usize;

    /// Checks that every token is below the vocabulary's size.
    ///
    /// # Errors
    /// [`TrainError::OutOfVocabulary`] for one that is not.
    fn check_vocabulary(&self, vocab_size: usize) -> Result<(), TrainError>;

    /// A number that other data most likely do not have, and these have in every process: a run is resumed
    /// only with data of its number. That of [`TokenWindows`] depends on whether the tokens are in memory or
    /// in a file.
    fn fingerprint(&self) -> u64;

    /// Whether any window may have [`answers`](TokenWindow::answers): what the first one says,
    /// unless data whose windows differ in that say it themselves.
    ///
    /// Where some targets do not count, every part of a step that is read in several must know how
    /// many do in the others.
    fn has_answers(&self) -> bool {
        self.get(0).is_some_and(|window| window.answers.is_some())
    }
}

/// A window of a data set, if it is what the data set says.
///
/// # Errors
/// [`TrainError::MissingWindow`] or [`TrainError::Window`].
pub(super) fn read_window(
    windows: &dyn Windows,
    index: usize,
    has_answers: bool,
) -> Result<TokenWindow, TrainError> {
    let Some(window) = windows.get(index) else {
        let windows = windows.len();
        return Err(TrainError::MissingWindow { index, windows });
    };
    let context = windows.context();
    let wrong = |field, found, expected: &str| TrainError::Window {
        index,
        field,
        found,
        expected: expected.to_owned(),
    };
    for (field, found) in [
        ("inputs", window.inputs.len()),
        ("targets", window.targets.len()),
    ] {
        if found != context {
            return Err(wrong(field, found, &format!("the context, {context}")));
        }
    }
    let answers = window.answers.as_deref().unwrap_or_default();
    if window.answers.is_some() && !has_answers {
        let expected = "none, as its data set says that windows have none";
        return Err(wrong("answers", answers.len(), expected));
    }
    if let Some(answer) = answers.iter().find(|answer| answer.position >= context) {
        let expected = format!("below the context, {context}");
        return Err(wrong("answer position", answer.position, &expected));
    }
    Ok(window)
}

/// A text cut into windows of `context` tokens, one after the other. Every token but the first is
/// the target of one window; those that do not fill a last window are left out.
///
/// A clone shares the tokens.
#[derive(Clone, Debug)]
pub struct TokenWindows {
    tokens: Tokens,
    context: usize,
    windows: Range<usize>,
    bos: Option<u32>,
}

#[derive(Clone, Debug)]
enum Tokens {
    Memory(Arc<[u32]>),
    File(TokenFile),
}

impl TokenWindows {
    /// Cuts `tokens` into windows and holds out the last `valid_fraction` of them for validation,
    /// at least one and never all: `(train, valid)`. No token is the target of both.
    ///
    /// # Errors
    /// [`TrainError::Setting`] if `context` is 0 or the fraction is not between 0 and 1,
    /// [`TrainError::TooFewTokens`] if there are fewer than `2 · context + 1`.
    pub fn split(
        tokens: impl Into<Arc<[u32]>>,
        context: usize,
        valid_fraction: f64,
    ) -> Result<(Self, Self), TrainError> {
        let tokens = Tokens::Memory(tokens.into());
        let windows = count_windows(tokens.len(), context, 2)?;
        check_fraction(valid_fraction)?;
        let valid = ((windows as f64 * valid_fraction).round() as usize).clamp(1, windows - 1);
        let part = |windows| Self {
            tokens: tokens.clone(),
            context,
            windows,
            bos: None,
        };
        Ok((part(0..windows - valid), part(windows - valid..windows)))
    }

    /// Cuts all tokens of a file into windows.
    ///
    /// # Errors
    /// [`TrainError::Setting`] if `context` is 0, [`TrainError::TooFewTokens`] if there are fewer
    /// than `context + 1`.
    pub fn of_file(file: TokenFile, context: usize) -> Result<Self, TrainError> {
        let windows = 0..count_windows(file.len(), context, 1)?;
        Ok(Self {
            tokens: Tokens::File(file),
            context,
            windows,
            bos: None,
        })
    }

    /// Windows of the same targets whose first input is this token, the beginning of a text, in place of
    /// the one before the first target: for models that were trained to find one
    /// ([`Tokenizer::bos`](crate::tokenizer::Tokenizer::bos)).
    #[must_use]
    pub fn with_bos(self, bos: Option<u32>) -> Self {
        Self { bos, ..self }
    }

    /// Where the tokens of these windows are.
    fn range(&self) -> Range<usize> {
        self.windows.start * self.context..self.windows.end * self.context + 1
    }
}

/// How many windows there are in `tokens`, at least `needed`.
fn count_windows(tokens: usize, context: usize, needed: usize) -> Result<usize, TrainError> {
    if context == 0 {
        return Err(TrainError::Setting {
            field: "context",
            value: 0.0,
            expected: "1 or more",
        });
    }
    if tokens < needed * context + 1 {
        return Err(TrainError::TooFewTokens {
            found: tokens,
            windows: needed,
            context,
        });
    }
    Ok((tokens - 1) / context)
}

/// Checks that a share to hold out leaves some to train on.
pub(super) fn check_fraction(valid_fraction: f64) -> Result<(), TrainError> {
    if valid_fraction > 0.0 && valid_fraction < 1.0 {
        return Ok(());
    }
    Err(TrainError::Setting {
        field: "valid_fraction",
        value: valid_fraction,
        expected: "above 0 and below 1",
    })
}

impl Tokens {
    fn len(&self) -> usize {
        match self {
            Self::Memory(tokens) => tokens.len(),
            Self::File(file) => file.len(),
        }
    }

    fn read(&self, range: Range<usize>) -> Cow<'_, [u32]> {
        match self {
            Self::Memory(tokens) => Cow::Borrowed(&tokens[range]),
            Self::File(file) => Cow::Owned(file.read(range)),
        }
    }
}

impl Dataset<TokenWindow> for TokenWindows {
    fn get(&self, index: usize) -> Option<TokenWindow> {
        let window = self.windows.clone().nth(index)?;
        let start = window * self.context;
        let tokens = self.tokens.read(start..start + self.context + 1);
        let first = self.bos.unwrap_or(tokens[0]);
        let others = &tokens[1..self.context];
        Some(TokenWindow {
            inputs: iter::once(first).chain(others.iter().copied()).collect(),
            targets: tokens[1..].to_vec(),
            answers: None,
        })
    }

    fn len(&self) -> usize {
        self.windows.len()
    }
}

impl Windows for TokenWindows {
    fn context(&self) -> usize {
        self.context
    }

    fn check_vocabulary(&self, vocab_size: usize) -> Result<(), TrainError> {
        if let Some(bos) = self.bos.filter(|&bos| bos as usize >= vocab_size) {
            return Err(TrainError::Setting {
                field: "bos",
                value: bos.into(),
                expected: "a token of the vocabulary",
            });
        }
        match &self.tokens {
            Tokens::Memory(tokens) => check_vocabulary(&tokens[self.range()], vocab_size),
            Tokens::File(file) => file.check_vocabulary(vocab_size),
        }
    }

    fn fingerprint(&self) -> u64 {
        let of_tokens = match &self.tokens {
            Tokens::Memory(tokens) => {
                let mut hash = Xxh3Default::new();
                for token in &tokens[self.range()] {
                    hash.update(&token.to_le_bytes());
                }
                hash.digest()
            }
            Tokens::File(file) => file.fingerprint(),
        };
        match self.bos {
            None => of_tokens,
            Some(bos) => xxh3_64_with_seed(&bos.to_le_bytes(), of_tokens),
        }
    }
}

pub(super) fn check_vocabulary(tokens: &[u32], vocab_size: usize) -> Result<(), TrainError> {
    let unknown = |&token: &u32| token as usize >= vocab_size;
    match tokens.iter().position(unknown) {
        Some(position) => Err(TrainError::OutOfVocabulary {
            position,
            token: tokens[position],
            vocab_size,
        }),
        None => Ok(()),
    }
}
