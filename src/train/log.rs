//! A run's log: one JSON object a line, which other programs read.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, LineWriter, Write};
use std::path::Path;

use burn_train::Interrupter;
use burn_train::logger::MetricLogger;
use burn_train::metric::store::{EpochSummary, MetricsUpdate, NumericMetricUpdate, Split};
use burn_train::metric::{MetricDefinition, MetricId, NumericEntry};
use serde::{Deserialize, Serialize};

use super::config::TrainingConfig;
use super::gradients::GradientNorms;
use super::loader::Schedule;
use super::metrics::{DivergenceMetric, StepEnds, TokenLosses, perplexity};
use super::number;
use super::plan_losses::ByPlan;
use crate::file;

/// A line of a run's `metrics.jsonl`: a training step, or a validation. Numbers that are infinite or
/// none are texts, `"inf"`, `"-inf"` and `"NaN"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "split", rename_all = "lowercase")]
pub enum LogLine {
    /// After a step.
    Train {
        /// The epoch, counted from 1.
        epoch: usize,
        /// The step, counted from 1 over all epochs.
        step: usize,
        /// Tokens read since the first step.
        tokens: usize,
        /// Mean loss of the step's targets before it, in nats.
        #[serde(with = "number")]
        loss: f64,
        /// The plan of a [routing](super::Routing) that the step was made under, by its place, counted
        /// from 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        plan: Option<usize>,
        /// Mean KL(teacher ‖ student) of the same targets, in nats, where there is a teacher.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        divergence: Option<f64>,
        /// What the step's update was made with.
        #[serde(with = "number")]
        learning_rate: f64,
        /// Since the step before; an epoch's first one includes the validation before it.
        #[serde(with = "number")]
        tokens_per_second: f64,
        /// Before they are clipped.
        gradient_norms: Option<GradientNorms>,
        /// Resident memory of the process in MiB, where the system tells it.
        memory_mib: Option<f64>,
    },
    /// After an epoch.
    Valid {
        /// The epoch, counted from 1.
        epoch: usize,
        /// Steps until then.
        step: usize,
        /// Tokens read since the first step.
        tokens: usize,
        /// Mean loss of the held-out targets, in nats.
        #[serde(with = "number")]
        loss: f64,
        /// e to the loss.
        #[serde(with = "number")]
        perplexity: f64,
        /// The loss under each plan of a [routing](super::Routing), whose mean by the plans' weights
        /// `loss` then is.
        #[serde(default, with = "number::list", skip_serializing_if = "Vec::is_empty")]
        plans: Vec<f64>,
    },
}

impl LogLine {
    fn epoch(&self) -> usize {
        match self {
            Self::Train { epoch, .. } | Self::Valid { epoch, .. } => *epoch,
        }
    }
}

/// Drops what a resumed run writes again: the lines after `epoch`, and one cut short by a kill.
pub(super) fn keep_until(path: &Path, epoch: usize) -> io::Result<()> {
    let log = match fs::read_to_string(path) {
        Ok(log) => log,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let kept =
        |line: &&str| serde_json::from_str::<LogLine>(line).is_ok_and(|line| line.epoch() <= epoch);
    let kept: String = log.split_inclusive('\n').filter(kept).collect();
    file::write(path, kept)
}

/// Writes a [`LogLine`] per step and validation.
pub(super) struct JsonLines {
    file: LineWriter<File>,
    names: HashMap<MetricId, String>,
    schedule: Schedule,
    tokens_per_step: usize,
    /// The epoch under way: Burn's count starts over when a run is resumed.
    epoch: usize,
    /// Its steps, of whose parts metrics are told one by one.
    step: StepEnds,
    train: TokenLosses,
    divergence: TokenLosses,
    valid: TokenLosses,
    by_plan: ByPlan,
    interrupter: Interrupter,
}

impl JsonLines {
    /// Appends to the file of a run of which `done` epochs are finished.
    pub fn open(
        path: &Path,
        config: &TrainingConfig,
        done: usize,
        parts: usize,
        interrupter: Interrupter,
    ) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self {
            file: LineWriter::new(file),
            names: HashMap::new(),
            schedule: Schedule::new(config),
            tokens_per_step: config.tokens_per_step(),
            epoch: done + 1,
            step: StepEnds::new(parts),
            train: TokenLosses::NONE,
            divergence: TokenLosses::NONE,
            valid: TokenLosses::NONE,
            by_plan: ByPlan::new(config.routing.as_ref()),
            interrupter,
        })
    }

    fn metric<'u>(&self, update: &'u MetricsUpdate, name: &str) -> Option<&'u NumericMetricUpdate> {
        let mut numbers = update.entries_numeric.iter();
        numbers.find(|number| {
            let found = self.names.get(&number.entry.metric_id);
            found.is_some_and(|found| found == name)
        })
    }

    fn loss(&self, update: &MetricsUpdate, name: &str) -> TokenLosses {
        let loss = self.metric(update, name);
        loss.map_or(TokenLosses::NONE, |loss| TokenLosses {
            mean: loss.numeric_entry.current(),
            tokens: match loss.numeric_entry {
                NumericEntry::Value(_) => 1,
                NumericEntry::Aggregated { count, .. } => count,
            },
        })
    }

    fn train_line(&mut self, update: &MetricsUpdate) -> LogLine {
        let step = self.schedule.steps_until(self.epoch - 1) + self.step.steps();
        let number = |name| {
            let found = self.metric(update, name);
            found.map(|found| found.numeric_entry.current())
        };
        let line = LogLine::Train {
            epoch: self.epoch,
            step,
            tokens: step * self.tokens_per_step,
            loss: self.train.mean,
            plan: self.schedule.plan(step - 1),
            divergence: (self.divergence.tokens > 0).then_some(self.divergence.mean),
            learning_rate: number("Learning Rate").unwrap_or(f64::NAN),
            tokens_per_second: number("Tokens per second").unwrap_or(f64::NAN),
            gradient_norms: self.metric(update, "Gradient norm").and_then(|norm| {
                serde_json::from_str(&norm.entry.serialized_entry.serialized).ok()
            }),
            memory_mib: number("Memory"),
        };
        self.train = TokenLosses::NONE;
        self.divergence = TokenLosses::NONE;
        line
    }

    fn write(&mut self, line: &LogLine) {
        let written = serde_json::to_string(line)
            .map_err(io::Error::from)
            .and_then(|json| writeln!(self.file, "{json}"));
        if let Err(error) = written {
            self.interrupter
                .stop(Some(&format!("the log cannot be written: {error}")));
        }
    }
}

impl MetricLogger for JsonLines {
    fn log(&mut self, update: MetricsUpdate, _epoch: usize, split: &Split) {
        let loss = self.loss(&update, "Loss");
        if *split == Split::Valid {
            self.valid = self.valid.joined(loss);
            for name in self.by_plan.names() {
                let loss = self.loss(&update, &name);
                self.by_plan.add(&name, loss);
            }
            return;
        }
        self.train = self.train.joined(loss);
        let divergence = self.loss(&update, DivergenceMetric::NAME);
        self.divergence = self.divergence.joined(divergence);
        if self.step.ends() {
            let line = self.train_line(&update);
            self.write(&line);
        }
    }

    /// Nothing reads the log back: best epochs and early stopping go by the run's losses.
    fn read_numeric(
        &mut self,
        _name: &str,
        _epoch: usize,
        _split: &Split,
    ) -> Result<Vec<NumericEntry>, String> {
        Ok(Vec::new())
    }

    fn log_metric_definition(&mut self, definition: MetricDefinition) {
        self.names.insert(definition.metric_id, definition.name);
    }

    fn log_epoch_summary(&mut self, summary: EpochSummary) {
        if summary.split != Split::Valid {
            return;
        }
        let step = self.schedule.steps_until(self.epoch);
        let loss = std::mem::replace(&mut self.valid, TokenLosses::NONE).mean;
        let plans = self.by_plan.take().into_iter();
        // A validation that was stopped has read some of the windows.
        if !self.interrupter.should_stop() {
            self.write(&LogLine::Valid {
                epoch: self.epoch,
                step,
                tokens: step * self.tokens_per_step,
                loss,
                perplexity: perplexity(loss),
                plans: plans.map(|(_, loss)| loss).collect(),
            });
        }
        self.epoch += 1;
        self.step.restart();
    }
}
