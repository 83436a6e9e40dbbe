//! Packed token windows, their split, and the order training reads them in.

use std::borrow::Cow;
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
use xxhash_rust::xxh3::Xxh3Default;

use super::config::TrainingConfig;
use super::error::TrainError;
use super::token_file::TokenFile;

/// `context` tokens to read and, for each, the token that follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenWindow {
    /// What the decoder reads.
    pub inputs: Vec<u32>,
    /// What it should predict, position by position.
    pub targets: Vec<u32>,
    /// The positions whose targets count towards the loss, the same number in every window of a
    /// data set; none: all count.
    pub answers: Option<Vec<Answer>>,
}

/// A target that can be told from what was read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its position among the targets.
    pub position: usize,
    /// How many tokens before `position` what it must recall was read.
    pub distance: usize,
}

/// Windows to train on or to validate with, all of one length.
pub trait Windows: Dataset<TokenWindow> {
    /// Tokens per window.
    fn context(&self) -> usize;

    /// Checks that every token is below the vocabulary's size.
    ///
    /// # Errors
    /// [`TrainError::OutOfVocabulary`] for one that is not.
    fn check_vocabulary(&self, vocab_size: usize) -> Result<(), TrainError>;

    /// A number that other data most likely do not have.
    fn fingerprint(&self) -> u64;
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
        })
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
        Some(TokenWindow {
            inputs: tokens[..self.context].to_vec(),
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
        match &self.tokens {
            Tokens::Memory(tokens) => check_vocabulary(&tokens[self.range()], vocab_size),
            Tokens::File(file) => file.check_vocabulary(vocab_size),
        }
    }

    fn fingerprint(&self) -> u64 {
        match &self.tokens {
            Tokens::Memory(tokens) => {
                let mut hash = Xxh3Default::new();
                for token in &tokens[self.range()] {
                    hash.update(&token.to_le_bytes());
                }
                hash.digest()
            }
            Tokens::File(file) => file.fingerprint(),
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

/// Windows as tensors.
#[derive(Clone, Debug)]
pub struct LanguageBatch<B: Backend> {
    /// `[batch, context]`.
    pub tokens: Tensor<B, 2, Int>,
    /// The token after each, `[batch, context]`.
    pub targets: Tensor<B, 2, Int>,
    /// The positions whose targets count, `[batch, answers]`; none: all count.
    pub answers: Option<Tensor<B, 2, Int>>,
}

/// Stacks windows of equal length.
#[derive(Clone, Copy, Debug, Default)]
pub struct LanguageBatcher;

impl<B: Backend> Batcher<B, TokenWindow, LanguageBatch<B>> for LanguageBatcher {
    fn batch(&self, items: Vec<TokenWindow>, device: &B::Device) -> LanguageBatch<B> {
        let stack = |row: fn(&TokenWindow) -> &[u32]| {
            let context = items.first().map_or(0, |item| row(item).len());
            let ids: Vec<i64> = items.iter().flat_map(row).map(|&id| id.into()).collect();
            Tensor::from_data(TensorData::new(ids, [items.len(), context]), device)
        };
        let answers: Option<Vec<i64>> = items
            .iter()
            .map(|item| item.answers.as_deref())
            .collect::<Option<Vec<_>>>()
            .map(|rows| rows.concat().iter().map(|a| a.position as i64).collect());
        LanguageBatch {
            answers: answers.map(|positions| {
                let shape = [items.len(), positions.len() / items.len().max(1)];
                Tensor::from_data(TensorData::new(positions, shape), device)
            }),
            tokens: stack(|item| &item.inputs),
            targets: stack(|item| &item.targets),
        }
    }
}

/// How many windows training reads, in which portions, in which order.
///
/// All windows are read once, shuffled, before any is read again, shuffled anew. The order is a
/// function of the seed and the step alone, so that a resumed run goes on where the first stopped:
/// Burn's own loaders would start their shuffling over.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    batch_size: usize,
    steps: usize,
    epochs: usize,
    seed: u64,
    accumulation: usize,
}

impl Schedule {
    pub fn new(config: &TrainingConfig) -> Self {
        Self {
            batch_size: config.batch_size,
            steps: config.steps,
            epochs: config.epochs,
            seed: config.seed,
            accumulation: config.accumulation,
        }
    }

    /// Steps before the end of `epoch`, counted from 1.
    pub fn steps_until(&self, epoch: usize) -> usize {
        self.steps * epoch / self.epochs
    }

    /// The order in which `pass` reads `windows`.
    fn order(&self, pass: usize, windows: usize) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(pass as u64);
        let mut order: Vec<usize> = (0..windows).collect();
        order.shuffle(&mut rng);
        order
    }
}

/// Training batches: an epoch of the [`Schedule`] per iteration, starting with `next_epoch`.
pub(super) struct TrainLoader<B: Backend> {
    windows: Arc<dyn Windows>,
    schedule: Schedule,
    next_epoch: AtomicUsize,
    /// The rows of every batch that are read, where several devices share it.
    rows: Range<usize>,
    /// Batches that each step's rows are read in, one after the other.
    parts: usize,
    device: B::Device,
}

impl<B: Backend> TrainLoader<B> {
    pub fn new(
        windows: Arc<dyn Windows>,
        schedule: Schedule,
        first_epoch: usize,
        device: &B::Device,
    ) -> Self {
        Self {
            windows,
            next_epoch: AtomicUsize::new(first_epoch),
            rows: 0..schedule.batch_size,
            parts: schedule.accumulation,
            schedule,
            device: device.clone(),
        }
    }

    fn with(&self, rows: Range<usize>, device: &B::Device) -> Self {
        let next = self.next_epoch.load(Ordering::Relaxed);
        Self {
            rows,
            ..Self::new(self.windows.clone(), self.schedule.clone(), next, device)
        }
    }
}

impl<B: Backend> DataLoader<B, LanguageBatch<B>> for TrainLoader<B> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<LanguageBatch<B>> + 'a> {
        let epoch = self.next_epoch.fetch_add(1, Ordering::Relaxed);
        Box::new(TrainBatches {
            loader: self,
            steps: self.schedule.steps_until(epoch - 1)..self.schedule.steps_until(epoch),
            parts: 0,
            order: None,
        })
    }

    fn num_items(&self) -> usize {
        let epoch = self.next_epoch.load(Ordering::Relaxed);
        let steps = self.schedule.steps_until(epoch) - self.schedule.steps_until(epoch - 1);
        steps * self.rows.len()
    }

    fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, LanguageBatch<B>>> {
        Arc::new(self.with(self.rows.clone(), device))
    }

    /// A share of every batch, not of the steps: devices that train together read, step by step,
    /// what one device would.
    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, LanguageBatch<B>>> {
        let row = |item: usize| self.rows.start + item * self.rows.len() / self.num_items().max(1);
        Arc::new(self.with(row(start)..row(end), &self.device))
    }
}

struct TrainBatches<'a, B: Backend> {
    loader: &'a TrainLoader<B>,
    steps: Range<usize>,
    /// Batches read so far.
    parts: usize,
    /// The pass under way and its order.
    order: Option<(usize, Vec<usize>)>,
}

impl<B: Backend> TrainBatches<'_, B> {
    fn window(&mut self, read: usize) -> Option<TokenWindow> {
        let windows = self.loader.windows.len();
        let pass = read / windows;
        if self
            .order
            .as_ref()
            .is_none_or(|(current, _)| *current != pass)
        {
            self.order = Some((pass, self.loader.schedule.order(pass, windows)));
        }
        let (_, order) = self.order.as_ref()?;
        self.loader.windows.get(order[read % windows])
    }
}

impl<B: Backend> Iterator for TrainBatches<'_, B> {
    type Item = LanguageBatch<B>;

    fn next(&mut self) -> Option<Self::Item> {
        let (step, part) = (
            self.steps.start + self.parts / self.loader.parts,
            self.parts % self.loader.parts,
        );
        if step >= self.steps.end {
            return None;
        }
        let rows = &self.loader.rows;
        let first = step * self.loader.schedule.batch_size + rows.start;
        let row = |part: usize| first + part * rows.len() / self.loader.parts;
        let reads = row(part)..row(part + 1);
        self.parts += 1;
        let items: Vec<_> = reads.filter_map(|read| self.window(read)).collect();
        (!items.is_empty()).then(|| LanguageBatcher.batch(items, &self.loader.device))
    }
}

impl<B: Backend> DataLoaderIterator<LanguageBatch<B>> for TrainBatches<'_, B> {
    fn progress(&self) -> Progress {
        let rows = self.loader.rows.len();
        Progress::new(
            self.parts * rows / self.loader.parts,
            self.steps.len() * rows,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_reads_every_window_and_epochs_join_up() {
        let schedule = Schedule {
            batch_size: 2,
            steps: 10,
            epochs: 3,
            seed: 1,
            accumulation: 1,
        };
        let ends: Vec<_> = (0..=3).map(|epoch| schedule.steps_until(epoch)).collect();
        assert_eq!(ends, [0, 3, 6, 10]);
        let (first, second) = (schedule.order(0, 50), schedule.order(1, 50));
        assert_ne!(first, second);
        assert_eq!(first, schedule.order(0, 50));
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..50).collect::<Vec<_>>());
        }
    }
}
