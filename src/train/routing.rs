//! One model for several plans: the plan that each step is trained under.

use burn::config::Config;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use thiserror::Error;

use crate::config::{ConfigError, FusedKvDecoderConfig};
use crate::plan::KvPlan;

/// Plans that one model is trained for, as stochastic KV routing does (arXiv 2604.22782): every step
/// draws one of them, and the plan to serve is chosen when training is over.
///
/// The model is a standard decoder, so that every layer has projections of keys and values, and for
/// every plan the weights of its blends and its α. A step trains what the plan drawn reads, and nothing
/// else.
///
/// ```
/// use fusedkv::train::{Routing, TrainingConfig};
/// use fusedkv::{FusedKvDecoderConfig, KvPlan};
///
/// let plans = vec![KvPlan::Standard, KvPlan::FusedKv { storage_layers: 3 }];
/// let model = FusedKvDecoderConfig::tiny(512, KvPlan::Standard);
/// let config = TrainingConfig::new(model, 128, 8, 1000)
///     .with_routing(Some(Routing::new(plans).with_weights(Some(vec![1.0, 3.0]))));
/// assert!(config.validate().is_ok());
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct Routing {
    /// The plans, two or more, no two of which have every layer do the same.
    pub plans: Vec<KvPlan>,
    /// How often each plan is drawn, as a share of the sum of all, above 0; alike if none.
    pub weights: Option<Vec<f64>>,
}

/// Plans that no model can be trained for together.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum RoutingError {
    /// Nothing to draw among.
    #[error("a routing among {found} plans, expected 2 or more; a single plan is the model's own")]
    TooFewPlans {
        /// Plans in the set.
        found: usize,
    },
    /// The model that the plans share has not every layer's projections.
    #[error("a routed model of the plan `{0}`, expected `standard`, which serves any plan")]
    NotStandard(KvPlan),
    /// A plan that no decoder of the model's sizes can follow.
    #[error("plan {} of the routing, `{plan}`: {source}", index + 1)]
    Plan {
        /// Its place in the set, counted from 0.
        index: usize,
        /// The plan.
        plan: KvPlan,
        /// What is wrong.
        source: ConfigError,
    },
    /// Two plans that have every layer do the same.
    #[error(
        "plans {} and {} of the routing, `{plan}`, are the same, expected each once",
        first + 1,
        second + 1
    )]
    Duplicate {
        /// The place of the first, counted from 0.
        first: usize,
        /// The place of the second.
        second: usize,
        /// The second.
        plan: KvPlan,
    },
    /// Not one weight for each plan.
    #[error("{found} weights for {expected} plans of a routing, expected one for each")]
    WeightCount {
        /// Weights given.
        found: usize,
        /// Plans in the set.
        expected: usize,
    },
    /// A plan that cannot be drawn that often.
    #[error("the weight of plan {} of the routing is {found}, expected a positive number", index + 1)]
    Weight {
        /// The plan's place in the set, counted from 0.
        index: usize,
        /// Its weight.
        found: f64,
    },
    /// Adapters stand beside one plan's projections.
    #[error("a routing that trains adapters, expected other parameters to train")]
    Adapters,
    /// A plan that the model was not trained under.
    #[error(
        "the run was not trained under the plan `{plan}`, expected one of {}",
        named(plans)
    )]
    NotTrained {
        /// The plan asked for.
        plan: KvPlan,
        /// Those it was trained under.
        plans: Vec<KvPlan>,
    },
}

fn named(plans: &[KvPlan]) -> String {
    let plans: Vec<_> = plans.iter().map(|plan| format!("`{plan}`")).collect();
    plans.join(", ")
}

impl Routing {
    /// Checks that a model can be trained for all plans.
    pub(super) fn validate(&self, model: &FusedKvDecoderConfig) -> Result<(), RoutingError> {
        let plans = &self.plans;
        if plans.len() < 2 {
            return Err(RoutingError::TooFewPlans { found: plans.len() });
        }
        if model.plan != KvPlan::Standard {
            return Err(RoutingError::NotStandard(model.plan.clone()));
        }
        let mut layouts = Vec::new();
        for (index, plan) in plans.iter().enumerate() {
            let of_plan = FusedKvDecoderConfig {
                plan: plan.clone(),
                ..model.clone()
            };
            let layout = of_plan.validate().map_err(|source| RoutingError::Plan {
                index,
                plan: plan.clone(),
                source,
            })?;
            if let Some(first) = layouts.iter().position(|other| *other == layout) {
                return Err(RoutingError::Duplicate {
                    first,
                    second: index,
                    plan: plan.clone(),
                });
            }
            layouts.push(layout);
        }
        let Some(weights) = &self.weights else {
            return Ok(());
        };
        if weights.len() != plans.len() {
            return Err(RoutingError::WeightCount {
                found: weights.len(),
                expected: plans.len(),
            });
        }
        let fits = |weight: f64| weight > 0.0 && weight.is_finite();
        match weights.iter().position(|&weight| !fits(weight)) {
            Some(index) => Err(RoutingError::Weight {
                index,
                found: weights[index],
            }),
            None => Ok(()),
        }
    }

    /// The probability of each plan.
    pub(super) fn shares(&self) -> Vec<f64> {
        let weights = self.weights.clone();
        let weights = weights.unwrap_or_else(|| vec![1.0; self.plans.len()]);
        // The largest first: a sum of large weights could be infinite.
        let largest = weights.iter().copied().fold(0.0, f64::max);
        let sum: f64 = weights.iter().map(|weight| weight / largest).sum();
        let share = |weight: f64| weight / largest / sum;
        weights.into_iter().map(share).collect()
    }

    /// The place of the plan of a step, counted from 0: a function of both numbers alone, so that a
    /// resumed run goes on with the plans it would have drawn.
    pub(super) fn drawn(&self, seed: u64, step: usize) -> usize {
        // The streams below are those of the windows' order.
        const STREAMS: u64 = 1 << 63;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(STREAMS | step as u64);
        let mut left: f64 = rng.random();
        let shares = self.shares();
        let place = shares.iter().position(|share| {
            left -= share;
            left < 0.0
        });
        // Rounding may leave a little of 1.
        place.unwrap_or(shares.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans() -> Vec<KvPlan> {
        vec![
            KvPlan::Standard,
            KvPlan::FusedKv { storage_layers: 2 },
            KvPlan::Yoco { storage_layers: 2 },
        ]
    }

    #[test]
    fn plans_are_drawn_as_often_as_their_weights_say() {
        const STEPS: usize = 20_000;
        for weights in [
            None,
            Some(vec![1.0, 2.0, 5.0]),
            Some(vec![3e300, 1e300, 1e308]),
        ] {
            let routing = Routing::new(plans()).with_weights(weights.clone());
            let shares = routing.shares();
            let sum = weights.iter().flatten().sum::<f64>();
            for seed in [0, 7] {
                let mut counts = [0; 3];
                for step in 0..STEPS {
                    counts[routing.drawn(seed, step)] += 1;
                }
                for plan in 0..3 {
                    let expected = weights.as_ref().map_or(1.0 / 3.0, |w| w[plan] / sum);
                    assert!((shares[plan] - expected).abs() < 1e-12);
                    // Five deviations of a binomial's.
                    let deviation = (expected * (1.0 - expected) / STEPS as f64).sqrt();
                    let found = f64::from(counts[plan]) / STEPS as f64;
                    assert!((found - expected).abs() <= 5.0 * deviation, "{counts:?}");
                }
            }
        }
    }

    #[test]
    fn a_draw_depends_on_seed_and_step_alone() {
        let routing = Routing::new(plans());
        let draws = |seed, steps: &[usize]| -> Vec<_> {
            steps
                .iter()
                .map(|&step| routing.drawn(seed, step))
                .collect()
        };
        let steps: Vec<_> = (0..64).collect();
        let first = draws(1, &steps);
        let (again, late) = (draws(1, &steps), draws(1, &steps[40..]));
        assert_eq!((&again, &late[..]), (&first, &first[40..]));
        assert_ne!(draws(2, &steps), first);
        // As they were when runs were first resumed with them.
        assert_eq!(first[..12], [2, 2, 0, 1, 0, 0, 2, 2, 2, 1, 1, 2]);
    }
}
