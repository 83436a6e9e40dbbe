//! Writing the checkpoints of a run: when, which are kept, and that they are complete.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use burn::record::{
    BurnRecord, FileRecorder, FullPrecisionSettings, NamedMpkFileRecorder, Record, Recorder,
    RecorderError,
};
use burn::tensor::backend::Backend;
use burn_train::checkpoint::{CheckpointingAction, CheckpointingStrategy};
use burn_train::metric::store::EventStoreClient;
use burn_train::{EarlyStoppingStrategy, Interrupter};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::directory::{EpochLosses, PARTS, RunDirectory};
use super::gradients::GradientNorms;
use crate::file;

/// Losses shared between the run and the thread that checkpoints.
pub(super) type History = Arc<Mutex<Vec<EpochLosses>>>;

/// The parts of a checkpoint that its threads are still to read from the devices or to write, and
/// whether one of the threads died of it. Burn's learner hands each part to a thread of its own, which
/// records it once.
///
/// Training waits for them: a backend that fuses operations does not survive tensors that one thread
/// reads while another goes on with them (docs/decisions/cubecl-faults.md).
#[derive(Clone, Debug, Default)]
pub(super) struct Unwritten(Arc<(Mutex<Parts>, Condvar)>);

#[derive(Clone, Copy, Debug, Default)]
struct Parts {
    unwritten: usize,
    thread_died: bool,
}

impl Unwritten {
    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self, parts: usize) {
        self.parts().unwritten += parts;
    }

    /// Until none is left; whether every thread still lives.
    fn wait(&self) -> bool {
        let waiting = self
            .0
            .1
            .wait_while(self.parts(), |parts| parts.unwritten > 0);
        !waiting.unwrap_or_else(PoisonError::into_inner).thread_died
    }
}

/// Counts a part as done when its thread has written it, failed, or panicked.
struct Done<'u>(&'u Unwritten);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        let mut parts = self.0.parts();
        // Recorders also write what no run waits for.
        parts.unwritten = parts.unwritten.saturating_sub(1);
        parts.thread_died |= thread::panicking();
        drop(parts);
        self.0.0.1.notify_all();
    }
}

/// Burn's recorder in full precision, under a temporary name until the file is complete. Optimizer
/// moments do not survive half precision.
#[derive(Clone, Debug, Default)]
pub(super) struct CompleteFileRecorder {
    recorder: NamedMpkFileRecorder<FullPrecisionSettings>,
    unwritten: Unwritten,
}

impl CompleteFileRecorder {
    /// A recorder that counts what it records as written.
    pub fn telling(unwritten: Unwritten) -> Self {
        let recorder = NamedMpkFileRecorder::default();
        Self {
            recorder,
            unwritten,
        }
    }
}

impl<B: Backend> Recorder<B> for CompleteFileRecorder {
    type Settings = FullPrecisionSettings;
    type RecordArgs = PathBuf;
    type RecordOutput = ();
    type LoadArgs = PathBuf;

    fn record<R: Record<B>>(&self, record: R, path: PathBuf) -> Result<(), RecorderError> {
        let _done = Done(&self.unwritten);
        let item = record.into_item::<Self::Settings>();
        let record = BurnRecord::<_, B>::new::<Self>(item);
        Recorder::<B>::save_item(self, record, path)
    }

    fn save_item<I: Serialize>(&self, item: I, mut path: PathBuf) -> Result<(), RecorderError> {
        path.set_extension(<Self as FileRecorder<B>>::file_extension());
        let write = |partial: &Path| {
            Recorder::<B>::save_item(&self.recorder, item, partial.to_owned())
                .map_err(io::Error::other)
        };
        file::write_by_name(&path, write).map_err(|error| RecorderError::Unknown(error.to_string()))
    }

    fn load_item<I: DeserializeOwned>(&self, path: &mut PathBuf) -> Result<I, RecorderError> {
        Recorder::<B>::load_item(&self.recorder, path)
    }
}

impl<B: Backend> FileRecorder<B> for CompleteFileRecorder {
    fn file_extension() -> &'static str {
        "mpk"
    }
}

/// Keeps the checkpoint with the lowest validation loss and the last two: while one is written, the
/// one before is what a run that dies resumes from.
///
/// Burn's own strategy looks the loss up while the last batches may still be on their way to it.
pub(super) struct KeepLastAndBest {
    pub run: RunDirectory,
    pub history: History,
    pub reports: Reports,
    pub interrupter: Interrupter,
    unwritten: Unwritten,
    kept: BTreeSet<usize>,
}

/// The means of each epoch, as it ends.
pub(super) struct Reports {
    pub train: Receiver<f64>,
    pub valid: Receiver<f64>,
    /// As `valid`, under each plan of a routing.
    pub plans: Vec<Receiver<f64>>,
    pub gradient_norms: Receiver<Option<GradientNorms>>,
}

impl KeepLastAndBest {
    pub fn new(
        run: RunDirectory,
        history: History,
        reports: Reports,
        interrupter: Interrupter,
        unwritten: Unwritten,
    ) -> Self {
        let kept = run.checkpoints();
        Self {
            run,
            history,
            reports,
            interrupter,
            unwritten,
            kept,
        }
    }
}

impl CheckpointingStrategy for KeepLastAndBest {
    fn checkpointing(&mut self, epoch: usize, _: &EventStoreClient) -> Vec<CheckpointingAction> {
        self.ended(epoch)
    }
}

impl KeepLastAndBest {
    /// What is kept once an epoch has ended: nothing of one whose validation may have been stopped,
    /// which is made again when the run is resumed.
    fn ended(&mut self, epoch: usize) -> Vec<CheckpointingAction> {
        let Reports {
            train,
            valid,
            plans,
            gradient_norms,
        } = &self.reports;
        // A closed channel means that the metrics' thread died.
        let mean = |report: &Receiver<f64>| report.recv().unwrap_or(f64::NAN);
        let losses = EpochLosses {
            epoch,
            train: mean(train),
            valid: mean(valid),
            plans: plans.iter().map(mean).collect(),
            gradient_norms: gradient_norms.recv().ok().flatten(),
        };
        if self.interrupter.should_stop() {
            return Vec::new();
        }
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let finite = losses.train.is_finite() && losses.valid.is_finite();
        history.push(losses);
        if let Err(error) = self.run.save_losses(&history) {
            self.interrupter.stop(Some(&error.to_string()));
        }
        if !finite {
            self.interrupter.stop(Some("the loss is not a number"));
            return Vec::new();
        }
        let best = history.iter().min_by(|a, b| a.valid.total_cmp(&b.valid));
        let best = best.map_or(epoch, |best| best.epoch);
        self.kept.insert(epoch);
        let keep = |old: usize| old + 1 >= epoch || old == best;
        let (kept, old): (BTreeSet<_>, BTreeSet<_>) =
            self.kept.iter().copied().partition(|&old| keep(old));
        self.kept = kept;
        self.unwritten.announce(PARTS.len());
        // Deleting waits for what is being written, so that it comes last.
        std::iter::once(CheckpointingAction::Save)
            .chain(old.into_iter().map(CheckpointingAction::Delete))
            .collect()
    }
}

/// Ends a training whose validation loss no longer goes down. Burn's own strategy may look the loss
/// up too early, like its checkpointing, and forgets the epochs before a resumption.
#[derive(Clone)]
pub(super) struct Patience {
    pub history: History,
    /// Epochs without a new lowest loss.
    pub epochs: usize,
}

impl Patience {
    pub fn is_over(&self) -> bool {
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let best = history.iter().min_by(|a, b| a.valid.total_cmp(&b.valid));
        match (best, history.last()) {
            (Some(best), Some(last)) => last.epoch - best.epoch >= self.epochs,
            _ => false,
        }
    }
}

/// What follows the checkpoint of an epoch, on the thread that trains.
#[derive(Clone)]
pub(super) struct EpochEnd {
    pub unwritten: Unwritten,
    pub interrupter: Interrupter,
    pub patience: Option<Patience>,
}

impl EarlyStoppingStrategy for EpochEnd {
    // The epoch's losses are there: checkpoints, which wait for them, come first.
    fn should_stop(&mut self, _: usize, _: &EventStoreClient) -> bool {
        if !self.unwritten.wait() {
            let reason = "a thread that writes checkpoints died";
            self.interrupter.stop(Some(reason));
            return true;
        }
        self.patience.as_ref().is_some_and(Patience::is_over)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use burn_flex::Flex;

    use super::*;
    use crate::train::TrainingConfig;
    use crate::train::directory::DataMark;
    use crate::{FusedKvDecoderConfig, KvPlan};

    #[test]
    fn an_epoch_whose_validation_was_stopped_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let model = FusedKvDecoderConfig::tiny(16, KvPlan::Standard);
        let config = TrainingConfig::new(model, 8, 4, 10);
        let run =
            RunDirectory::start(directory.path(), &config, &DataMark::new(1, 2, None)).unwrap();
        let (train, valid, norms) = (channel(), channel(), channel());
        let (history, interrupter) = (History::default(), Interrupter::new());
        let mut strategy = KeepLastAndBest::new(
            run.clone(),
            history.clone(),
            Reports {
                train: train.1,
                valid: valid.1,
                plans: Vec::new(),
                gradient_norms: norms.1,
            },
            interrupter.clone(),
            Unwritten::default(),
        );
        let mut epoch = |epoch, loss| {
            train.0.send(loss).unwrap();
            valid.0.send(loss).unwrap();
            norms.0.send(None).unwrap();
            strategy.ended(epoch).len()
        };
        assert_eq!(epoch(1, 2.0), 1);
        // Of the few windows read before the stop.
        interrupter.stop(Some("enough"));
        assert_eq!(epoch(2, 0.1), 0);
        let kept = RunDirectory::losses(directory.path()).unwrap();
        assert_eq!(kept, *history.lock().unwrap());
        let epochs: Vec<_> = kept.iter().map(|losses| losses.epoch).collect();
        assert_eq!(epochs, [1]);
    }

    #[test]
    fn nobody_waits_for_a_part_that_cannot_be_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("missing").join("model-1");
        let unwritten = Unwritten::default();
        let recorder = CompleteFileRecorder::telling(unwritten.clone());
        unwritten.announce(2);
        Recorder::<Flex>::record(&recorder, 1usize, path).unwrap_err();
        let died = thread::spawn({
            let unwritten = unwritten.clone();
            move || {
                let _done = Done(&unwritten);
                panic!("while a tensor was read");
            }
        });
        assert!(!unwritten.wait());
        died.join().unwrap_err();
    }
}
