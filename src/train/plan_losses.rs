//! Validation losses of a routed training under each of its plans.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use burn_train::metric::{
    Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericEntry, SerializedEntry,
};

use super::metrics::{Losses, TokenLosses, entry, lower_is_better};
use super::routing::Routing;

/// What the same targets' losses come to under each plan.
#[derive(Clone, Debug)]
pub(super) struct PlanLosses(pub Vec<TokenLosses>);

/// Mean negative log-likelihood in nats under one plan, as [`LossMetric`](super::LossMetric) has it.
#[derive(Clone, Debug)]
pub(super) struct PlanLossMetric {
    name: MetricName,
    /// The plan's in the routing.
    place: usize,
    losses: Losses,
    report: Sender<f64>,
}

impl PlanLossMetric {
    /// Sends the mean loss of an epoch when it has ended.
    pub fn reporting(routing: &Routing, place: usize, report: Sender<f64>) -> Self {
        Self {
            name: Arc::new(name(routing, place)),
            place,
            losses: Losses::NONE,
            report,
        }
    }
}

/// The name of a plan's metric. Plans of the same words are told apart by their places.
fn name(routing: &Routing, place: usize) -> String {
    format!("Loss {}, {}", place + 1, routing.plans[place])
}

impl Metric for PlanLossMetric {
    type Input = PlanLosses;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        lower_is_better()
    }

    fn update(&mut self, losses: &PlanLosses, _metadata: &MetricMetadata) -> SerializedEntry {
        let losses = losses.0.get(self.place).copied();
        let losses = losses.unwrap_or(TokenLosses::NONE);
        self.losses.update(losses, std::convert::identity)
    }

    fn clear(&mut self) {
        // Nobody listens once training is over.
        let _ = self.report.send(self.losses.epoch.mean);
        self.losses = Losses::NONE;
    }
}

impl Numeric for PlanLossMetric {
    fn value(&self) -> NumericEntry {
        entry(self.losses.last, std::convert::identity)
    }

    fn running_value(&self) -> NumericEntry {
        entry(self.losses.epoch, std::convert::identity)
    }
}

/// The losses of a validation by plan, as its metrics tell of them, by their names. Nothing in a
/// training without a routing.
#[derive(Clone, Debug, Default)]
pub(super) struct ByPlan(Vec<(String, TokenLosses)>);

impl ByPlan {
    pub fn new(routing: Option<&Routing>) -> Self {
        let Some(routing) = routing else {
            return Self::default();
        };
        let places = 0..routing.plans.len();
        let sums = places.map(|place| (name(routing, place), TokenLosses::NONE));
        Self(sums.collect())
    }

    /// Takes in what a metric has told, if it is one of them.
    pub fn add(&mut self, metric: &str, losses: TokenLosses) {
        for (name, sum) in &mut self.0 {
            if name == metric {
                *sum = sum.joined(losses);
            }
        }
    }

    /// Their metrics' names.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    /// The means in the routing's order; begins anew.
    pub fn take(&mut self) -> Vec<f64> {
        let sums = self.0.iter_mut();
        sums.map(|(_, sum)| std::mem::replace(sum, TokenLosses::NONE).mean)
            .collect()
    }
}
