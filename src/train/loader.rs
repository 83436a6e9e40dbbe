//! The order in which windows are read, and the batches they are read in.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn_train::Interrupter;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;

use super::batch::LanguageBatch;
use super::config::TrainingConfig;
use super::data::{TokenWindow, Windows, read_window};
use super::error::TrainError;
use super::objective::{Lesson, Teacher};
use super::routing::Routing;

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
    routing: Option<Routing>,
}

impl TrainingConfig {
    /// Tokens read before the end of an epoch, counted from 1, repetitions included.
    pub fn tokens_until(&self, epoch: usize) -> usize {
        Schedule::new(self).steps_until(epoch) * self.tokens_per_step()
    }
}

impl Schedule {
    pub fn new(config: &TrainingConfig) -> Self {
        Self {
            batch_size: config.batch_size,
            steps: config.steps,
            epochs: config.epochs,
            seed: config.seed,
            accumulation: config.accumulation,
            routing: config.routing.clone(),
        }
    }

    /// The plan of a routing that a step, counted from 0, is trained under.
    pub fn plan(&self, step: usize) -> Option<usize> {
        let routing = self.routing.as_ref()?;
        Some(routing.drawn(self.seed, step))
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

/// Why reading ended before its end. Burn's loops take no errors of a loader: it stops the training
/// and leaves its error here.
#[derive(Clone)]
pub(super) struct Failure {
    error: Arc<Mutex<Option<TrainError>>>,
    interrupter: Interrupter,
}

impl Failure {
    pub fn new(interrupter: Interrupter) -> Self {
        Self {
            error: Arc::default(),
            interrupter,
        }
    }

    /// The first error left here.
    pub fn take(&self) -> Option<TrainError> {
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        error.take()
    }

    /// What was read, if it could be.
    fn caught<T>(&self, read: Result<T, TrainError>) -> Option<T> {
        read.map_err(|found| {
            self.interrupter.stop(Some(&found.to_string()));
            let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
            error.get_or_insert(found);
        })
        .ok()
    }
}

/// A data set to read batches of.
#[derive(Clone)]
struct Source {
    windows: Arc<dyn Windows>,
    has_answers: bool,
    failure: Failure,
}

impl Source {
    fn new(windows: Arc<dyn Windows>, failure: Failure) -> Self {
        Self {
            has_answers: windows.has_answers(),
            windows,
            failure,
        }
    }

    fn read(&self, index: usize) -> Result<TokenWindow, TrainError> {
        read_window(&*self.windows, index, self.has_answers)
    }
}

/// Training batches: an epoch of the [`Schedule`] per iteration, starting with `next_epoch`.
pub(super) struct TrainLoader<B: AutodiffBackend> {
    source: Source,
    schedule: Schedule,
    next_epoch: AtomicUsize,
    /// The rows of every batch that are read, where several devices share it.
    rows: Range<usize>,
    /// Batches that each step's rows are read in, one after the other.
    parts: usize,
    /// Whom every batch is learned from.
    teacher: Option<Arc<Teacher<B::InnerBackend>>>,
    device: B::Device,
}

impl<B: AutodiffBackend> TrainLoader<B> {
    pub fn new(
        windows: Arc<dyn Windows>,
        schedule: Schedule,
        first_epoch: usize,
        teacher: Option<Arc<Teacher<B::InnerBackend>>>,
        failure: Failure,
        device: &B::Device,
    ) -> Self {
        Self {
            source: Source::new(windows, failure),
            next_epoch: AtomicUsize::new(first_epoch),
            rows: 0..schedule.batch_size,
            parts: schedule.accumulation,
            schedule,
            teacher,
            device: device.clone(),
        }
    }

    fn with(&self, rows: Range<usize>, device: &B::Device) -> Self {
        Self {
            source: self.source.clone(),
            schedule: self.schedule.clone(),
            next_epoch: AtomicUsize::new(self.next_epoch.load(Ordering::Relaxed)),
            rows,
            parts: self.parts,
            teacher: self.teacher.clone(),
            device: device.clone(),
        }
    }
}

impl<B: AutodiffBackend> DataLoader<B, Lesson<B>> for TrainLoader<B> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<Lesson<B>> + 'a> {
        let epoch = self.next_epoch.fetch_add(1, Ordering::Relaxed);
        Box::new(TrainBatches {
            loader: self,
            steps: self.schedule.steps_until(epoch - 1)..self.schedule.steps_until(epoch),
            parts: 0,
            order: None,
            counted: None,
        })
    }

    fn num_items(&self) -> usize {
        let epoch = self.next_epoch.load(Ordering::Relaxed);
        let steps = self.schedule.steps_until(epoch) - self.schedule.steps_until(epoch - 1);
        steps * self.rows.len()
    }

    fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, Lesson<B>>> {
        Arc::new(self.with(self.rows.clone(), device))
    }

    /// A share of every batch, not of the steps: devices that train together read, step by step,
    /// what one device would.
    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, Lesson<B>>> {
        let row = |item: usize| self.rows.start + item * self.rows.len() / self.num_items().max(1);
        Arc::new(self.with(row(start)..row(end), &self.device))
    }
}

struct TrainBatches<'a, B: AutodiffBackend> {
    loader: &'a TrainLoader<B>,
    steps: Range<usize>,
    /// Batches read so far.
    parts: usize,
    /// The pass under way and its order.
    order: Option<(usize, Vec<usize>)>,
    /// The step under way and how many of its targets count.
    counted: Option<(usize, usize)>,
}

impl<B: AutodiffBackend> TrainBatches<'_, B> {
    /// The window that is read after `read` others.
    fn window(&mut self, read: usize) -> Result<TokenWindow, TrainError> {
        let windows = self.loader.source.windows.len();
        let pass = read / windows;
        let order = match self.order.take() {
            Some((current, order)) if current == pass => order,
            _ => self.loader.schedule.order(pass, windows),
        };
        let index = order[read % windows];
        self.order = Some((pass, order));
        self.loader.source.read(index)
    }

    /// The targets of a step that count, those of other devices included, of which `items` are
    /// read already.
    fn counted(&mut self, step: usize, items: &[TokenWindow]) -> Result<usize, TrainError> {
        if let Some((counted_step, counted)) = self.counted
            && counted_step == step
        {
            return Ok(counted);
        }
        let windows = self.loader.schedule.batch_size;
        let mut counted = 0;
        if items.len() == windows {
            counted = items.iter().map(TokenWindow::counted).sum();
        } else {
            for read in step * windows..(step + 1) * windows {
                counted += self.window(read)?.counted();
            }
        }
        if counted == 0 {
            let step = Some(step + 1);
            return Err(TrainError::NoTargets { step });
        }
        self.counted = Some((step, counted));
        Ok(counted)
    }

    /// A part of a step's rows.
    fn read(&mut self, step: usize, part: usize) -> Result<LanguageBatch<B>, TrainError> {
        let loader = self.loader;
        let (rows, windows) = (&loader.rows, loader.schedule.batch_size);
        let row = |part: usize| step * windows + rows.start + part * rows.len() / loader.parts;
        let items: Vec<_> = (row(part)..row(part + 1))
            .map(|read| self.window(read))
            .collect::<Result<_, _>>()?;
        let masked = loader.source.has_answers;
        let mut batch = LanguageBatch::stack(&items, masked, &loader.device);
        if let Some(mask) = &mut batch.mask {
            let batches = windows / items.len();
            mask.divisor = self.counted(step, &items)? as f64 / batches as f64;
        }
        Ok(batch)
    }
}

impl<B: AutodiffBackend> Iterator for TrainBatches<'_, B> {
    type Item = Lesson<B>;

    fn next(&mut self) -> Option<Self::Item> {
        let (step, part) = (
            self.steps.start + self.parts / self.loader.parts,
            self.parts % self.loader.parts,
        );
        if step >= self.steps.end {
            return None;
        }
        self.parts += 1;
        let batch = self.read(step, part);
        Some(Lesson {
            batch: self.loader.source.failure.caught(batch)?,
            teacher: self.loader.teacher.clone(),
            plan: self.loader.schedule.plan(step),
        })
    }
}

impl<B: AutodiffBackend> DataLoaderIterator<Lesson<B>> for TrainBatches<'_, B> {
    fn progress(&self) -> Progress {
        let rows = self.loader.rows.len();
        Progress::new(
            self.parts * rows / self.loader.parts,
            self.steps.len() * rows,
        )
    }
}

/// Batches to validate with: all windows in their order.
pub(super) struct ValidLoader<B: Backend> {
    source: Source,
    rows: Range<usize>,
    batch_size: usize,
    device: B::Device,
}

impl<B: Backend> ValidLoader<B> {
    pub fn new(
        windows: Arc<dyn Windows>,
        batch_size: usize,
        failure: Failure,
        device: &B::Device,
    ) -> Self {
        Self {
            rows: 0..windows.len(),
            source: Source::new(windows, failure),
            batch_size,
            device: device.clone(),
        }
    }

    fn with(&self, rows: Range<usize>, device: &B::Device) -> Self {
        Self {
            source: self.source.clone(),
            rows,
            batch_size: self.batch_size,
            device: device.clone(),
        }
    }
}

impl<B: Backend> DataLoader<B, LanguageBatch<B>> for ValidLoader<B> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<LanguageBatch<B>> + 'a> {
        Box::new(ValidBatches {
            loader: self,
            read: 0,
        })
    }

    fn num_items(&self) -> usize {
        self.rows.len()
    }

    fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, LanguageBatch<B>>> {
        Arc::new(self.with(self.rows.clone(), device))
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, LanguageBatch<B>>> {
        let rows = self.rows.start + start..self.rows.start + end;
        Arc::new(self.with(rows, &self.device))
    }
}

struct ValidBatches<'a, B: Backend> {
    loader: &'a ValidLoader<B>,
    /// Windows read so far.
    read: usize,
}

impl<B: Backend> Iterator for ValidBatches<'_, B> {
    type Item = LanguageBatch<B>;

    fn next(&mut self) -> Option<Self::Item> {
        let ValidLoader { source, rows, .. } = self.loader;
        let start = rows.start + self.read;
        let end = rows.end.min(start + self.loader.batch_size);
        if start >= end {
            return None;
        }
        self.read += end - start;
        let items = (start..end).map(|index| source.read(index)).collect();
        let items: Vec<_> = source.failure.caught(items)?;
        let device = &self.loader.device;
        Some(LanguageBatch::stack(&items, source.has_answers, device))
    }
}

impl<B: Backend> DataLoaderIterator<LanguageBatch<B>> for ValidBatches<'_, B> {
    fn progress(&self) -> Progress {
        Progress::new(self.read, self.loader.rows.len())
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
            routing: None,
        };
        let ends: Vec<_> = (0..=3).map(|epoch| schedule.steps_until(epoch)).collect();
        assert_eq!(ends, [0, 3, 6, 10]);
        let (first, second) = (schedule.order(0, 50), schedule.order(1, 50));
        assert_ne!(first, second);
        assert_eq!(first, schedule.order(0, 50));
        let other = Schedule {
            seed: 2,
            ..schedule.clone()
        };
        assert_ne!(first, other.order(0, 50));
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..50).collect::<Vec<_>>());
        }
    }
}
