//! The learning rate over a training.

use burn::lr_scheduler::LrScheduler;
use burn::lr_scheduler::composed::{ComposedLrScheduler, ComposedLrSchedulerConfig};
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::tensor::backend::Backend;

use super::config::TrainingConfig;
use super::error::TrainError;

/// Linear warmup times cosine decay.
pub(super) fn learning_rates(config: &TrainingConfig) -> Result<ComposedLrScheduler, TrainError> {
    let highest = config.learning_rate;
    // The cosine's first step is step 0, and its last the last.
    let cosine = CosineAnnealingLrSchedulerConfig::new(highest, (config.steps - 1).max(1))
        .with_min_lr(highest * config.min_learning_rate_ratio);
    let mut rates = ComposedLrSchedulerConfig::new().cosine(cosine);
    if config.warmup_steps > 0 {
        let first = 1.0 / (config.warmup_steps + 1) as f64;
        rates = rates.linear(LinearLrSchedulerConfig::new(
            first,
            1.0,
            config.warmup_steps,
        ));
    }
    rates.init().map_err(|_| TrainError::Setting {
        field: "learning_rate",
        value: highest,
        expected: "a rate that Burn's schedulers take",
    })
}

/// A scheduler that goes on once per update of the weights. Burn's loops ask for the rate of every
/// part of a batch whose gradients are accumulated.
///
/// Checkpoints are written between updates, so that the position within one is not recorded.
#[derive(Clone, Debug)]
pub(super) struct OncePerStep<S> {
    inner: S,
    parts: usize,
    asked: usize,
    rate: f64,
}

impl<S> OncePerStep<S> {
    pub fn new(inner: S, parts: usize) -> Self {
        Self {
            inner,
            parts,
            asked: 0,
            rate: f64::NAN,
        }
    }
}

impl<S: LrScheduler> LrScheduler for OncePerStep<S> {
    type Record<B: Backend> = S::Record<B>;

    fn step(&mut self) -> f64 {
        if self.asked.is_multiple_of(self.parts) {
            self.rate = self.inner.step();
        }
        self.asked += 1;
        self.rate
    }

    fn to_record<B: Backend>(&self) -> Self::Record<B> {
        self.inner.to_record::<B>()
    }

    fn load_record<B: Backend>(self, record: Self::Record<B>) -> Self {
        Self::new(self.inner.load_record::<B>(record), self.parts)
    }
}
