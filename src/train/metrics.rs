//! Metrics Burn does not have, or computes from all logits.

use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use burn::tensor::backend::Backend;

use burn_train::metric::state::{FormatOptions, NumericMetricState};
use burn_train::metric::{
    Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
    SerializedEntry, format_float,
};

use super::gradients::{GradientNorms, Squares};

/// The loss of some targets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLosses {
    /// Mean negative log-likelihood in nats; not a number if there are none.
    pub mean: f64,
    /// How many targets it is the mean of.
    pub tokens: usize,
}

/// e to a mean negative log-likelihood in nats.
///
/// ```
/// use fusedkv::train::perplexity;
///
/// // A model that finds 50 tokens equally likely.
/// assert!((perplexity(50f64.ln()) - 50.0).abs() < 1e-9);
/// ```
pub fn perplexity(mean_loss: f64) -> f64 {
    mean_loss.exp()
}

impl TokenLosses {
    /// Of no target.
    pub(super) const NONE: Self = Self {
        mean: f64::NAN,
        tokens: 0,
    };

    /// Both together, every target counting alike.
    pub(super) fn joined(self, other: Self) -> Self {
        let tokens = self.tokens + other.tokens;
        if tokens == 0 {
            return Self::NONE;
        }
        let part = |part: Self| match part.tokens {
            0 => 0.0,
            n => part.mean * n as f64 / tokens as f64,
        };
        Self {
            mean: part(self) + part(other),
            tokens,
        }
    }
}

/// What some targets' losses come to: of the last batch, and of all since the epoch's start.
#[derive(Clone, Copy, Debug)]
struct Losses {
    last: TokenLosses,
    epoch: TokenLosses,
}

impl Losses {
    const NONE: Self = Self {
        last: TokenLosses::NONE,
        epoch: TokenLosses::NONE,
    };

    /// Takes in a batch and formats what `of` makes of both means.
    fn update(&mut self, losses: TokenLosses, of: fn(f64) -> f64) -> SerializedEntry {
        self.last = losses;
        self.epoch = self.epoch.joined(losses);
        let [epoch, batch] = [self.epoch, self.last].map(|l| format_float(of(l.mean), 2));
        let serialized = entry(self.last, of).serialize();
        SerializedEntry::new(format!("epoch {epoch} - batch {batch}"), serialized)
    }
}

fn entry(losses: TokenLosses, of: fn(f64) -> f64) -> NumericEntry {
    NumericEntry::Aggregated {
        aggregated_value: of(losses.mean),
        count: losses.tokens,
    }
}

/// Mean negative log-likelihood in nats, every target that counts counting alike.
///
/// Burn's own weighs windows alike, whatever number of their targets count.
#[derive(Clone, Debug)]
pub struct LossMetric {
    name: MetricName,
    losses: Losses,
    report: Option<Sender<f64>>,
}

impl LossMetric {
    /// The metric.
    pub fn new() -> Self {
        Self {
            name: Arc::new("Loss".to_owned()),
            losses: Losses::NONE,
            report: None,
        }
    }

    /// Sends the mean loss of an epoch when it has ended.
    pub(super) fn reporting(report: Sender<f64>) -> Self {
        Self {
            report: Some(report),
            ..Self::new()
        }
    }

    /// The same under another name.
    pub(super) fn named(self, name: String) -> Self {
        Self {
            name: Arc::new(name),
            ..self
        }
    }
}

impl Default for LossMetric {
    fn default() -> Self {
        Self::new()
    }
}

impl Metric for LossMetric {
    type Input = TokenLosses;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        lower_is_better()
    }

    fn update(&mut self, losses: &TokenLosses, _metadata: &MetricMetadata) -> SerializedEntry {
        self.losses.update(*losses, std::convert::identity)
    }

    fn clear(&mut self) {
        if let Some(report) = &self.report {
            // Nobody listens once training is over.
            let _ = report.send(self.losses.epoch.mean);
        }
        self.losses = Losses::NONE;
    }
}

impl Numeric for LossMetric {
    fn value(&self) -> NumericEntry {
        entry(self.losses.last, std::convert::identity)
    }

    fn running_value(&self) -> NumericEntry {
        entry(self.losses.epoch, std::convert::identity)
    }
}

/// KL(teacher ‖ student) of some targets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Divergence(pub TokenLosses);

/// Mean KL(teacher ‖ student) in nats, every target that counts counting alike.
#[derive(Clone, Debug)]
pub(super) struct DivergenceMetric {
    name: MetricName,
    losses: Losses,
}

impl DivergenceMetric {
    pub const NAME: &str = "Divergence";

    pub fn new() -> Self {
        Self {
            name: Arc::new(Self::NAME.to_owned()),
            losses: Losses::NONE,
        }
    }
}

impl Metric for DivergenceMetric {
    type Input = Divergence;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        lower_is_better()
    }

    fn update(&mut self, losses: &Divergence, _metadata: &MetricMetadata) -> SerializedEntry {
        self.losses.update(losses.0, std::convert::identity)
    }

    fn clear(&mut self) {
        self.losses = Losses::NONE;
    }
}

impl Numeric for DivergenceMetric {
    fn value(&self) -> NumericEntry {
        entry(self.losses.last, std::convert::identity)
    }

    fn running_value(&self) -> NumericEntry {
        entry(self.losses.epoch, std::convert::identity)
    }
}

/// Perplexity: e to the mean negative log-likelihood, every target that counts counting alike.
///
/// Burn's own takes all logits to the CPU and normalises them again.
#[derive(Clone, Debug)]
pub struct PerplexityMetric {
    name: MetricName,
    losses: Losses,
}

impl PerplexityMetric {
    /// The metric.
    pub fn new() -> Self {
        Self {
            name: Arc::new("Perplexity".to_owned()),
            losses: Losses::NONE,
        }
    }
}

impl Default for PerplexityMetric {
    fn default() -> Self {
        Self::new()
    }
}

impl Metric for PerplexityMetric {
    type Input = TokenLosses;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        lower_is_better()
    }

    fn update(&mut self, losses: &TokenLosses, _metadata: &MetricMetadata) -> SerializedEntry {
        self.losses.update(*losses, perplexity)
    }

    fn clear(&mut self) {
        self.losses = Losses::NONE;
    }
}

impl Numeric for PerplexityMetric {
    fn value(&self) -> NumericEntry {
        entry(self.losses.last, perplexity)
    }

    fn running_value(&self) -> NumericEntry {
        entry(self.losses.epoch, perplexity)
    }
}

/// Tokens read per second, from one step to the next; an epoch's first step includes the validation
/// before it.
#[derive(Clone)]
pub struct TokenRateMetric {
    name: MetricName,
    state: NumericMetricState,
    step: StepEnds,
    tokens_per_step: usize,
    last: Instant,
}

impl TokenRateMetric {
    /// Of steps that read so many tokens in so many parts: those of accumulated gradients, times
    /// devices. A metric is told of every part.
    pub fn new(tokens_per_step: usize, parts: usize) -> Self {
        Self {
            name: Arc::new("Tokens per second".to_owned()),
            state: NumericMetricState::default(),
            step: StepEnds::new(parts),
            tokens_per_step,
            last: Instant::now(),
        }
    }
}

impl Metric for TokenRateMetric {
    type Input = ();

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn update(&mut self, (): &(), _metadata: &MetricMetadata) -> SerializedEntry {
        if self.step.ends() {
            let now = Instant::now();
            let rate = self.tokens_per_step as f64 / (now - self.last).as_secs_f64();
            self.last = now;
            let format = FormatOptions::new(self.name()).precision(0);
            return self.state.update(rate, 1, format);
        }
        unchanged(&self.state)
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for TokenRateMetric {
    fn value(&self) -> NumericEntry {
        self.state.current_value()
    }

    fn running_value(&self) -> NumericEntry {
        self.state.running_value()
    }
}

/// Tells the last part of a step from those before it.
#[derive(Clone, Debug)]
pub(super) struct StepEnds {
    parts: usize,
    seen: usize,
}

impl StepEnds {
    pub fn new(parts: usize) -> Self {
        Self { parts, seen: 0 }
    }

    /// Whether the part that is told of now is a step's last.
    pub fn ends(&mut self) -> bool {
        self.seen += 1;
        self.seen.is_multiple_of(self.parts)
    }

    /// How many steps have ended.
    pub fn steps(&self) -> usize {
        self.seen / self.parts
    }

    /// Counts from the start.
    pub fn restart(&mut self) {
        self.seen = 0;
    }
}

/// The entry of a part that changes nothing.
fn unchanged(state: &NumericMetricState) -> SerializedEntry {
    let value = state.current_value();
    SerializedEntry::new(format_float(value.current(), 2), value.serialize())
}

/// Norm of all gradients before they are clipped; its serialised form is that of [`GradientNorms`],
/// layer by layer.
#[derive(Clone)]
pub(super) struct GradientNormMetric<B: Backend> {
    name: MetricName,
    state: NumericMetricState,
    step: StepEnds,
    /// One of every step, sent before the metrics are told of its last part.
    squares: Arc<Mutex<Receiver<Squares<B>>>>,
    /// Sum over the epoch's steps, and their number.
    sum: Option<GradientNorms>,
    steps: usize,
    report: Sender<Option<GradientNorms>>,
}

impl<B: Backend> GradientNormMetric<B> {
    /// Reports the mean over an epoch's steps when it has ended.
    pub fn new(
        squares: Receiver<Squares<B>>,
        parts: usize,
        report: Sender<Option<GradientNorms>>,
    ) -> Self {
        Self {
            name: Arc::new("Gradient norm".to_owned()),
            state: NumericMetricState::default(),
            step: StepEnds::new(parts),
            squares: Arc::new(Mutex::new(squares)),
            sum: None,
            steps: 0,
            report,
        }
    }

    fn receive(&self) -> Option<GradientNorms> {
        let squares = self.squares.lock().unwrap_or_else(PoisonError::into_inner);
        Some(squares.try_recv().ok()?.norms())
    }
}

impl<B: Backend> Metric for GradientNormMetric<B> {
    type Input = ();

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        lower_is_better()
    }

    fn update(&mut self, (): &(), _metadata: &MetricMetadata) -> SerializedEntry {
        if !self.step.ends() {
            return unchanged(&self.state);
        }
        let Some(norms) = self.receive() else {
            return unchanged(&self.state);
        };
        let format = FormatOptions::new(self.name()).precision(3);
        let entry = self.state.update(norms.all, 1, format);
        let serialized = serde_json::to_string(&norms).unwrap_or_default();
        self.steps += 1;
        self.sum = Some(match self.sum.take() {
            Some(sum) => sum.plus(&norms),
            None => norms,
        });
        SerializedEntry::new(entry.formatted, serialized)
    }

    fn clear(&mut self) {
        let steps = std::mem::take(&mut self.steps);
        let mean = self.sum.take().map(|sum| sum.divided_by(steps as f64));
        // Nobody listens once training is over.
        let _ = self.report.send(mean);
        self.state.reset();
    }
}

impl<B: Backend> Numeric for GradientNormMetric<B> {
    fn value(&self) -> NumericEntry {
        self.state.current_value()
    }

    fn running_value(&self) -> NumericEntry {
        self.state.running_value()
    }
}

/// Memory of the process in MiB, where the system tells it.
#[derive(Clone)]
pub(super) struct MemoryMetric {
    name: MetricName,
    state: NumericMetricState,
}

impl MemoryMetric {
    /// None where the system does not tell.
    pub fn new() -> Option<Self> {
        resident_mib()?;
        Some(Self {
            name: Arc::new("Memory".to_owned()),
            state: NumericMetricState::default(),
        })
    }
}

impl Metric for MemoryMetric {
    type Input = ();

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: Some("MiB".to_owned()),
            higher_is_better: false,
        }
        .into()
    }

    fn update(&mut self, (): &(), _metadata: &MetricMetadata) -> SerializedEntry {
        let mib = resident_mib().unwrap_or(f64::NAN);
        let format = FormatOptions::new(self.name()).unit("MiB").precision(0);
        self.state.update(mib, 1, format)
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for MemoryMetric {
    fn value(&self) -> NumericEntry {
        self.state.current_value()
    }

    fn running_value(&self) -> NumericEntry {
        self.state.running_value()
    }
}

/// What of the process's memory is resident.
fn resident_mib() -> Option<f64> {
    let memory = memory_stats::memory_stats()?;
    Some(memory.physical_mem as f64 / f64::from(1 << 20))
}

fn lower_is_better() -> MetricAttributes {
    NumericAttributes {
        unit: None,
        higher_is_better: false,
    }
    .into()
}

#[cfg(test)]
mod tests {
    use burn::data::dataloader::Progress;

    use super::*;

    fn metadata() -> MetricMetadata {
        MetricMetadata {
            progress: Progress::new(1, 1),
            global_progress: Progress::new(1, 1),
            iteration: None,
            lr: None,
        }
    }

    #[test]
    fn targets_weigh_alike() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut loss = LossMetric::reporting(sender);
        let mut perplexity = PerplexityMetric::new();
        for (mean, tokens) in [(f64::NAN, 0), (1.0, 30), (3.0, 10), (f64::NAN, 0)] {
            loss.update(&TokenLosses { mean, tokens }, &metadata());
            perplexity.update(&TokenLosses { mean, tokens }, &metadata());
        }
        assert_eq!(loss.running_value().current(), 1.5);
        assert_eq!(perplexity.running_value().current(), 1.5f64.exp());
        assert!(loss.value().current().is_nan());
        loss.clear();
        assert_eq!(receiver.recv(), Ok(1.5));
        assert!(loss.running_value().current().is_nan());
        assert_eq!(TokenLosses::NONE.joined(TokenLosses::NONE).tokens, 0);
        assert!(TokenLosses::NONE.joined(TokenLosses::NONE).mean.is_nan());
    }
}
