//! Packed windows of tokens, and the order a run sees them in.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use burn_dataset::Dataset;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;

use super::TrainError;

/// Windows of `context` tokens, each with the token that follows it, one after the other without
/// overlap or padding. What does not fill a window at the end is left out.
#[derive(Clone, Debug)]
pub struct TokenWindows {
    tokens: Arc<[u32]>,
    range: Range<usize>,
    context: usize,
}

/// `context` input tokens and one more: token t + 1 is the target of token t.
pub type TokenWindow = Vec<u32>;

impl TokenWindows {
    /// Splits `tokens` into windows to train on and, at the end, about `valid_fraction` of them to
    /// validate on, at least one of each. The two share no token: the last target of the training
    /// windows comes before the first validation token.
    ///
    /// # Errors
    /// [`TrainError::TooFewTokens`] if there are not enough for a window of each.
    pub fn split(
        tokens: impl Into<Arc<[u32]>>,
        context: usize,
        valid_fraction: f64,
    ) -> Result<(Self, Self), TrainError> {
        let tokens = tokens.into();
        let len = tokens.len();
        // Two windows, and for each a last target.
        let needed = 2 * (context + 1);
        if context == 0 || len < needed {
            return Err(TrainError::TooFewTokens { found: len, needed });
        }
        let windows = (len - 2) / context;
        let valid = ((windows as f64 * valid_fraction).round() as usize).clamp(1, windows - 1);
        let first_valid = len - (valid * context + 1);
        let part = |range| Self {
            tokens: tokens.clone(),
            range,
            context,
        };
        Ok((part(0..first_valid), part(first_valid..len)))
    }
}

impl Dataset<TokenWindow> for TokenWindows {
    fn get(&self, index: usize) -> Option<TokenWindow> {
        if index >= self.len() {
            return None;
        }
        let start = self.range.start + index * self.context;
        Some(self.tokens[start..=start + self.context].to_vec())
    }

    fn len(&self) -> usize {
        self.range.len().saturating_sub(1) / self.context
    }
}

/// Inputs and the tokens that follow them, both `[batch, context]`.
#[derive(Clone, Debug)]
pub struct LanguageBatch<B: Backend> {
    /// What the model reads.
    pub tokens: Tensor<B, 2, Int>,
    /// What comes next at each position.
    pub targets: Tensor<B, 2, Int>,
}

/// Stacks windows of equal length into a [`LanguageBatch`].
#[derive(Clone, Copy, Debug, Default)]
pub struct LanguageBatcher;

impl<B: Backend> Batcher<B, TokenWindow, LanguageBatch<B>> for LanguageBatcher {
    fn batch(&self, windows: Vec<TokenWindow>, device: &B::Device) -> LanguageBatch<B> {
        let (batch, window) = (windows.len(), windows[0].len());
        let ids: Vec<i64> = windows.iter().flatten().map(|&t| i64::from(t)).collect();
        let ids = Tensor::<B, 2, Int>::from_data(TensorData::new(ids, [batch, window]), device);
        LanguageBatch {
            tokens: ids.clone().narrow(1, 0, window - 1),
            targets: ids.narrow(1, 1, window - 1),
        }
    }
}

/// Training windows in an order that depends on nothing but the seed: pass after pass over all of
/// them, each in a random order of its own, cut into epochs of a fixed number of batches. A run
/// that resumes at an epoch goes on where it would have been.
#[derive(Clone, Debug)]
pub struct ShuffledEpochs<B: Backend> {
    windows: TokenWindows,
    batch_size: usize,
    /// Of each epoch's batches, those this loader yields.
    batches: Range<usize>,
    epoch_batches: usize,
    seed: u64,
    epoch: Arc<AtomicUsize>,
    device: B::Device,
}

impl<B: Backend> ShuffledEpochs<B> {
    /// Epochs of `epoch_batches` batches; the first one asked for is number `epoch`, from 0.
    pub fn new(
        windows: TokenWindows,
        batch_size: usize,
        epoch_batches: usize,
        seed: u64,
        epoch: usize,
        device: B::Device,
    ) -> Self {
        Self {
            windows,
            batch_size,
            batches: 0..epoch_batches,
            epoch_batches,
            seed,
            epoch: Arc::new(AtomicUsize::new(epoch)),
            device,
        }
    }

    fn with_batches(&self, batches: Range<usize>, device: B::Device) -> Self {
        Self {
            batches,
            device,
            epoch: Arc::new(AtomicUsize::new(self.epoch.load(Ordering::Relaxed))),
            ..self.clone()
        }
    }
}

impl<B: Backend> DataLoader<B, LanguageBatch<B>> for ShuffledEpochs<B> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<LanguageBatch<B>> + 'a> {
        let epoch = self.epoch.fetch_add(1, Ordering::Relaxed);
        Box::new(Epoch {
            loader: self,
            first_sample: epoch * self.epoch_batches * self.batch_size,
            next_batch: self.batches.start,
            pass: None,
        })
    }

    fn num_items(&self) -> usize {
        self.batches.len() * self.batch_size
    }

    fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, LanguageBatch<B>>> {
        Arc::new(self.with_batches(self.batches.clone(), device.clone()))
    }

    /// Items are windows; a slice keeps the batches that lie in it.
    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, LanguageBatch<B>>> {
        let first = self.batches.start;
        let batches = first + start / self.batch_size..first + end / self.batch_size;
        Arc::new(self.with_batches(batches, self.device.clone()))
    }
}

struct Epoch<'a, B: Backend> {
    loader: &'a ShuffledEpochs<B>,
    first_sample: usize,
    next_batch: usize,
    /// The pass last looked at and its order.
    pass: Option<(usize, Vec<usize>)>,
}

impl<B: Backend> Epoch<'_, B> {
    /// The window that is the run's `sample`-th.
    fn window(&mut self, sample: usize) -> usize {
        let n = self.loader.windows.len();
        let pass = sample / n;
        if self.pass.as_ref().is_none_or(|(at, _)| *at != pass) {
            let mut rng = ChaCha8Rng::seed_from_u64(self.loader.seed);
            rng.set_stream(pass as u64);
            let mut order: Vec<usize> = (0..n).collect();
            order.shuffle(&mut rng);
            self.pass = Some((pass, order));
        }
        self.pass.as_ref().map_or(0, |(_, order)| order[sample % n])
    }
}

impl<B: Backend> Iterator for Epoch<'_, B> {
    type Item = LanguageBatch<B>;

    fn next(&mut self) -> Option<Self::Item> {
        let loader = self.loader;
        if self.next_batch >= loader.batches.end {
            return None;
        }
        let first = self.first_sample + self.next_batch * loader.batch_size;
        self.next_batch += 1;
        let windows = (first..first + loader.batch_size)
            .filter_map(|sample| loader.windows.get(self.window(sample)))
            .collect();
        Some(LanguageBatcher.batch(windows, &loader.device))
    }
}

impl<B: Backend> DataLoaderIterator<LanguageBatch<B>> for Epoch<'_, B> {
    fn progress(&self) -> Progress {
        let done = self.next_batch - self.loader.batches.start;
        Progress::new(
            done * self.loader.batch_size,
            self.loader.batches.len() * self.loader.batch_size,
        )
    }
}
