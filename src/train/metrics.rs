//! Metrics Burn does not have, or computes from all logits.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use burn_train::metric::state::{FormatOptions, NumericMetricState};
use burn_train::metric::{
    Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
    SerializedEntry, format_float,
};

/// The loss of some tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLosses {
    /// Mean negative log-likelihood in nats.
    pub mean: f64,
    /// How many tokens it is the mean of.
    pub tokens: usize,
}

/// Perplexity: e to the mean negative log-likelihood, every token of the epoch counting alike.
///
/// Burn's own takes all logits to the CPU and normalises them again.
///
/// ```
/// use fusedkv::train::perplexity;
///
/// // A model that finds 50 tokens equally likely.
/// assert!((perplexity(50f64.ln()) - 50.0).abs() < 1e-9);
/// ```
#[derive(Clone, Debug)]
pub struct PerplexityMetric {
    name: MetricName,
    last: TokenLosses,
    epoch: TokenLosses,
    report: Option<Sender<f64>>,
}

/// e to a mean negative log-likelihood in nats.
pub fn perplexity(mean_loss: f64) -> f64 {
    mean_loss.exp()
}

impl PerplexityMetric {
    /// The metric.
    pub fn new() -> Self {
        Self {
            name: Arc::new("Perplexity".to_owned()),
            last: TokenLosses::NONE,
            epoch: TokenLosses::NONE,
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
}

impl Default for PerplexityMetric {
    fn default() -> Self {
        Self::new()
    }
}

impl TokenLosses {
    /// Of no token.
    pub(super) const NONE: Self = Self {
        mean: f64::NAN,
        tokens: 0,
    };

    /// Both together, every token counting alike.
    pub(super) fn joined(self, other: Self) -> Self {
        let tokens = self.tokens + other.tokens;
        let part = |part: Self| match part.tokens {
            0 => 0.0,
            n => part.mean * n as f64 / tokens as f64,
        };
        Self {
            mean: part(self) + part(other),
            tokens,
        }
    }

    fn perplexity(self) -> NumericEntry {
        NumericEntry::Aggregated {
            aggregated_value: perplexity(self.mean),
            count: self.tokens,
        }
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
        self.last = *losses;
        self.epoch = self.epoch.joined(*losses);
        let (epoch, batch) = (self.running_value().current(), self.value().current());
        SerializedEntry::new(
            format!(
                "epoch {} - batch {}",
                format_float(epoch, 2),
                format_float(batch, 2)
            ),
            self.value().serialize(),
        )
    }

    fn clear(&mut self) {
        if let Some(report) = &self.report {
            // Nobody listens once training is over.
            let _ = report.send(self.epoch.mean);
        }
        let report = self.report.take();
        *self = Self {
            report,
            ..Self::new()
        };
    }
}

impl Numeric for PerplexityMetric {
    fn value(&self) -> NumericEntry {
        self.last.perplexity()
    }

    fn running_value(&self) -> NumericEntry {
        self.epoch.perplexity()
    }
}

/// Tokens read per second, from one step to the next; an epoch's first step includes the validation
/// before it.
#[derive(Clone)]
pub struct TokenRateMetric {
    name: MetricName,
    state: NumericMetricState,
    last: Instant,
}

impl TokenRateMetric {
    /// The metric.
    pub fn new() -> Self {
        Self {
            name: Arc::new("Tokens per second".to_owned()),
            state: NumericMetricState::default(),
            last: Instant::now(),
        }
    }
}

impl Default for TokenRateMetric {
    fn default() -> Self {
        Self::new()
    }
}

impl Metric for TokenRateMetric {
    type Input = TokenLosses;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn update(&mut self, losses: &TokenLosses, _metadata: &MetricMetadata) -> SerializedEntry {
        let now = Instant::now();
        let rate = losses.tokens as f64 / (now - self.last).as_secs_f64();
        self.last = now;
        let format = FormatOptions::new(self.name()).precision(0);
        self.state.update(rate, 1, format)
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
    fn perplexity_weighs_tokens_alike() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut metric = PerplexityMetric::reporting(sender);
        for (mean, tokens) in [(1.0, 30), (3.0, 10)] {
            metric.update(&TokenLosses { mean, tokens }, &metadata());
        }
        assert_eq!(metric.value().current(), 3f64.exp());
        assert_eq!(metric.running_value().current(), 1.5f64.exp());
        metric.clear();
        assert_eq!(receiver.recv(), Ok(1.5));
        assert!(metric.running_value().current().is_nan());
    }
}
