//! The directory of a run: whose it is, its configuration, data and losses so far, and where its
//! checkpoints are.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::config::config_to_json;
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
pub(super) const PARTS: [&str; 3] = ["model", "optim", "scheduler"];

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
    pub fn checkpoints(&self) -> BTreeSet<usize> {
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

    pub fn save_losses(&self, losses: &[EpochLosses]) -> Result<(), TrainError> {
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
    let [found, expected] = [as_read(directory, found)?, as_read(directory, expected)?];
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

/// A value as it is read back from JSON: numbers of less precision are written shorter.
fn as_read(directory: &Path, value: &impl Serialize) -> Result<serde_json::Value, TrainError> {
    serde_json::to_string(value)
        .and_then(|json| serde_json::from_str(&json))
        .map_err(|error| TrainError::Unreadable {
            path: directory.to_owned(),
            reason: error.to_string(),
        })
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
