//! Generation: prefill once, then draw and decode token by token through the cache.

mod error;
mod sampling;

use std::collections::{HashSet, VecDeque};
use std::iter::FusedIterator;

use burn::config::Config;
use burn::tensor::backend::Backend;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

use crate::cache::{CacheDtype, FusedKvCache};
use crate::decoder::{ForwardError, FusedKvDecoder, Logits};
use crate::numbers::numbers;
use crate::tokens::TokenBatch;
pub use error::GenerateError;
use sampling::Sampler;

/// How tokens are drawn, and when to stop.
#[derive(Config, Debug, PartialEq)]
pub struct GenerationConfig {
    /// Stop after this many tokens per row.
    #[config(default = 64)]
    pub max_new_tokens: usize,
    /// Divides the logits; 0 takes the most likely token.
    #[config(default = 0.0)]
    pub temperature: f64,
    /// Draw among this many most likely tokens.
    pub top_k: Option<usize>,
    /// Draw among the most likely tokens that together reach this probability (arXiv 1904.09751).
    pub top_p: Option<f64>,
    /// Divides positive and multiplies negative logits of tokens that are in the row already,
    /// prompt included (arXiv 1909.05858); 1 is none.
    #[config(default = 1.0)]
    pub repetition_penalty: f64,
    /// A row ends with the first of these, which is returned too.
    #[config(default = "Vec::new()")]
    pub stop_tokens: Vec<u32>,
    /// What numbers the cache keeps.
    #[config(default = "CacheDtype::Model")]
    pub cache_dtype: CacheDtype,
    /// The same seed, settings and model draw the same tokens.
    #[config(default = 0)]
    pub seed: u64,
}

/// One token of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneratedToken {
    /// The prompt it continues.
    pub row: usize,
    /// The token.
    pub id: u32,
    /// Set on the last token of a row.
    pub finish: Option<FinishReason>,
}

/// Why a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// A stop token was drawn.
    Stop,
    /// `max_new_tokens` were drawn.
    Length,
}

/// Continues each prompt, streaming tokens as they are drawn: step by step, within a step row by
/// row. Rows do not influence each other: each draws from a random stream of its own (row i from
/// stream i of the seed), and leaves the batch when finished.
///
/// A row's logits are those it has alone but for rounding, within 1e-5 of the largest on Flex: sums
/// over more rows, or beside padding, are formed in another order. On Flex, batches of up to 16 prompts
/// of one length, longer than 16 tokens, change no bit of a row's logits, and neither does the number
/// of threads.
///
/// The cache is sized for the longest prompt and `max_new_tokens`; it is half a standard
/// decoder's for plans that store half the layers. Work happens as the iterator is advanced,
/// prefill included.
///
/// # Errors
/// [`GenerateError`] if a setting is out of range, a prompt is empty or has a token the model does
/// not know, prompt and new tokens exceed `max_positions`, or the backend has no numbers of the
/// cache's type: all before anything is computed.
///
/// The iterator yields [`GenerateError::NotANumber`] in the turn of a row whose largest logit is not
/// finite. That row ends there, the others go on. Any other error ends the iterator.
pub fn generate<'m, B: Backend>(
    model: &'m FusedKvDecoder<B>,
    prompts: &[impl AsRef<[u32]>],
    config: &GenerationConfig,
) -> Result<Generation<'m, B>, GenerateError> {
    config.validate()?;
    let device = model.embed_tokens.weight.val().device();
    let shape = model.config();
    let batch = TokenBatch::from_rows(prompts, shape.vocab_size, &device)?;
    let [rows, longest] = batch.dims();
    for (row, prompt) in prompts.iter().enumerate() {
        // No sum is beyond the largest number, which no decoder has positions for.
        let positions = prompt.as_ref().len().saturating_add(config.max_new_tokens);
        if positions > shape.max_positions {
            return Err(GenerateError::Forward(ForwardError::TooManyPositions {
                row,
                positions,
                max_positions: shape.max_positions,
            }));
        }
    }
    let capacity = longest + config.max_new_tokens;
    let cache = model.new_cache_of(config.cache_dtype, rows, capacity)?;
    Ok(Generation {
        model,
        cache,
        config: config.clone(),
        rows: prompts
            .iter()
            .enumerate()
            .map(|(row, prompt)| Row {
                index: row,
                seen: prompt.as_ref().iter().copied().collect(),
                generated: 0,
                rng: stream(config.seed, row),
            })
            .collect(),
        sampler: Sampler::default(),
        next: Some(batch),
        ready: VecDeque::new(),
    })
}

/// A running generation: an iterator over tokens.
#[derive(Debug)]
pub struct Generation<'m, B: Backend> {
    model: &'m FusedKvDecoder<B>,
    cache: FusedKvCache<B>,
    config: GenerationConfig,
    /// The rows still going, in the order of the cache's rows.
    rows: Vec<Row>,
    sampler: Sampler,
    /// What the model reads next; none when all is drawn.
    next: Option<TokenBatch<B>>,
    ready: VecDeque<Result<GeneratedToken, GenerateError>>,
}

#[derive(Debug)]
struct Row {
    index: usize,
    /// The tokens it has so far, prompt included.
    seen: HashSet<u32>,
    generated: usize,
    rng: ChaCha8Rng,
}

impl<B: Backend> Iterator for Generation<'_, B> {
    type Item = Result<GeneratedToken, GenerateError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ready.is_empty() {
            let tokens = self.next.take()?;
            if let Err(error) = self.step(tokens) {
                self.ready.push_back(Err(error));
            }
        }
        self.ready.pop_front()
    }
}

/// Without a step to take there is none to come.
impl<B: Backend> FusedIterator for Generation<'_, B> {}

impl<B: Backend> Generation<'_, B> {
    /// The cache, e.g. for its size.
    pub fn cache(&self) -> &FusedKvCache<B> {
        &self.cache
    }

    /// Reads `tokens`, draws the next one of every row, and drops the rows that are done.
    fn step(&mut self, tokens: TokenBatch<B>) -> Result<(), GenerateError> {
        let device = tokens.device();
        let vocab_size = self.model.config().vocab_size;
        let logits = self
            .model
            .forward_cached(tokens, &mut self.cache, Logits::Last)?;
        let mut logits = numbers(logits);
        let mut going = Vec::new();
        let mut last = Vec::new();
        for (i, (row, logits)) in self
            .rows
            .iter_mut()
            .zip(logits.chunks_mut(vocab_size))
            .enumerate()
        {
            let token = row.draw(logits, &mut self.sampler, &self.config);
            if let Ok(GeneratedToken {
                id, finish: None, ..
            }) = token
            {
                going.push(i);
                last.push([id]);
            }
            self.ready.push_back(token);
        }
        if going.is_empty() {
            return Ok(());
        }
        if going.len() < self.rows.len() {
            self.cache.select_rows(&going)?;
            let mut kept = going.iter().copied().peekable();
            let mut row = 0;
            self.rows.retain(|_| {
                row += 1;
                kept.next_if_eq(&(row - 1)).is_some()
            });
        }
        self.next = Some(TokenBatch::from_rows(&last, vocab_size, &device)?);
        Ok(())
    }
}

impl Row {
    fn draw(
        &mut self,
        logits: &mut [f32],
        sampler: &mut Sampler,
        config: &GenerationConfig,
    ) -> Result<GeneratedToken, GenerateError> {
        let Some(id) = sampler.sample(logits, &self.seen, config, &mut self.rng) else {
            return Err(GenerateError::NotANumber {
                row: self.index,
                generated: self.generated,
            });
        };
        self.seen.insert(id);
        self.generated += 1;
        let finish = if config.stop_tokens.contains(&id) {
            Some(FinishReason::Stop)
        } else if self.generated == config.max_new_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        Ok(GeneratedToken {
            row: self.index,
            id,
            finish,
        })
    }
}

impl GenerationConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`GenerateError::Setting`] naming the first that is out of range.
    pub fn validate(&self) -> Result<(), GenerateError> {
        let top_k = self.top_k.unwrap_or(1) as f64;
        let top_p = self.top_p.unwrap_or(1.0);
        let (temperature, penalty) = (self.temperature, self.repetition_penalty);
        for (field, value, fits, expected) in [
            (
                "max_new_tokens",
                self.max_new_tokens as f64,
                self.max_new_tokens > 0,
                "1 or more",
            ),
            (
                "temperature",
                temperature,
                temperature >= 0.0 && temperature.is_finite(),
                "0 or more",
            ),
            ("top_k", top_k, top_k >= 1.0, "1 or more"),
            (
                "top_p",
                top_p,
                top_p > 0.0 && top_p <= 1.0,
                "above 0 and at most 1",
            ),
            (
                "repetition_penalty",
                penalty,
                penalty > 0.0 && penalty.is_finite(),
                "above 0",
            ),
        ] {
            if !fits {
                return Err(GenerateError::Setting {
                    field,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// Each row has a random stream of its own, so that equal prompts are continued differently.
fn stream(seed: u64, row: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(row as u64);
    rng
}
