//! Perplexity from the loss that is computed anyway.
//!
//! Burn's `PerplexityMetric` wants the logits, `[batch · context, vocab_size]` copied to the host
//! and normalised a second time on every step.

use std::sync::Arc;

use burn_train::metric::{
    Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
    SerializedEntry,
};

/// exp of the mean negative log-likelihood over all tokens of an epoch.
#[derive(Clone, Debug)]
pub struct PerplexityMetric {
    name: MetricName,
    total_nll: f64,
    tokens: usize,
}

/// Mean negative log-likelihood of one batch.
#[derive(Clone, Copy, Debug)]
pub struct NllInput {
    /// Nats per token.
    pub nll: f64,
    /// Tokens it is the mean of.
    pub tokens: usize,
}

impl PerplexityMetric {
    /// No tokens yet.
    pub fn new() -> Self {
        Self {
            name: Arc::new("Perplexity".to_owned()),
            total_nll: 0.0,
            tokens: 0,
        }
    }

    fn over_epoch(&self) -> f64 {
        (self.total_nll / self.tokens as f64).exp()
    }
}

impl Default for PerplexityMetric {
    fn default() -> Self {
        Self::new()
    }
}

impl Metric for PerplexityMetric {
    type Input = NllInput;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: None,
            higher_is_better: false,
        }
        .into()
    }

    fn update(&mut self, input: &NllInput, _metadata: &MetricMetadata) -> SerializedEntry {
        self.total_nll += input.nll * input.tokens as f64;
        self.tokens += input.tokens;
        SerializedEntry::new(
            format!(
                "epoch {:.2} - batch {:.2}",
                self.over_epoch(),
                input.nll.exp()
            ),
            self.value().serialize(),
        )
    }

    fn clear(&mut self) {
        *self = Self::new();
    }
}

impl Numeric for PerplexityMetric {
    fn value(&self) -> NumericEntry {
        NumericEntry::Aggregated {
            aggregated_value: self.over_epoch(),
            count: self.tokens,
        }
    }

    fn running_value(&self) -> NumericEntry {
        self.value()
    }
}
