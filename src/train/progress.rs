//! Progress as plain lines, for logs and pipes.
//!
//! burn-train shows a terminal UI where there is a terminal; elsewhere it prints a debug line per
//! iteration, which this replaces.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use burn_train::metric::{MetricDefinition, MetricId, NumericEntry};
use burn_train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};

/// Prints a line every few seconds of training and one per validation.
pub(super) struct PlainProgress {
    epoch_steps: usize,
    total_steps: usize,
    step_tokens: usize,
    names: HashMap<MetricId, String>,
    values: HashMap<String, f64>,
    /// When the first step of this process was done, and its number.
    start: Option<(Instant, usize)>,
    printed: Instant,
    validated: Option<usize>,
}

const EVERY: Duration = Duration::from_secs(5);

impl PlainProgress {
    pub fn new(epoch_steps: usize, total_steps: usize, step_tokens: usize) -> Self {
        Self {
            epoch_steps,
            total_steps,
            step_tokens,
            names: HashMap::new(),
            values: HashMap::new(),
            start: None,
            printed: Instant::now(),
            validated: None,
        }
    }

    fn keep(&mut self, state: MetricState) {
        let MetricState::Numeric(entry, value) = state else {
            return;
        };
        if let Some(name) = self.names.get(&entry.metric_id) {
            let value = match value {
                NumericEntry::Value(value) => value,
                NumericEntry::Aggregated {
                    aggregated_value, ..
                } => aggregated_value,
            };
            self.values.insert(name.clone(), value);
        }
    }

    fn value(&self, name: &str) -> f64 {
        self.values.get(name).copied().unwrap_or(f64::NAN)
    }
}

impl MetricsRendererTraining for PlainProgress {
    fn update_train(&mut self, state: MetricState) {
        self.keep(state);
    }

    fn update_valid(&mut self, state: MetricState) {
        self.keep(state);
    }

    fn render_train(&mut self, item: TrainingProgress, _indicators: Vec<ProgressType>) {
        let iteration = item.iteration.unwrap_or(0);
        let epoch = item.global_progress.items_processed;
        let step = epoch.saturating_sub(1) * self.epoch_steps + iteration;
        let (start, first) = *self.start.get_or_insert((Instant::now(), step));
        if self.printed.elapsed() < EVERY && step != self.total_steps {
            return;
        }
        self.printed = Instant::now();
        let seconds = start.elapsed().as_secs_f64() / (step - first).max(1) as f64;
        println!(
            "step {step:>5}/{}  loss {:.3}  lr {:.2e}  {:.0} tokens/s  {:.0} s left",
            self.total_steps,
            self.value("Loss"),
            self.value("Learning Rate"),
            self.step_tokens as f64 / seconds,
            seconds * self.total_steps.saturating_sub(step) as f64,
        );
    }

    /// A line when the epoch's last batch is in.
    fn render_valid(&mut self, item: TrainingProgress, _indicators: Vec<ProgressType>) {
        let epoch = item.global_progress.items_processed;
        let done = item
            .progress
            .is_none_or(|progress| progress.items_processed >= progress.items_total);
        if done && self.validated != Some(epoch) {
            self.validated = Some(epoch);
            println!(
                "validation {epoch}/{}  perplexity {:.2}",
                item.global_progress.items_total,
                self.value("Perplexity"),
            );
        }
    }
}

impl MetricsRendererEvaluation for PlainProgress {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}

    fn render_test(&mut self, _item: EvaluationProgress, _indicators: Vec<ProgressType>) {}
}

impl MetricsRenderer for PlainProgress {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names.insert(definition.metric_id, definition.name);
    }
}
