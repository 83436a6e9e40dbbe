//! Scoring: how well a decoder predicts a text, with or without the cache.

use burn::config::Config;
use burn::tensor::{Tensor, backend::Backend};
use thiserror::Error;

use crate::cache::{CacheDtype, CacheError, FusedKvCache};
use crate::decoder::{ForwardError, FusedKvDecoder, Logits};
use crate::numbers::numbers;
use crate::tokens::{TokenBatch, TokensError};

/// A text that cannot be scored.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// A setting outside its range.
    #[error("{field} is {value}, expected {} to {largest}", usize::from(*field != "bos"))]
    Setting {
        /// The setting's name.
        field: &'static str,
        /// What it was.
        value: usize,
        /// The most it may be.
        largest: usize,
    },
    /// The first token has nothing to be predicted from, unless there is a [`bos`](ScoreConfig::bos).
    #[error("{0} tokens to score, expected at least 2, or 1 behind a beginning of text")]
    TooFewTokens(usize),
    /// The decoder cannot read the text.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

impl From<CacheError> for ScoreError {
    fn from(error: CacheError) -> Self {
        Self::Forward(error.into())
    }
}

impl From<TokensError> for ScoreError {
    fn from(error: TokensError) -> Self {
        Self::Forward(error.into())
    }
}

/// How a text longer than the decoder's positions is read.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub struct ScoreConfig {
    /// Tokens of the text per window.
    pub context: usize,
    /// Tokens from one window's start to the next; `context` if none, so that no token is read
    /// twice. Smaller ones predict with more context and take longer.
    pub stride: Option<usize>,
    /// A token that every window is read behind, beside its own: the beginning of a text, for models that
    /// were trained to find one (`Tokenizer::bos`). The text's first token is then predicted as well. It
    /// takes one of the decoder's positions.
    pub bos: Option<u32>,
    /// Read through the cache, this many tokens at a time.
    pub chunk: Option<usize>,
    /// What numbers that cache keeps.
    #[config(default = "CacheDtype::Model")]
    pub cache_dtype: CacheDtype,
}

/// How well a text was predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Negative log-likelihood of all tokens together, in nats.
    pub nll: f64,
    /// Tokens predicted: all but the first, or all behind a [`bos`](ScoreConfig::bos).
    pub tokens: usize,
}

impl Score {
    /// Mean negative log-likelihood per token, in nats.
    pub fn mean(&self) -> f64 {
        self.nll / self.tokens as f64
    }

    /// Perplexity per token, e to the [`mean`](Self::mean).
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }

    /// Perplexity per word of a text of `words` words, which does not depend on the tokenizer.
    pub fn perplexity_per_word(&self, words: usize) -> f64 {
        (self.nll / words as f64).exp()
    }
}

/// Scores a text: every token but the first is predicted once, from at most `context` tokens before
/// it; behind a [`bos`](ScoreConfig::bos) the first one as well. Each window begins `stride` after the
/// one before; what both read is context only in the second.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::{FusedKvDecoderConfig, KvPlan, ScoreConfig, score};
///
/// let config = FusedKvDecoderConfig::tiny(64, KvPlan::FusedKv { storage_layers: 3 });
/// let model = config.init::<Flex>(&FlexDevice::default())?;
/// let text = [1, 2, 3, 4, 5, 6, 7];
/// let whole = score(&model, &text, &ScoreConfig::new(4))?;
/// let cached = score(&model, &text, &ScoreConfig::new(4).with_chunk(Some(2)))?;
/// assert_eq!(whole.tokens, 6);
/// assert!((whole.nll - cached.nll).abs() < 1e-4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ScoreError`] for fewer than two tokens, or none behind a `bos`, tokens the decoder does not know, or
/// settings out of range.
pub fn score<B: Backend>(
    model: &FusedKvDecoder<B>,
    tokens: &[u32],
    config: &ScoreConfig,
) -> Result<Score, ScoreError> {
    score_with(model, tokens, config, |_| Ok(()))
}

/// [`score`], calling `logits` with those after each token of the text: some rows of `vocab_size` at a
/// time, in order, in the end as many as tokens.
///
/// # Errors
/// As [`score`], and the first error of `logits`.
pub fn score_with<B: Backend, E: From<ScoreError>>(
    model: &FusedKvDecoder<B>,
    tokens: &[u32],
    config: &ScoreConfig,
    mut logits: impl FnMut(&[f32]) -> Result<(), E>,
) -> Result<Score, E> {
    let stride = check(model, tokens, config)?;
    let vocab_size = model.config().vocab_size;
    let mut score = Score {
        nll: 0.0,
        tokens: 0,
    };
    // Row i is what follows the text's first i tokens.
    let mut take = |first: usize, rows: Vec<f32>| -> Result<(), E> {
        for (row, target) in rows.chunks(vocab_size).zip(&tokens[first..]) {
            score.nll += nll(row, *target as usize);
            score.tokens += 1;
        }
        let beginning = if first == 0 { vocab_size } else { 0 };
        match &rows[beginning..] {
            [] => Ok(()),
            rows => logits(rows),
        }
    };
    let lead = usize::from(config.bos.is_some());
    let (mut start, mut done) = (0, 0);
    while done < tokens.len() {
        let end = tokens.len().min(start + config.context);
        let window = config.bos.iter().chain(&tokens[start..end]);
        let window: Vec<u32> = window.copied().collect();
        // What the window before has predicted; the first one's beginning predicts the first token.
        let old = if done == 0 { 0 } else { done - start + lead };
        let row = |place: usize| start + place + 1 - lead;
        match config.chunk {
            None => {
                let all = model
                    .forward(batch(model, &window)?)
                    .map_err(ScoreError::from)?;
                take(row(old), rows_from(all, old))?;
            }
            Some(chunk) => {
                let cache = model
                    .new_cache_of(config.cache_dtype, 1, window.len())
                    .map_err(ScoreError::from)?;
                cached(model, cache, &window, chunk, old, |place, rows| {
                    take(row(place), rows)
                })?;
            }
        }
        done = end;
        start += stride;
    }
    Ok(score)
}

fn check<B: Backend>(
    model: &FusedKvDecoder<B>,
    tokens: &[u32],
    config: &ScoreConfig,
) -> Result<usize, ScoreError> {
    let max_positions = model.config().max_positions;
    let stride = config.stride.unwrap_or(config.context);
    let lead = usize::from(config.bos.is_some());
    for (field, value, largest) in [
        ("context", config.context, max_positions - lead),
        ("stride", stride, config.context),
        ("chunk", config.chunk.unwrap_or(1), usize::MAX),
    ] {
        if value == 0 || value > largest {
            return Err(ScoreError::Setting {
                field,
                value,
                largest,
            });
        }
    }
    if tokens.len() + lead < 2 {
        return Err(ScoreError::TooFewTokens(tokens.len()));
    }
    let vocab_size = model.config().vocab_size;
    if let Some(bos) = config.bos.filter(|&bos| bos as usize >= vocab_size) {
        return Err(ScoreError::Setting {
            field: "bos",
            value: bos as usize,
            largest: vocab_size - 1,
        });
    }
    if let Some(position) = tokens.iter().position(|&t| t as usize >= vocab_size) {
        return Err(ScoreError::from(TokensError::OutOfVocabulary {
            row: 0,
            position,
            token: tokens[position],
            vocab_size,
        }));
    }
    Ok(stride)
}

fn batch<B: Backend>(
    model: &FusedKvDecoder<B>,
    tokens: &[u32],
) -> Result<TokenBatch<B>, ScoreError> {
    let device = model.device();
    let vocab_size = model.config().vocab_size;
    Ok(TokenBatch::from_rows(&[tokens], vocab_size, &device)?)
}

/// Reads a window through an empty cache and gives `take` the logits after all its tokens but the first
/// `old`, with the place of the first.
fn cached<B: Backend, E: From<ScoreError>>(
    model: &FusedKvDecoder<B>,
    mut cache: FusedKvCache<B>,
    window: &[u32],
    chunk: usize,
    old: usize,
    mut take: impl FnMut(usize, Vec<f32>) -> Result<(), E>,
) -> Result<(), E> {
    for tokens in window.chunks(chunk) {
        let start = cache.len();
        let old = old.saturating_sub(start);
        let wanted = match old < tokens.len() {
            true => Logits::All,
            false => Logits::Last,
        };
        let logits = model.forward_cached(batch(model, tokens)?, &mut cache, wanted);
        let logits = logits.map_err(ScoreError::from)?;
        if wanted == Logits::All {
            take(start + old, rows_from(logits, old))?;
        }
    }
    Ok(())
}

/// The rows of `[1, seq, vocab_size]` from `first`.
fn rows_from<B: Backend>(logits: Tensor<B, 3>, first: usize) -> Vec<f32> {
    let [_, seq, _] = logits.dims();
    numbers(logits.narrow(1, first, seq - first))
}

/// −log softmax(logits)[target].
fn nll(logits: &[f32], target: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted = |logit: f32| f64::from(logit) - f64::from(largest);
    let sum: f64 = logits.iter().map(|&logit| shifted(logit).exp()).sum();
    sum.ln() - shifted(logits[target])
}
