//! How to train.

use burn::config::Config;

use super::error::TrainError;
use super::objective::Distillation;
use super::routing::{Routing, RoutingError};
use super::trainable::Trainable;
use crate::config::FusedKvDecoderConfig;

/// What is trained, on how much, and how fast.
///
/// Plain data with a JSON form, kept beside the checkpoints.
///
/// ```
/// use fusedkv::train::TrainingConfig;
/// use fusedkv::{FusedKvDecoderConfig, KvPlan};
///
/// let model = FusedKvDecoderConfig::tiny(512, KvPlan::FusedKv { storage_layers: 3 });
/// let config = TrainingConfig::new(model, 128, 8, 1000).with_learning_rate(2e-3);
/// assert!(config.validate().is_ok());
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct TrainingConfig {
    /// The decoder.
    pub model: FusedKvDecoderConfig,
    /// Tokens per window.
    pub context: usize,
    /// Windows per step.
    pub batch_size: usize,
    /// Steps in all; one update of the weights each.
    pub steps: usize,
    /// Portions the steps are divided into. After each, the model is validated and a checkpoint
    /// written. Not passes over the data.
    #[config(default = 5)]
    pub epochs: usize,
    /// Parts each step's windows are divided into, whose gradients are summed before the update:
    /// less memory, the same result but for rounding.
    #[config(default = 1)]
    pub accumulation: usize,
    /// End the training when this many epochs in a row have not lowered the validation loss; never
    /// if none.
    pub patience: Option<usize>,
    /// The parameters that train; all if none.
    pub trainable: Option<Trainable>,
    /// How a [teacher](super::distill) is followed; the loss is the cross-entropy of the next token if
    /// none.
    pub distillation: Option<Distillation>,
    /// The plans that the model, a standard decoder, is trained for together, one drawn for each step; its
    /// own alone if none.
    pub routing: Option<Routing>,
    /// Highest learning rate, that of the first step after warmup.
    #[config(default = 1e-3)]
    pub learning_rate: f64,
    /// What a cosine takes the learning rate down to from there until the last step, as a share of
    /// it.
    #[config(default = 0.1)]
    pub min_learning_rate_ratio: f64,
    /// Steps over which the learning rate rises linearly.
    #[config(default = 0)]
    pub warmup_steps: usize,
    /// Decay of matrices per unit of learning rate (AdamW, arXiv 1711.05101); norms do not decay.
    #[config(default = 0.1)]
    pub weight_decay: f32,
    /// Decay of fusion weights per unit of their learning rate.
    #[config(default = 0.0)]
    pub fusion_weight_decay: f32,
    /// Learning rate of fusion weights, as a multiple of that of the others.
    #[config(default = 1.0)]
    pub fusion_learning_rate_ratio: f64,
    /// Learning rate of embedding and head, as a multiple of that of the other matrices; 1 if none.
    pub embedding_learning_rate_ratio: Option<f64>,
    /// Learning rate of norms' gains and of biases, as such a multiple; 1 if none.
    pub gain_learning_rate_ratio: Option<f64>,
    /// Decay of AdamW's first moment.
    #[config(default = 0.9)]
    pub beta_1: f32,
    /// Decay of AdamW's second moment.
    #[config(default = 0.95)]
    pub beta_2: f32,
    /// The norm of all gradients together is scaled down to this where it is larger.
    #[config(default = 1.0)]
    pub grad_clip: f64,
    /// Share of the windows held out for validation, from the end of the text.
    #[config(default = 0.05)]
    pub valid_fraction: f64,
    /// Seeds the initial weights and the order of the windows.
    #[config(default = 0)]
    pub seed: u64,
}

impl TrainingConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`TrainError::Config`], [`TrainError::Setting`], [`TrainError::ContextTooLong`] or
    /// [`TrainError::Routing`] for the first that does not fit.
    pub fn validate(&self) -> Result<(), TrainError> {
        self.model.validate()?;
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let share = |value: f64| (0.0..1.0).contains(&value);
        let distillation = self.distillation.unwrap_or_else(Distillation::new);
        let ratio = |ratio: Option<f64>| ratio.unwrap_or(1.0);
        let not_negative = |value: f64| value >= 0.0 && value.is_finite();
        for (field, value, fits, expected) in [
            (
                "context",
                self.context as f64,
                self.context > 0,
                "1 or more",
            ),
            (
                "batch_size",
                self.batch_size as f64,
                self.batch_size > 0,
                "1 or more",
            ),
            ("steps", self.steps as f64, self.steps > 0, "1 or more"),
            (
                "epochs",
                self.epochs as f64,
                (1..=self.steps).contains(&self.epochs),
                "1 or more, and no more than steps",
            ),
            (
                "accumulation",
                self.accumulation as f64,
                self.accumulation > 0 && self.batch_size.is_multiple_of(self.accumulation),
                "1 or more, a divisor of batch_size",
            ),
            (
                "patience",
                self.patience.unwrap_or(1) as f64,
                self.patience != Some(0),
                "1 or more",
            ),
            (
                "learning_rate",
                self.learning_rate,
                self.learning_rate > 0.0 && self.learning_rate <= 1.0,
                "above 0 and at most 1",
            ),
            (
                "min_learning_rate_ratio",
                self.min_learning_rate_ratio,
                (0.0..=1.0).contains(&self.min_learning_rate_ratio),
                "0 to 1",
            ),
            (
                "warmup_steps",
                self.warmup_steps as f64,
                self.warmup_steps < self.steps,
                "fewer than steps",
            ),
            (
                "weight_decay",
                self.weight_decay.into(),
                not_negative(self.weight_decay.into()),
                "0 or more",
            ),
            (
                "fusion_weight_decay",
                self.fusion_weight_decay.into(),
                not_negative(self.fusion_weight_decay.into()),
                "0 or more",
            ),
            (
                "fusion_learning_rate_ratio",
                self.fusion_learning_rate_ratio,
                not_negative(self.fusion_learning_rate_ratio),
                "0 or more",
            ),
            (
                "embedding_learning_rate_ratio",
                ratio(self.embedding_learning_rate_ratio),
                not_negative(ratio(self.embedding_learning_rate_ratio)),
                "0 or more",
            ),
            (
                "gain_learning_rate_ratio",
                ratio(self.gain_learning_rate_ratio),
                not_negative(ratio(self.gain_learning_rate_ratio)),
                "0 or more",
            ),
            (
                "temperature",
                distillation.temperature,
                positive(distillation.temperature),
                "a positive number",
            ),
            (
                "target_share",
                distillation.target_share,
                (0.0..=1.0).contains(&distillation.target_share),
                "0 to 1",
            ),
            (
                "hidden_weight",
                distillation.hidden_weight,
                not_negative(distillation.hidden_weight),
                "0 or more",
            ),
            (
                "beta_1",
                self.beta_1.into(),
                share(self.beta_1.into()),
                "0 or more and below 1",
            ),
            (
                "beta_2",
                self.beta_2.into(),
                share(self.beta_2.into()),
                "0 or more and below 1",
            ),
            (
                "grad_clip",
                self.grad_clip,
                positive(self.grad_clip),
                "a positive number",
            ),
            (
                "valid_fraction",
                self.valid_fraction,
                self.valid_fraction > 0.0 && self.valid_fraction < 1.0,
                "above 0 and below 1",
            ),
        ] {
            if !fits {
                return Err(TrainError::Setting {
                    field,
                    value,
                    expected,
                });
            }
        }
        if self.context > self.model.max_positions {
            return Err(TrainError::ContextTooLong {
                context: self.context,
                max_positions: self.model.max_positions,
            });
        }
        if let Some(routing) = &self.routing {
            routing.validate(&self.model)?;
            if matches!(self.trainable, Some(Trainable::Lora(_))) {
                return Err(RoutingError::Adapters.into());
            }
        }
        Ok(())
    }

    /// Tokens predicted in a step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch_size * self.context
    }
}
