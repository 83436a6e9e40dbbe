//! The directory of a run: its configuration, losses so far, and checkpoints to resume from.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use burn::config::config_to_json;
use burn::record::{
    BurnRecord, FileRecorder, FullPrecisionSettings, NamedMpkFileRecorder, Record, Recorder,
    RecorderError,
};
use burn::tensor::backend::Backend;
use burn_train::checkpoint::{CheckpointingAction, CheckpointingStrategy};
use burn_train::metric::store::EventStoreClient;
use burn_train::{EarlyStoppingStrategy, Interrupter};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::config::TrainingConfig;
use super::data::HASH;
use super::error::TrainError;
use super::gradients::GradientNorms;
use super::log;
use super::number;
use crate::file;

const CONFIG: &str = "training.json";
const DATA: &str = "data.json";
const LOSSES: &str = "losses.json";
const CHECKPOINTS: &str = "checkpoint";
const LOG: &str = "metrics.jsonl";
/// The files of a checkpoint, as Burn names them.
const PARTS: [&str; 3] = ["model", "optim", "scheduler"];

/// The losses of an epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochLosses {
    /// The epoch, counted from 1.
    pub epoch: usize,
    /// Mean loss of the batches trained on, each before its step, in nats per token.
    #[serde(with = "number")]
    pub train: f64,
    /// Mean loss of the held-out windows after the epoch, in nats per token.
    #[serde(with = "number")]
    pub valid: f64,
    /// `valid` under each plan of a [routing](super::Routing), whose mean by the plans' weights it then
    /// is; empty in a training without.
    #[serde(default, with = "number::list", skip_serializing_if = "Vec::is_empty")]
    pub plans: Vec<f64>,
    /// Mean over the epoch's steps of the gradients' norms before they are clipped.
    #[serde(default)]
    pub gradient_norms: Option<GradientNorms>,
}

/// Losses shared between the run and the thread that checkpoints.
pub(super) type History = Arc<Mutex<Vec<EpochLosses>>>;

/// Fingerprints of what a run learns from.
#[derive(Clone, Debug, Serialize)]
pub(super) struct DataMark {
    hash: &'static str,
    training_data_hash: u64,
    validation_data_hash: u64,
    teacher_hash: Option<u64>,
}

impl DataMark {
    pub fn new(training_data: u64, validation_data: u64, teacher: Option<u64>) -> Self {
        Self {
            hash: HASH,
            training_data_hash: training_data,
            validation_data_hash: validation_data,
            teacher_hash: teacher,
        }
    }
}

/// The directory of a run.
#[derive(Clone, Debug)]
pub(super) struct RunDirectory {
    path: PathBuf,
    /// Of those who write.
    _lock: Option<Arc<File>>,
}

impl RunDirectory {
    fn locked(path: &Path) -> Result<Self, TrainError> {
        Ok(Self {
            path: path.to_owned(),
            _lock: Some(Arc::new(lock(path)?)),
        })
    }

    /// Makes `path` the directory of a new run. What an earlier run left there is deleted, and
    /// nothing else ever is.
    pub fn start(
        path: &Path,
        config: &TrainingConfig,
        data: &DataMark,
    ) -> Result<Self, TrainError> {
        let write = |path: &Path| {
            let path = path.to_owned();
            move |source| TrainError::Write { path, source }
        };
        fs::create_dir_all(path).map_err(write(path))?;
        let config_path = path.join(CONFIG);
        if !config_path.exists() {
            for entry in fs::read_dir(path).map_err(write(path))? {
                // What a run leaves that dies at once.
                let name = entry.map_err(write(path))?.file_name();
                if name != file::LOCK && !file::is_partial(&name, &config_path) {
                    return Err(TrainError::NotARun(path.to_owned()));
                }
            }
        }
        let run = Self::locked(path)?;
        let checkpoints = path.join(CHECKPOINTS);
        if checkpoints.exists() {
            fs::remove_dir_all(&checkpoints).map_err(write(&checkpoints))?;
        }
        if run.log().exists() {
            fs::remove_file(run.log()).map_err(write(&run.log()))?;
        }
        // First of all what tells the directory from others. Nothing is resumed without a checkpoint.
        file::write(&config_path, config_to_json(config)).map_err(write(&config_path))?;
        write_json(&path.join(DATA), data)?;
        run.save_losses(&[])?;
        Ok(run)
    }

    /// Opens the directory of a run with this configuration and data: it, its last complete
    /// checkpoint's epoch, and the losses until then.
    pub fn resume(
        path: &Path,
        config: &TrainingConfig,
        data: &DataMark,
    ) -> Result<(Self, usize, Vec<EpochLosses>), TrainError> {
        let config_path = path.join(CONFIG);
        if !config_path.exists() {
            return Err(TrainError::NoCheckpoint(path.to_owned()));
        }
        let run = Self::locked(path)?;
        check_same(path, &read::<serde_json::Value>(&config_path)?, config)?;
        let data_path = path.join(DATA);
        match data_path.exists() {
            true => check_same(path, &read::<serde_json::Value>(&data_path)?, data)?,
            // One of an older version. From here on it reads this.
            false => write_json(&data_path, data)?,
        }
        let epoch = run.last_checkpoint();
        let epoch = epoch.ok_or_else(|| TrainError::NoCheckpoint(path.to_owned()))?;
        let mut losses = Self::losses(path)?;
        losses.retain(|losses| losses.epoch <= epoch);
        let log = run.log();
        log::keep_until(&log, epoch).map_err(|source| TrainError::Write { path: log, source })?;
        Ok((run, epoch, losses))
    }

    /// Opens the directory of any run: it, its configuration, and the losses of the epochs that have
    /// a complete checkpoint, in order.
    pub fn saved(path: &Path) -> Result<(Self, TrainingConfig, Vec<EpochLosses>), TrainError> {
        let run = Self {
            path: path.to_owned(),
            _lock: None,
        };
        if !path.join(CONFIG).exists() || !path.join(LOSSES).exists() {
            return Err(TrainError::NoCheckpoint(path.to_owned()));
        }
        let mut losses = Self::losses(path)?;
        let saved = run.checkpoints();
        losses.retain(|losses| saved.contains(&losses.epoch));
        Ok((run, read(&path.join(CONFIG))?, losses))
    }

    /// The losses of every epoch of a run, those after the last checkpoint included.
    pub fn losses(path: &Path) -> Result<Vec<EpochLosses>, TrainError> {
        read(&path.join(LOSSES))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where steps and validations are logged.
    pub fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// A part of a checkpoint, without extension, as recorders take it.
    pub fn part(&self, part: &str, epoch: usize) -> PathBuf {
        self.path.join(CHECKPOINTS).join(format!("{part}-{epoch}"))
    }

    /// The epochs that have a complete checkpoint.
    fn checkpoints(&self) -> BTreeSet<usize> {
        let entries = fs::read_dir(self.path.join(CHECKPOINTS));
        entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let epoch = name
                    .to_str()?
                    .strip_prefix("model-")?
                    .strip_suffix(".mpk")?;
                epoch.parse().ok()
            })
            .filter(|&epoch| {
                PARTS
                    .iter()
                    .all(|part| self.part(part, epoch).with_extension("mpk").exists())
            })
            .collect()
    }

    fn last_checkpoint(&self) -> Option<usize> {
        self.checkpoints().last().copied()
    }

    fn save_losses(&self, losses: &[EpochLosses]) -> Result<(), TrainError> {
        write_json(&self.path.join(LOSSES), losses)
    }
}

/// Makes the caller the only one that writes to a directory, as [`file::lock`] does.
pub(super) fn lock(directory: &Path) -> Result<File, TrainError> {
    file::lock(directory).map_err(|error| match error {
        TryLockError::WouldBlock => TrainError::InUse(directory.to_owned()),
        TryLockError::Error(source) => TrainError::Write {
            path: directory.join(file::LOCK),
            source,
        },
    })
}

pub(super) fn write_json(path: &Path, value: &(impl Serialize + ?Sized)) -> Result<(), TrainError> {
    serde_json::to_vec_pretty(value)
        .map_err(Into::into)
        .and_then(|json| file::write(path, json))
        .map_err(|source| TrainError::Write {
            path: path.to_owned(),
            source,
        })
}

pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, TrainError> {
    let unreadable = |reason: String| TrainError::Unreadable {
        path: path.to_owned(),
        reason,
    };
    let json = fs::read(path).map_err(|error| unreadable(error.to_string()))?;
    serde_json::from_slice(&json).map_err(|error| unreadable(error.to_string()))
}

/// Checks that what a directory is of is what it is to be.
pub(super) fn check_same(
    directory: &Path,
    found: &impl Serialize,
    expected: &impl Serialize,
) -> Result<(), TrainError> {
    // Through text: numbers of less precision are written shorter.
    let json = |value: &dyn Fn() -> serde_json::Result<String>| -> Result<serde_json::Value, _> {
        value()
            .and_then(|json| serde_json::from_str(&json))
            .map_err(|error: serde_json::Error| TrainError::Unreadable {
                path: directory.to_owned(),
                reason: error.to_string(),
            })
    };
    let found = json(&|| serde_json::to_string(found))?;
    let expected = json(&|| serde_json::to_string(expected))?;
    match difference(&found, &expected) {
        Some((field, found, expected)) => Err(TrainError::OtherRun {
            directory: directory.to_owned(),
            field,
            found,
            expected,
        }),
        None => Ok(()),
    }
}

/// The first setting that differs: its name and both values.
fn difference(
    found: &serde_json::Value,
    expected: &serde_json::Value,
) -> Option<(String, String, String)> {
    use serde_json::Value::{Null, Object};
    if found == expected {
        return None;
    }
    let (Object(a), Object(b)) = (found, expected) else {
        return Some((
            "configuration".into(),
            found.to_string(),
            expected.to_string(),
        ));
    };
    let fields: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    fields.into_iter().find_map(|field| {
        let value = |object: &serde_json::Map<_, _>| object.get(field).cloned().unwrap_or(Null);
        let (a, b) = (value(a), value(b));
        match difference(&a, &b) {
            // A plan's fields mean little alone.
            Some((inner, found, expected)) if a.is_object() && b.is_object() && field != "plan" => {
                Some((format!("{field}.{inner}"), found, expected))
            }
            Some(_) => Some((field.clone(), a.to_string(), b.to_string())),
            None => None,
        }
    })
}

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
        let kept: Vec<EpochLosses> = read(&directory.path().join(LOSSES)).unwrap();
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
