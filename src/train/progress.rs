//! Progress as plain lines, for logs and pipes. On a terminal Burn draws its own interface.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn_train::metric::{MetricDefinition, MetricId, NumericEntry};
use burn_train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};

use super::config::TrainingConfig;
use super::loader::Schedule;
use super::metrics::{DivergenceMetric, TokenLosses, perplexity};
use super::plan_losses::ByPlan;

/// Where progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Progress {
    /// Burn's interface if standard output is a terminal and the feature `tui` is on, otherwise
    /// [`Plain`](Self::Plain).
    #[default]
    Auto,
    /// A line every few seconds, on standard output.
    Plain,
    /// Nowhere.
    Quiet,
}

/// A step that a training has made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The step, counted from 1; after a resumption from where the run stood.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// Mean loss of the step's targets before it, in nats.
    pub loss: f64,
}

/// Someone who is told of every step.
#[derive(Clone)]
pub(super) struct Observer(pub Arc<dyn Fn(StepReport) + Send + Sync>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// Prints a line every so often, and one after each validation.
///
/// Burn's own renderer for anything but a terminal prints every iteration, and no metric.
pub(super) struct PlainRenderer<W> {
    output: W,
    steps: usize,
    tokens_per_step: usize,
    /// Parts of a step that are told of one by one.
    parts: usize,
    schedule: Schedule,
    interval: Duration,
    names: HashMap<MetricId, String>,
    /// Since the last line.
    train: TokenLosses,
    /// Since the last line, where there is a teacher.
    divergence: TokenLosses,
    /// Since the last training step.
    valid: TokenLosses,
    /// As `valid`.
    by_plan: ByPlan,
    learning_rate: f64,
    /// Of the parts of the step under way.
    step: TokenLosses,
    observer: Option<Observer>,
    started: Option<Point>,
    last: Option<Point>,
}

/// A step and when it ended.
#[derive(Clone, Copy)]
struct Point {
    step: usize,
    time: Instant,
}

impl<W: Write + Send + Sync> PlainRenderer<W> {
    pub fn new(output: W, config: &TrainingConfig, parts: usize, interval: Duration) -> Self {
        Self {
            output,
            steps: config.steps,
            tokens_per_step: config.tokens_per_step(),
            parts,
            schedule: Schedule::new(config),
            interval,
            names: HashMap::new(),
            train: TokenLosses::NONE,
            divergence: TokenLosses::NONE,
            valid: TokenLosses::NONE,
            by_plan: ByPlan::new(config.routing.as_ref()),
            learning_rate: f64::NAN,
            step: TokenLosses::NONE,
            observer: None,
            started: None,
            last: None,
        }
    }

    /// Tells `observer` of every step.
    pub fn with_observer(self, observer: Option<Observer>) -> Self {
        Self { observer, ..self }
    }

    fn step_of(&self, progress: &TrainingProgress) -> usize {
        let epoch = progress.global_progress.items_processed;
        let part = progress.iteration.unwrap_or(0);
        self.schedule.steps_until(epoch - 1) + part.div_ceil(self.parts)
    }

    /// The metric that is told of, by its name, its value and that value's weight.
    fn metric(names: &HashMap<MetricId, String>, state: MetricState) -> (&str, f64, usize) {
        let MetricState::Numeric(entry, value) = state else {
            return ("", f64::NAN, 0);
        };
        let name = names.get(&entry.metric_id).map_or("", String::as_str);
        let weight = match value {
            NumericEntry::Value(_) => 1,
            NumericEntry::Aggregated { count, .. } => count,
        };
        (name, value.current(), weight)
    }

    fn line(&mut self, step: usize, now: Instant) -> io::Result<()> {
        let loss = self.train.mean;
        write!(
            self.output,
            "step {step:>5}/{}  loss {loss:.4}  perplexity {:.2}",
            self.steps,
            perplexity(loss),
        )?;
        if self.divergence.tokens > 0 {
            write!(self.output, "  divergence {:.4}", self.divergence.mean)?;
        }
        write!(self.output, "  lr {:.2e}", self.learning_rate)?;
        if let Some((rate, left)) = self.rate(step, now) {
            let left = left.as_secs();
            let (minutes, seconds) = (left / 60, left % 60);
            write!(
                self.output,
                "  {rate:.0} tokens/s  {minutes}:{seconds:02} left"
            )?;
        }
        writeln!(self.output)?;
        self.output.flush()
    }

    /// Tokens per second since the last line, and the time left at the pace since the start.
    fn rate(&self, step: usize, now: Instant) -> Option<(f64, Duration)> {
        let rate = |since: Point| {
            let steps = step.checked_sub(since.step).filter(|&steps| steps > 0)?;
            Some(steps as f64 / (now - since.time).as_secs_f64())
        };
        let pace = rate(self.started?)?;
        let left = (self.steps - step) as f64 / pace;
        let tokens = rate(self.last?)? * self.tokens_per_step as f64;
        Some((tokens, Duration::try_from_secs_f64(left).ok()?))
    }
}

impl<W: Write + Send + Sync> MetricsRendererTraining for PlainRenderer<W> {
    fn update_train(&mut self, state: MetricState) {
        match Self::metric(&self.names, state) {
            ("Loss", mean, tokens) => {
                let part = TokenLosses { mean, tokens };
                self.train = self.train.joined(part);
                self.step = self.step.joined(part);
                self.valid = TokenLosses::NONE;
            }
            (DivergenceMetric::NAME, mean, tokens) => {
                self.divergence = self.divergence.joined(TokenLosses { mean, tokens });
            }
            ("Learning Rate", rate, _) => self.learning_rate = rate,
            _ => {}
        }
    }

    fn update_valid(&mut self, state: MetricState) {
        let (name, mean, tokens) = Self::metric(&self.names, state);
        let losses = TokenLosses { mean, tokens };
        match name {
            "Loss" => self.valid = self.valid.joined(losses),
            name => self.by_plan.add(name, losses),
        }
    }

    fn render_train(&mut self, progress: TrainingProgress, _: Vec<ProgressType>) {
        let part = progress.iteration.unwrap_or(0);
        if !part.is_multiple_of(self.parts) {
            return;
        }
        let now = Instant::now();
        let step = self.step_of(&progress);
        let losses = std::mem::replace(&mut self.step, TokenLosses::NONE);
        if let Some(Observer(observer)) = &self.observer {
            observer(StepReport {
                step,
                steps: self.steps,
                loss: losses.mean,
            });
        }
        let here = Point { step, time: now };
        let started = self.started.is_some();
        if started && step < self.steps && self.last.is_some_and(|l| now - l.time < self.interval) {
            return;
        }
        // A closed pipe must not end a training.
        let _ = self.line(step, now);
        self.started.get_or_insert(here);
        self.last = Some(here);
        self.train = TokenLosses::NONE;
        self.divergence = TokenLosses::NONE;
    }

    fn render_valid(&mut self, progress: TrainingProgress, _: Vec<ProgressType>) {
        let items = progress.progress.as_ref();
        if items.is_some_and(|items| items.items_processed < items.items_total) {
            return;
        }
        let epoch = &progress.global_progress;
        let loss = self.valid.mean;
        let _ = writeln!(
            self.output,
            "epoch {}/{}  validation loss {loss:.4}  perplexity {:.2}",
            epoch.items_processed,
            epoch.items_total,
            perplexity(loss),
        );
        for (plan, loss) in self.by_plan.take() {
            let _ = writeln!(self.output, "  {plan:<27} loss {loss:.4}");
        }
    }
}

impl<W: Write + Send + Sync> MetricsRendererEvaluation for PlainRenderer<W> {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}

    fn render_test(&mut self, _: EvaluationProgress, _: Vec<ProgressType>) {}
}

impl<W: Write + Send + Sync> MetricsRenderer for PlainRenderer<W> {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names.insert(definition.metric_id, definition.name);
    }
}
