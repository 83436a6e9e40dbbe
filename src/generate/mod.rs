//! Generation: prefill once, then draw and decode token by token through the cache.

mod config;
mod error;
mod sampling;
mod token;

use std::collections::{HashSet, VecDeque};
use std::iter::FusedIterator;

use burn::tensor::backend::Backend;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

use crate::cache::{CacheError, FusedKvCache};
use crate::decoder::{ForwardError, FusedKvDecoder, Logits};
use crate::numbers::numbers;
use crate::tokens::{TokenBatch, TokensError};
pub use config::GenerationConfig;
pub use error::GenerateError;
use sampling::Sampler;
pub use token::{FinishReason, GeneratedToken, Likelihood};

/// Continues each prompt, streaming tokens as they are drawn: step by step, within a step row by
/// row. Rows do not influence each other: each draws from a random stream of its own (row i from
/// stream i of the seed), and leaves the batch when finished.
///
/// A row's logits are those it has alone but for rounding, within 1e-5 of the largest on Flex: sums
/// over more rows, or beside padding, are formed in another order. On Flex, batches of up to 16 prompts
/// of one length, longer than 16 tokens and of up to 1024 together, change no bit of a row's logits, and
/// neither does the number of threads. RoPE that is scaled by length
/// ([`RopeScaling`](crate::config::RopeScaling)) goes by the longest row.
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
    let cached = vec![0; prompts.len()];
    let batch = unread(model, prompts, &cached, config)?;
    let [rows, longest] = batch.dims();
    let capacity = longest + config.max_new_tokens;
    let cache = model.new_cache_of(config.cache_dtype, rows, capacity)?;
    Ok(Generation::new(model, prompts, batch, cache, config))
}

/// [`generate`] with a cache that holds the beginning of every prompt already, row by row as many
/// tokens as [`FusedKvCache::row_lens`] says: only the rest is read. That those are the prompts'
/// tokens is the caller's to see to. The cache is [given back](Generation::into_cache) in the end.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::generate::generate_from;
/// use fusedkv::{FusedKvDecoderConfig, GenerationConfig, KvPlan, Logits, TokenBatch};
///
/// let device = FlexDevice::default();
/// let config = FusedKvDecoderConfig::tiny(64, KvPlan::FusedKv { storage_layers: 3 });
/// let model = config.init::<Flex>(&device)?;
/// let mut cache = model.new_cache(1, 16)?;
/// let start = TokenBatch::from_rows(&[[1, 2, 3]], 64, &device)?;
/// model.forward_cached(start, &mut cache, Logits::Last)?;
///
/// let settings = GenerationConfig::new().with_max_new_tokens(4);
/// let mut tokens = generate_from(&model, cache, &[[1, 2, 3, 4]], &settings)?;
/// assert_eq!(tokens.by_ref().count(), 4);
/// assert_eq!(tokens.into_cache().len(), 7); // the last token was drawn, not read
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`generate`]; [`GenerateError::NothingToRead`] if a prompt is no longer than what is cached,
/// and [`CacheError::BatchMismatch`] or [`CacheError::OverCapacity`] if the cache has another number
/// of rows or no room for the prompts' rest and the new tokens.
pub fn generate_from<'m, B: Backend>(
    model: &'m FusedKvDecoder<B>,
    cache: FusedKvCache<B>,
    prompts: &[impl AsRef<[u32]>],
    config: &GenerationConfig,
) -> Result<Generation<'m, B>, GenerateError> {
    let (found, expected) = (prompts.len(), cache.batch());
    if found != expected {
        return Err(CacheError::BatchMismatch { found, expected }.into());
    }
    let batch = unread(model, prompts, &cache.row_lens(), config)?;
    let [_, longest] = batch.dims();
    // The last token that is drawn is not read.
    let requested = longest + config.max_new_tokens - 1;
    if requested > cache.remaining() {
        return Err(GenerateError::from(CacheError::OverCapacity {
            requested,
            len: cache.len(),
            capacity: cache.capacity(),
        }));
    }
    Ok(Generation::new(model, prompts, batch, cache, config))
}

/// What is not `cached` of checked prompts.
fn unread<B: Backend>(
    model: &FusedKvDecoder<B>,
    prompts: &[impl AsRef<[u32]>],
    cached: &[usize],
    config: &GenerationConfig,
) -> Result<TokenBatch<B>, GenerateError> {
    config.validate()?;
    let shape = model.config();
    let mut rest = Vec::with_capacity(prompts.len());
    for (row, (prompt, &cached)) in prompts.iter().zip(cached).enumerate() {
        let prompt = prompt.as_ref();
        let unknown = |&token: &u32| token as usize >= shape.vocab_size;
        if let Some(position) = prompt.iter().position(unknown) {
            return Err(GenerateError::from(TokensError::OutOfVocabulary {
                row,
                position,
                token: prompt[position],
                vocab_size: shape.vocab_size,
            }));
        }
        if cached > 0 && prompt.len() <= cached {
            return Err(GenerateError::NothingToRead {
                row,
                tokens: prompt.len(),
                cached,
            });
        }
        rest.push(&prompt[cached..]);
    }
    let device = model.device();
    let batch = TokenBatch::from_rows(&rest, shape.vocab_size, &device)?;
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
    Ok(batch)
}

/// A running generation: an iterator over tokens.
#[derive(Debug)]
pub struct Generation<'m, B: Backend> {
    model: &'m FusedKvDecoder<B>,
    cache: FusedKvCache<B>,
    config: GenerationConfig,
    /// The rows still going, in the order of the cache's rows; before the prompts are read, each
    /// prompt's samples one after the other.
    rows: Vec<Row>,
    sampler: Sampler,
    /// What of the prompts is to be read.
    prompts: Option<TokenBatch<B>>,
    ready: VecDeque<Result<GeneratedToken, GenerateError>>,
}

#[derive(Debug)]
struct Row {
    index: usize,
    /// The tokens it has so far, prompt included.
    seen: HashSet<u32>,
    /// What it reads next.
    last: u32,
    generated: usize,
    going: bool,
    rng: ChaCha8Rng,
}

impl<B: Backend> Iterator for Generation<'_, B> {
    type Item = Result<GeneratedToken, GenerateError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ready.is_empty()
            && let Err(error) = self.step()
        {
            self.rows.clear();
            self.ready.push_back(Err(error));
        }
        self.ready.pop_front()
    }
}

/// Without a row that goes on there is no token to come.
impl<B: Backend> FusedIterator for Generation<'_, B> {}

impl<'m, B: Backend> Generation<'m, B> {
    fn new(
        model: &'m FusedKvDecoder<B>,
        prompts: &[impl AsRef<[u32]>],
        unread: TokenBatch<B>,
        cache: FusedKvCache<B>,
        config: &GenerationConfig,
    ) -> Self {
        let samples = prompts
            .iter()
            .flat_map(|prompt| std::iter::repeat_n(prompt.as_ref(), config.samples));
        let row = |(index, prompt): (usize, &[u32])| Row {
            index,
            seen: prompt.iter().copied().collect(),
            last: 0,
            generated: 0,
            going: true,
            rng: stream(config.seed, index),
        };
        Self {
            model,
            cache,
            config: config.clone(),
            rows: samples.enumerate().map(row).collect(),
            sampler: Sampler::default(),
            prompts: Some(unread),
            ready: VecDeque::new(),
        }
    }

    /// The cache, e.g. for its size.
    pub fn cache(&self) -> &FusedKvCache<B> {
        &self.cache
    }

    /// The cache, to [go on from](generate_from). It has the rows that were going in the last step,
    /// each with the tokens that were read: all but the last.
    pub fn into_cache(self) -> FusedKvCache<B> {
        self.cache
    }

    /// Ends a row before its time; the others go on. There are no more tokens of it.
    pub fn end(&mut self, row: usize) {
        for ended in self.rows.iter_mut().filter(|r| r.index == row) {
            ended.going = false;
        }
        self.ready.retain(|token| match token {
            Ok(token) => token.row != row,
            Err(GenerateError::NotANumber { row: failed, .. }) => *failed != row,
            Err(_) => true,
        });
    }

    /// Reads the prompts, or every row's last token, and draws the next one of every row.
    fn step(&mut self) -> Result<(), GenerateError> {
        let (tokens, samples) = match self.prompts.take() {
            Some(prompts) => (prompts, self.config.samples),
            None => {
                self.keep_going(1)?;
                let last: Vec<_> = self.rows.iter().map(|row| [row.last]).collect();
                if last.is_empty() {
                    return Ok(());
                }
                let device = self.model.device();
                let vocab_size = self.model.config().vocab_size;
                (TokenBatch::from_rows(&last, vocab_size, &device)?, 1)
            }
        };
        let logits = self
            .model
            .forward_cached(tokens, &mut self.cache, Logits::Last)?;
        let mut logits = numbers(logits);
        let vocab_size = self.model.config().vocab_size;
        for (rows, logits) in self
            .rows
            .chunks_mut(samples)
            .zip(logits.chunks_mut(vocab_size))
        {
            let Some((last, others)) = rows.split_last_mut() else {
                continue;
            };
            // Drawing leaves its penalty in the logits.
            for row in others.iter_mut().filter(|row| row.going) {
                let token = row.draw(&mut logits.to_vec(), &mut self.sampler, &self.config);
                self.ready.push_back(token);
            }
            if last.going {
                let token = last.draw(logits, &mut self.sampler, &self.config);
                self.ready.push_back(token);
            }
        }
        self.keep_going(samples)
    }

    /// Drops the rows that are done, from the cache too if any goes on; there, `samples` rows are one
    /// so far.
    fn keep_going(&mut self, samples: usize) -> Result<(), GenerateError> {
        let rows = self.rows.iter().enumerate();
        let going = rows.filter(|(_, row)| row.going);
        let going: Vec<usize> = going.map(|(i, _)| i / samples).collect();
        if !going.is_empty() && (samples > 1 || going.len() < self.rows.len()) {
            self.cache.select_rows(&going)?;
        }
        self.rows.retain(|row| row.going);
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
        let top = config.log_probabilities;
        let unpenalised = top.is_some() && config.repetition_penalty != 1.0;
        let unpenalised = unpenalised.then(|| logits.to_vec());
        let Some(id) = sampler.sample(logits, &self.seen, config, &mut self.rng) else {
            self.going = false;
            return Err(GenerateError::NotANumber {
                row: self.index,
                generated: self.generated,
            });
        };
        self.seen.insert(id);
        self.last = id;
        self.generated += 1;
        let finish = if config.stop_tokens.contains(&id) {
            Some(FinishReason::Stop)
        } else if self.generated == config.max_new_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        self.going = finish.is_none();
        let logits = unpenalised.as_deref().unwrap_or(logits);
        Ok(GeneratedToken {
            row: self.index,
            id,
            likelihood: top.map(|top| Likelihood::of(logits, id, top)),
            finish,
        })
    }
}

/// Each row has a random stream of its own, so that equal prompts are continued differently.
fn stream(seed: u64, row: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(row as u64);
    rng
}
