//! Running a comparison: every method with every seed, each finished run kept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use burn::tensor::Element;
use burn::tensor::backend::{AutodiffBackend, Backend};
use serde::{Deserialize, Serialize};

use super::method::Method;
use crate::cache::CacheDtype;
use crate::checkpoint::{SaveOptions, check_vocabulary, save_checkpoint};
use crate::decoder::FusedKvDecoder;
use crate::tokenizer::Tokenizer;
use crate::train::config::TrainingConfig;
use crate::train::data::{HASH, Windows};
use crate::train::directory::{EpochLosses, RunDirectory, check_same, lock, read, write_json};
use crate::train::error::TrainError;
use crate::train::evaluate::{Evaluation, evaluate};
use crate::train::metrics::perplexity;
use crate::train::number;
use crate::train::progress::{Progress, StepReport};
use crate::train::recall::DistanceAccuracy;
use crate::train::repeats::RepeatLoss;
use crate::train::run::Run;
use crate::train::start::train_on;

const RESULT: &str = "result.json";
const COMPARISON: &str = "comparison.json";
const MODEL: &str = "model";

/// Several methods to be trained alike, several seeds each.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// How all are trained; the decoder and the seed are those of each run.
    pub training: TrainingConfig,
    /// What is compared.
    pub methods: Vec<Method>,
    /// Each seeds one run of every method.
    pub seeds: Vec<u64>,
    /// Numbers of caches through which every trained model is evaluated as well.
    pub cache_dtypes: Vec<CacheDtype>,
    /// What the tokens are of, saved with every model.
    pub tokenizer: Option<Tokenizer>,
    /// Where the runs are kept.
    pub directory: PathBuf,
}

/// What one run gave, as kept in its `result.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// The method's name.
    pub method: String,
    /// What was trained, and how.
    pub config: TrainingConfig,
    /// Learned parameters.
    pub parameters: usize,
    /// Bytes that one token takes in a cache of f32.
    pub cache_bytes_per_token: usize,
    /// The epoch, counted from 1, whose loss was not a number, where the run ended; none if it did
    /// not diverge.
    #[serde(default)]
    pub diverged: Option<usize>,
    /// Losses of every epoch.
    pub epochs: Vec<EpochLosses>,
    /// Mean loss of the held-out targets after the last step, in nats; of a run that diverged, the
    /// loss that was not a number.
    #[serde(with = "number")]
    pub valid_loss: f64,
    /// e to the validation loss.
    #[serde(with = "number")]
    pub perplexity: f64,
    /// Tokens read in training.
    pub tokens: usize,
    /// Median over the steps of the tokens read per second; none if no step was timed, as when a
    /// run died after its last one.
    pub tokens_per_second: Option<f64>,
    /// Share of held-out answers that are the most likely token, by distance; empty for text.
    pub accuracy: Vec<DistanceAccuracy>,
    /// Loss of held-out targets by what their windows held before; empty for a recall task, and of a
    /// run that diverged.
    #[serde(default)]
    pub repeats: Vec<RepeatLoss>,
    /// The same model through caches of other numbers.
    #[serde(default)]
    pub cached: Vec<CachedResult>,
}

/// What a trained model gives through a cache that keeps other numbers than the model's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CachedResult {
    /// What the cache keeps.
    pub dtype: CacheDtype,
    /// Bytes that one token takes, scales included.
    pub cache_bytes_per_token: usize,
    /// Loss and recall on the held-out windows.
    pub evaluation: Evaluation,
}

/// What happens during a comparison.
#[derive(Clone, Copy, Debug)]
pub enum RunEvent<'a> {
    /// A run begins, or goes on.
    Started {
        /// The method's name.
        method: &'a str,
        /// The seed.
        seed: u64,
    },
    /// A run has made a step.
    Step(StepReport),
    /// A run is finished, or has diverged.
    Finished {
        /// Its result.
        result: &'a RunResult,
        /// Whether it was finished before, and only read.
        kept: bool,
    },
}

/// A run that is finished or has diverged, and its model where that is at hand.
struct Finished<B: Backend> {
    result: RunResult,
    model: Option<FusedKvDecoder<B>>,
}

impl Comparison {
    /// Trains what is not finished yet and returns all results, method by method, seed by seed.
    ///
    /// A run that was interrupted goes on from its last checkpoint and ends as it would have
    /// without the interruption; the same holds for a comparison. Seeds take turns, so that the
    /// first results show all methods. One that diverges is recorded as such, and the others go on.
    ///
    /// Every model that was trained is saved in `runs/NAME/model`, in Hugging Face's layout.
    ///
    /// Methods, seeds and cache types may be added later: only what is missing is computed.
    ///
    /// # Errors
    /// [`TrainError::OtherRun`] if the directory holds a comparison of other data or settings,
    /// [`TrainError::OlderComparison`] if one of an older version, [`TrainError::InUse`] while another
    /// process, or thread, runs it, [`TrainError::Checkpoint`] if the
    /// tokenizer has more tokens than a decoder, added ones aside, or a model cannot be saved,
    /// [`TrainError::Cache`] if the backend cannot keep a cache of `cache_dtypes`, and whatever
    /// [`train_on`] returns, but for [`TrainError::Diverged`].
    pub fn run<B: AutodiffBackend>(
        &self,
        train: &(impl Windows + Clone + 'static),
        valid: &(impl Windows + Clone + 'static),
        devices: &[B::Device],
        watch: impl Fn(RunEvent<'_>) + Send + Sync + 'static,
    ) -> Result<Vec<RunResult>, TrainError> {
        for (method, config) in self.configs() {
            config.validate()?;
            let vocab_size = config.model.vocab_size;
            train.check_vocabulary(vocab_size)?;
            valid.check_vocabulary(vocab_size)?;
            if let Some(tokenizer) = &self.tokenizer {
                let directory = self.model_directory(method, config.seed);
                check_vocabulary(&directory, tokenizer, vocab_size)?;
            }
        }
        if let Some(device) = devices.first() {
            for dtype in &self.cache_dtypes {
                dtype.check::<B::InnerBackend>(B::FloatElem::dtype(), device)?;
            }
        }
        let _lock = self.claim_directory(&[train.fingerprint(), valid.fingerprint()])?;
        let watch = Arc::new(watch);
        let mut results = Vec::new();
        for (method, config) in self.configs() {
            let directory = self.run_directory(method, config.seed);
            let path = directory.join(RESULT);
            let kept = path.exists();
            let mut run = if kept {
                let result: RunResult = read(&path)?;
                check_same(&directory, &result.config, &config)?;
                let model = None;
                Finished { result, model }
            } else {
                watch(RunEvent::Started {
                    method: &method.name,
                    seed: config.seed,
                });
                let trained = self.train_one::<B>(method, &config, train, valid, devices, &watch);
                trained?
            };
            let mut cached = false;
            if run.result.diverged.is_none() {
                self.save_model(&mut run, &directory, kept, devices)?;
                cached = self.evaluate_caches(&mut run, &directory, valid, devices)?;
            }
            let result = run.result;
            if !kept || cached {
                write_json(&path, &result)?;
            }
            watch(RunEvent::Finished {
                result: &result,
                kept,
            });
            results.push(result);
        }
        let place = |result: &RunResult| {
            let method = |m: &Method| m.name == result.method;
            (self.methods.iter().position(method), result.config.seed)
        };
        results.sort_by_key(place);
        Ok(results)
    }

    fn train_one<B: AutodiffBackend>(
        &self,
        method: &Method,
        config: &TrainingConfig,
        train: &(impl Windows + Clone + 'static),
        valid: &(impl Windows + Clone + 'static),
        devices: &[B::Device],
        watch: &Arc<impl Fn(RunEvent<'_>) + Send + Sync + 'static>,
    ) -> Result<Finished<B::InnerBackend>, TrainError> {
        let times = Arc::new(Mutex::new(Vec::new()));
        let directory = self.run_directory(method, config.seed);
        let run = Run::new(&directory).with_progress(Progress::Quiet);
        let run = {
            let (watch, times) = (watch.clone(), times.clone());
            run.with_observer(move |report| {
                let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
                times.push(Instant::now());
                watch(RunEvent::Step(report));
            })
        };
        let go = |resume| {
            let run = run.clone().with_resume(resume);
            train_on::<B>(config, train.clone(), valid.clone(), &run, devices)
        };
        let trained = match go(true) {
            Err(TrainError::NoCheckpoint(_)) => go(false),
            trained => trained,
        };
        let costs = config.model.costs()?;
        let times = times.lock().unwrap_or_else(PoisonError::into_inner);
        let result = RunResult {
            method: method.name.clone(),
            parameters: costs.parameters(),
            cache_bytes_per_token: costs.cache_bytes_per_token(size_of::<f32>()),
            diverged: None,
            valid_loss: f64::NAN,
            perplexity: f64::NAN,
            tokens: 0,
            tokens_per_second: median_rate(&times, config.tokens_per_step()),
            accuracy: Vec::new(),
            repeats: Vec::new(),
            cached: Vec::new(),
            epochs: Vec::new(),
            config: config.clone(),
        };
        match trained {
            Ok(trained) => {
                let found = evaluate(&trained.model, valid, config.batch_size, None)?;
                let result = RunResult {
                    valid_loss: trained.valid_loss,
                    perplexity: trained.perplexity(),
                    tokens: trained.tokens,
                    accuracy: found.accuracy,
                    repeats: found.repeats,
                    epochs: trained.epochs,
                    ..result
                };
                let model = Some(trained.model);
                Ok(Finished { result, model })
            }
            Err(TrainError::Diverged { epoch, loss }) => {
                let result = RunResult {
                    diverged: Some(epoch),
                    valid_loss: loss,
                    perplexity: perplexity(loss),
                    tokens: config.tokens_until(epoch),
                    epochs: RunDirectory::losses(&directory)?,
                    ..result
                };
                let model = None;
                Ok(Finished { result, model })
            }
            Err(error) => Err(error),
        }
    }

    /// Saves the model of a run where others can load it. One of a run that was finished before is
    /// saved if it is not there yet, from the run's last checkpoint if that still is.
    fn save_model<B: Backend>(
        &self,
        run: &mut Finished<B>,
        directory: &Path,
        kept: bool,
        devices: &[B::Device],
    ) -> Result<(), TrainError> {
        let path = directory.join(MODEL);
        if kept && path.exists() {
            return Ok(());
        }
        let mut options = SaveOptions::new();
        if let Some(tokenizer) = &self.tokenizer {
            options = options
                .with_eos(tokenizer.end_of_text().into_iter().collect())
                .with_tokenizer(tokenizer.clone());
        }
        match run.load_model(directory, devices) {
            Ok(Some(model)) => Ok(save_checkpoint(path, model, &options)?),
            Ok(None) | Err(TrainError::NoCheckpoint(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Adds what a result has not got of `cache_dtypes`, in their order, and says whether any was.
    fn evaluate_caches<B: Backend>(
        &self,
        run: &mut Finished<B>,
        directory: &Path,
        valid: &impl Windows,
        devices: &[B::Device],
    ) -> Result<bool, TrainError> {
        let known: Vec<_> = run.result.cached.iter().map(|c| c.dtype).collect();
        let mut missing = self.cache_dtypes.clone();
        missing.retain(|dtype| !known.contains(dtype));
        if missing.is_empty() {
            return Ok(false);
        }
        let Some(model) = run.load_model(directory, devices)?.cloned() else {
            return Ok(false);
        };
        for dtype in missing {
            let cache = model.new_cache_of(dtype, 1, 1)?;
            let batch_size = run.result.config.batch_size;
            run.result.cached.push(CachedResult {
                dtype,
                cache_bytes_per_token: cache.bytes_allocated(),
                evaluation: evaluate(&model, valid, batch_size, Some(dtype))?,
            });
        }
        Ok(true)
    }

    fn configs(&self) -> impl Iterator<Item = (&Method, TrainingConfig)> {
        self.seeds.iter().flat_map(move |&seed| {
            self.methods.iter().map(move |method| {
                let config = TrainingConfig {
                    model: method.model.clone(),
                    seed,
                    ..self.training.clone()
                };
                (method, config)
            })
        })
    }

    /// Whether a directory holds a comparison, finished or not.
    pub fn exists(directory: impl AsRef<Path>) -> bool {
        directory.as_ref().join(COMPARISON).exists()
    }

    /// Where the model of a run is saved when it is trained.
    pub fn model_directory(&self, method: &Method, seed: u64) -> PathBuf {
        self.run_directory(method, seed).join(MODEL)
    }

    fn run_directory(&self, method: &Method, seed: u64) -> PathBuf {
        let name = format!("{}-seed-{seed}", method.slug());
        self.directory.join("runs").join(name)
    }

    /// Locks the directory and marks it with what is compared, or checks that it is marked so.
    ///
    /// Methods and seeds may be added to a comparison; data and training stay.
    fn claim_directory(&self, data: &[u64; 2]) -> Result<File, TrainError> {
        fs::create_dir_all(&self.directory).map_err(|source| TrainError::Write {
            path: self.directory.clone(),
            source,
        })?;
        let lock = lock(&self.directory)?;
        let training = TrainingConfig {
            model: self.training.model.clone(),
            seed: 0,
            ..self.training.clone()
        };
        let mark = serde_json::json!({ "training": training, "hash": HASH, "data": data });
        let path = self.directory.join(COMPARISON);
        if path.exists() {
            let found: serde_json::Value = read(&path)?;
            if found["hash"] != HASH {
                return Err(TrainError::OlderComparison(self.directory.clone()));
            }
            check_same(&self.directory, &found, &mark)?;
            return Ok(lock);
        }
        write_json(&path, &mark)?;
        Ok(lock)
    }
}

impl<B: Backend> Finished<B> {
    /// The model, read from the run's last checkpoint if it is not at hand; none without a device.
    fn load_model(
        &mut self,
        directory: &Path,
        devices: &[B::Device],
    ) -> Result<Option<&FusedKvDecoder<B>>, TrainError> {
        if let (None, Some(device)) = (&self.model, devices.first()) {
            self.model = Some(Run::new(directory).last(device)?.0);
        }
        Ok(self.model.as_ref())
    }
}

/// Tokens per second of the median step: validations between steps do not count.
fn median_rate(times: &[Instant], tokens_per_step: usize) -> Option<f64> {
    let mut steps: Vec<f64> = times
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64())
        .collect();
    steps.sort_by(f64::total_cmp);
    let median = steps.get(steps.len() / 2)?;
    Some(tokens_per_step as f64 / median)
}
