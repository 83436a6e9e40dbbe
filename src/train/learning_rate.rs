//! The learning rate over a training.

use std::collections::HashMap;
use std::f64::consts::PI;

use burn::lr_scheduler::LrScheduler;
use burn::record::{PrecisionSettings, Record};
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::config::TrainingConfig;

/// Linear warmup to the highest rate, and from there half a cosine down to the lowest, which is the
/// last step's.
///
/// Goes on once per update of the weights: Burn's loops ask for the rate of every part of a batch
/// whose gradients are accumulated. Burn's own schedulers cannot follow one another.
#[derive(Clone, Debug)]
pub(super) struct WarmupCosine {
    highest: f64,
    lowest: f64,
    warmup: usize,
    steps: usize,
    parts: usize,
    /// Updates made before this scheduler was asked.
    done: usize,
    asked: usize,
}

impl WarmupCosine {
    /// The rates of a validated configuration.
    pub fn new(config: &TrainingConfig) -> Self {
        Self {
            highest: config.learning_rate,
            lowest: config.learning_rate * config.min_learning_rate_ratio,
            warmup: config.warmup_steps,
            steps: config.steps,
            parts: config.accumulation,
            done: 0,
            asked: 0,
        }
    }

    /// Of a step, counted from 0.
    fn rate(&self, step: usize) -> f64 {
        let Some(step) = step.checked_sub(self.warmup) else {
            return self.highest * (step + 1) as f64 / (self.warmup + 1) as f64;
        };
        let last = (self.steps - self.warmup - 1).max(1);
        let angle = PI * step.min(last) as f64 / last as f64;
        self.highest - (self.highest - self.lowest) * (1.0 - angle.cos()) / 2.0
    }

    fn position(&self) -> usize {
        self.done + self.asked / self.parts
    }
}

impl LrScheduler for WarmupCosine {
    type Record<B: Backend> = StepsDone;

    fn step(&mut self) -> f64 {
        let rate = self.rate(self.position());
        self.asked += 1;
        rate
    }

    /// Checkpoints are written between updates, so that the position within one is not recorded.
    fn to_record<B: Backend>(&self) -> StepsDone {
        StepsDone(self.position())
    }

    fn load_record<B: Backend>(self, StepsDone(done): StepsDone) -> Self {
        Self {
            done,
            asked: 0,
            ..self
        }
    }
}

/// Where in its schedule a run stands: updates made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StepsDone(usize);

/// [`StepsDone`] as files have it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum StepsDoneItem {
    /// Now.
    Steps {
        /// Updates made.
        steps: usize,
    },
    /// Before, a product of Burn's schedulers, of which the cosine knew the step made last.
    Composed {
        /// Where each stood, by its name.
        schedulers: Vec<HashMap<String, usize>>,
    },
}

impl<B: Backend> Record<B> for StepsDone {
    type Item<S: PrecisionSettings> = StepsDoneItem;

    fn into_item<S: PrecisionSettings>(self) -> StepsDoneItem {
        StepsDoneItem::Steps { steps: self.0 }
    }

    fn from_item<S: PrecisionSettings>(item: StepsDoneItem, _: &B::Device) -> Self {
        match item {
            StepsDoneItem::Steps { steps } => Self(steps),
            StepsDoneItem::Composed { schedulers } => {
                let cosine = schedulers.iter().find_map(|place| place.get("Cosine"));
                Self(cosine.map_or(0, |last| last.wrapping_add(1)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::lr_scheduler::composed::ComposedLrSchedulerConfig;
    use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
    use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
    use burn::record::Recorder;
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::train::checkpoint::CompleteFileRecorder;
    use crate::{FusedKvDecoderConfig, KvPlan};

    fn config(steps: usize, warmup: usize) -> TrainingConfig {
        let model = FusedKvDecoderConfig::tiny(16, KvPlan::Standard);
        TrainingConfig::new(model, 8, 4, steps)
            .with_learning_rate(3e-3)
            .with_warmup_steps(warmup)
            .with_min_learning_rate_ratio(0.2)
    }

    fn rates(config: &TrainingConfig) -> Vec<f64> {
        let mut scheduler = WarmupCosine::new(config);
        (0..config.steps).map(|_| scheduler.step()).collect()
    }

    fn close(found: f64, expected: f64) -> bool {
        (found - expected).abs() < 1e-12
    }

    #[test]
    fn the_rate_rises_to_the_highest_and_falls_to_the_lowest() {
        let rates = rates(&config(25, 4));
        for (step, rate) in rates[..4].iter().enumerate() {
            assert!(close(*rate, 3e-3 * (step + 1) as f64 / 5.0), "{rates:?}");
        }
        assert_eq!(rates[4], 3e-3);
        assert!(rates[4..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!(close(rates[14], 1.2 / 2.0 * 3e-3), "{rates:?}");
        assert!(close(rates[24], 0.2 * 3e-3), "{rates:?}");
    }

    #[test]
    fn a_schedule_may_be_warmup_alone_or_have_none() {
        assert_eq!(rates(&config(1, 0)), [3e-3]);
        assert_eq!(rates(&config(4, 3))[3], 3e-3);
        let none = rates(&config(3, 0));
        assert!(none[0] == 3e-3 && close(none[2], 0.2 * 3e-3), "{none:?}");
    }

    #[test]
    fn parts_of_a_step_have_its_rate_and_a_resumed_schedule_goes_on() {
        let config = config(10, 3);
        let expected = rates(&config);
        let mut scheduler = WarmupCosine::new(&config.with_accumulation(2));
        for expected in &expected[..6] {
            assert_eq!([scheduler.step(), scheduler.step()], [*expected; 2]);
        }
        let record = scheduler.to_record::<Flex>();
        let fresh = WarmupCosine {
            done: 0,
            asked: 0,
            ..scheduler
        };
        let mut resumed = fresh.load_record::<Flex>(record);
        for expected in &expected[6..] {
            assert_eq!([resumed.step(), resumed.step()], [*expected; 2]);
        }
    }

    #[test]
    fn positions_are_read_back_and_those_of_burns_schedulers_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("scheduler-1");
        let recorder = CompleteFileRecorder::default();
        let read = || Recorder::<Flex>::load::<StepsDone>(&recorder, path.clone(), &FlexDevice);
        Recorder::<Flex>::record(&recorder, StepsDone(7), path.clone()).unwrap();
        assert_eq!(read().unwrap(), StepsDone(7));

        let mut old = ComposedLrSchedulerConfig::new()
            .cosine(CosineAnnealingLrSchedulerConfig::new(1e-3, 9))
            .linear(LinearLrSchedulerConfig::new(0.25, 1.0, 3))
            .init()
            .unwrap();
        for _ in 0..5 {
            old.step();
        }
        Recorder::<Flex>::record(&recorder, old.to_record::<Flex>(), path.clone()).unwrap();
        assert_eq!(read().unwrap(), StepsDone(5));
    }
}
