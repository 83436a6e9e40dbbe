//! Validation losses of a routed training under each of its plans.

use std::sync::mpsc::Sender;

use burn_train::metric::{
    Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericEntry, SerializedEntry,
};

use super::metrics::{LossMetric, TokenLosses};
use super::routing::Routing;
use crate::plan::KvPlan;

/// What the same targets' losses come to under each plan.
#[derive(Clone, Debug)]
pub(super) struct PlanLosses(pub Vec<TokenLosses>);

/// [`LossMetric`] of one plan.
#[derive(Clone, Debug)]
pub(super) struct PlanLossMetric {
    /// The plan's place in the routing.
    place: usize,
    loss: LossMetric,
}

impl PlanLossMetric {
    /// Sends the mean loss of an epoch when it has ended.
    pub fn reporting(routing: &Routing, place: usize, report: Sender<f64>) -> Self {
        Self {
            place,
            loss: LossMetric::reporting(report).named(name(routing, place)),
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
        self.loss.name()
    }

    fn attributes(&self) -> MetricAttributes {
        self.loss.attributes()
    }

    fn update(&mut self, losses: &PlanLosses, metadata: &MetricMetadata) -> SerializedEntry {
        let losses = losses.0.get(self.place).unwrap_or(&TokenLosses::NONE);
        self.loss.update(losses, metadata)
    }

    fn clear(&mut self) {
        self.loss.clear();
    }
}

impl Numeric for PlanLossMetric {
    fn value(&self) -> NumericEntry {
        self.loss.value()
    }

    fn running_value(&self) -> NumericEntry {
        self.loss.running_value()
    }
}

/// The losses of a validation by plan, as its metrics tell of them. Nothing in a training without a
/// routing.
#[derive(Clone, Debug, Default)]
pub(super) struct ByPlan(Vec<OfPlan>);

#[derive(Clone, Debug)]
struct OfPlan {
    plan: KvPlan,
    /// Its metric's name.
    metric: String,
    losses: TokenLosses,
}

impl ByPlan {
    pub fn new(routing: Option<&Routing>) -> Self {
        let Some(routing) = routing else {
            return Self::default();
        };
        let plans = routing.plans.iter().enumerate();
        let plans = plans.map(|(place, plan)| OfPlan {
            plan: plan.clone(),
            metric: name(routing, place),
            losses: TokenLosses::NONE,
        });
        Self(plans.collect())
    }

    /// Takes in what a metric has told, if it is one of them.
    pub fn add(&mut self, metric: &str, losses: TokenLosses) {
        for of in &mut self.0 {
            if of.metric == metric {
                of.losses = of.losses.joined(losses);
            }
        }
    }

    /// Their metrics' names.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|of| of.metric.clone()).collect()
    }

    /// The plans and their means, in the routing's order; begins anew.
    pub fn take(&mut self) -> Vec<(KvPlan, f64)> {
        let plans = self.0.iter_mut().map(|of| {
            let losses = std::mem::replace(&mut of.losses, TokenLosses::NONE);
            (of.plan.clone(), losses.mean)
        });
        plans.collect()
    }
}
