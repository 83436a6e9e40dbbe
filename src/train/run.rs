//! What a training is asked for, and what it gives.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::backend::Backend;

use super::directory::{EpochLosses, RunDirectory};
use super::error::TrainError;
use super::metrics::perplexity;
use super::progress::{Observer, Progress, StepReport};
use super::routing::RoutingError;
use super::saved::load_model;
use super::trainable::Trainable;
use super::trainee::Trainee;
use crate::config::FusedKvDecoderConfig;
use crate::decoder::FusedKvDecoder;
use crate::plan::KvPlan;

/// Where a training keeps its checkpoints, and how it is watched.
#[derive(Clone, Debug)]
pub struct Run {
    pub(super) directory: PathBuf,
    pub(super) resume: bool,
    pub(super) progress: Progress,
    pub(super) observer: Option<Observer>,
}

impl Run {
    /// A training that starts over in `directory`, a new or empty one or that of an earlier run,
    /// whose files are then deleted.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            resume: false,
            progress: Progress::Auto,
            observer: None,
        }
    }

    /// Goes on from the last checkpoint in the directory, if `resume` is set; one of the same
    /// configuration, data and teacher.
    ///
    /// The run ends as it would have without the interruption: the windows read, the optimizer's
    /// moments and the learning rate are those of the step. The one exception is dropout, whose
    /// randomness starts over.
    #[must_use]
    pub fn with_resume(self, resume: bool) -> Self {
        Self { resume, ..self }
    }

    /// Shows progress elsewhere.
    #[must_use]
    pub fn with_progress(self, progress: Progress) -> Self {
        Self { progress, ..self }
    }

    /// Calls `observer` after every step, from another thread; not while Burn draws its own
    /// interface.
    #[must_use]
    pub fn with_observer(self, observer: impl Fn(StepReport) + Send + Sync + 'static) -> Self {
        Self {
            observer: Some(Observer(Arc::new(observer))),
            ..self
        }
    }

    /// The model of the epoch with the lowest validation loss, and the losses of that epoch. Its
    /// checkpoint is kept whatever comes after it. Parameters are in the backend's float type, with
    /// the numbers of the run's own. Of a [routed](super::Routing) training it is the decoder of the first
    /// plan.
    ///
    /// ```no_run
    /// use fusedkv::backend::{Flex, FlexDevice};
    /// use fusedkv::train::Run;
    ///
    /// let (model, losses) = Run::new("target/run").best::<Flex>(&FlexDevice)?;
    /// # Ok::<(), fusedkv::train::TrainError>(())
    /// ```
    ///
    /// # Errors
    /// [`TrainError::NoCheckpoint`] if no epoch is finished, [`TrainError::NeedsBase`] if the run has
    /// adapters alone, [`TrainError::Unreadable`] if a file of the run is damaged.
    pub fn best<B: Backend>(
        &self,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        self.model(lowest, None, None, device)
    }

    /// [`best`](Self::best) under a plan of the run's [routing](super::Routing). The epoch is that of the
    /// lowest mean over the plans, whatever plan is asked for.
    ///
    /// # Errors
    /// As [`best`](Self::best), and [`TrainError::Routing`] if the run was not trained under the plan.
    pub fn best_under<B: Backend>(
        &self,
        plan: &KvPlan,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        self.model(lowest, Some(plan), None, device)
    }

    /// [`best`](Self::best) of a training of [adapters](Trainable::Lora), beside the model that it
    /// began with.
    ///
    /// # Errors
    /// As [`best`](Self::best), [`TrainError::OtherBase`] if the model is another one, and those of
    /// [`train_from`](super::train_from).
    pub fn best_with_base<B: Backend>(
        &self,
        base: FusedKvDecoder<B>,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        let device = base.device();
        self.model(lowest, None, Some(base), &device)
    }

    /// The model of the last epoch that was finished, and its losses.
    ///
    /// # Errors
    /// As [`best`](Self::best).
    pub fn last<B: Backend>(
        &self,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        self.model(|mut epochs| epochs.pop(), None, None, device)
    }

    /// [`last`](Self::last) under a plan of the run's [routing](super::Routing).
    ///
    /// # Errors
    /// As [`best_under`](Self::best_under).
    pub fn last_under<B: Backend>(
        &self,
        plan: &KvPlan,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        self.model(|mut epochs| epochs.pop(), Some(plan), None, device)
    }

    /// [`last`](Self::last) of a training of adapters, as [`best_with_base`](Self::best_with_base).
    ///
    /// # Errors
    /// As [`best_with_base`](Self::best_with_base).
    pub fn last_with_base<B: Backend>(
        &self,
        base: FusedKvDecoder<B>,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        let device = base.device();
        self.model(|mut epochs| epochs.pop(), None, Some(base), &device)
    }

    /// The model of an epoch chosen among those with a checkpoint, in order; under one of the plans it was
    /// trained for, or the first.
    fn model<B: Backend>(
        &self,
        choose: impl FnOnce(Vec<EpochLosses>) -> Option<EpochLosses>,
        plan: Option<&KvPlan>,
        base: Option<FusedKvDecoder<B>>,
        device: &B::Device,
    ) -> Result<(FusedKvDecoder<B>, EpochLosses), TrainError> {
        let (directory, config, epochs) = RunDirectory::saved(&self.directory)?;
        let none = || TrainError::NoCheckpoint(self.directory.clone());
        let losses = choose(epochs).ok_or_else(none)?;
        if matches!(config.trainable, Some(Trainable::Lora(_))) && base.is_none() {
            return Err(TrainError::NeedsBase(self.directory.clone()));
        }
        let model = Trainee::to_load(&config, base, device)?;
        let place = match plan {
            Some(plan) => {
                let of_plan = FusedKvDecoderConfig {
                    plan: plan.clone(),
                    ..config.model.clone()
                };
                let layout = of_plan.validate()?;
                let place = model.layouts().iter().position(|of| *of == layout);
                place.ok_or_else(|| RoutingError::NotTrained {
                    plan: plan.clone(),
                    plans: match &config.routing {
                        Some(routing) => routing.plans.clone(),
                        None => vec![config.model.plan.clone()],
                    },
                })?
            }
            None => 0,
        };
        let model = load_model(&directory, losses.epoch, model, device)?;
        Ok((model.decoders().swap_remove(place), losses))
    }
}

fn lowest(epochs: Vec<EpochLosses>) -> Option<EpochLosses> {
    let by_loss = |a: &EpochLosses, b: &EpochLosses| a.valid.total_cmp(&b.valid);
    epochs.into_iter().min_by(by_loss)
}

/// A model that was trained for several plans, under one of them.
#[derive(Clone, Debug)]
pub struct TrainedPlan<B: Backend> {
    /// The decoder of the plan. It shares the parameters that it has in common with the others in memory,
    /// and is saved by itself as any other.
    pub model: FusedKvDecoder<B>,
    /// Mean loss of the held-out windows under the plan, in nats per token.
    pub valid_loss: f64,
}

/// What a training gives.
#[derive(Clone, Debug)]
pub struct Trained<B: Backend> {
    /// The model after the last step, without autodiff; of a [routed](super::Routing) training under the
    /// first plan.
    pub model: FusedKvDecoder<B>,
    /// The model under every plan of a routing, in its order; empty in a training without.
    pub plans: Vec<TrainedPlan<B>>,
    /// The losses of every epoch, those before a resumption included.
    pub epochs: Vec<EpochLosses>,
    /// Mean loss of the last epoch's batches, in nats per token.
    pub train_loss: f64,
    /// Mean loss of the held-out windows, in nats per token; with a routing the mean over its plans by
    /// their weights.
    pub valid_loss: f64,
    /// Tokens read since the training's first step, repetitions included.
    pub tokens: usize,
    /// Time this call took; the part before a resumption is not known.
    pub elapsed: Duration,
}

impl<B: Backend> Trained<B> {
    /// Perplexity of the held-out windows: e to the [`valid_loss`](Self::valid_loss).
    pub fn perplexity(&self) -> f64 {
        perplexity(self.valid_loss)
    }
}
