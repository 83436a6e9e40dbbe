//! What a training trains, and what its checkpoints keep of it: all of a decoder, its adapters alone,
//! which are small beside the base that they leave as it is, or a decoder and what several plans add to
//! it.

mod record;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;

use burn::module::{
    AutodiffModule, Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
    ModuleVisitor, Param,
};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn_train::{InferenceStep, TrainOutput, TrainStep};
pub(super) use record::TraineeRecord;
use xxhash_rust::xxh3::Xxh3Default;

use super::batch::LanguageBatch;
use super::config::TrainingConfig;
use super::error::TrainError;
use super::objective::Lesson;
use super::routing::Routing;
use super::step::LanguageOutput;
use super::trainable::{Trainable, is_adapter};
use crate::config::ConfigError;
use crate::decoder::{FusedKvDecoder, Lora, OtherPlan, RecordError};
use crate::parameters::ModulePath;
use crate::plan::KvLayout;

/// A decoder that is trained.
#[derive(Clone, Debug)]
pub(super) struct Trainee<B: Backend> {
    /// Of a routed training the standard decoder, whose parameters all plans share.
    pub model: FusedKvDecoder<B>,
    kind: Kind<B>,
}

/// What of a decoder is trained.
#[derive(Clone, Debug)]
enum Kind<B: Backend> {
    /// It is, under the plan that it has.
    Whole,
    /// Its adapters are and nothing else.
    Adapters {
        /// The [`fingerprint`] of what they stand beside.
        base: u64,
    },
    /// It is, under one of these plans in each step.
    Routed {
        plans: Vec<OtherPlan<B>>,
        /// The probability of each.
        shares: Vec<f64>,
    },
}

/// A trainee of what `$body` makes of every module of `$trainee`, or of a reference to it.
macro_rules! rebuilt {
    ($trainee:expr, |$module:ident| $body:expr) => {{
        let Trainee {
            model: $module,
            kind,
        } = $trainee;
        let model = $body;
        let kind = match kind {
            Kind::Whole => Kind::Whole,
            Kind::Adapters { base } => Kind::Adapters {
                base: base.to_owned(),
            },
            Kind::Routed { plans, shares } => Kind::Routed {
                plans: plans.into_iter().map(|$module| $body).collect(),
                shares: shares.to_owned(),
            },
        };
        Trainee { model, kind }
    }};
}

impl<B: Backend> Trainee<B> {
    /// The decoder that a training begins with: the one it was given, with the adapters it asks for, or
    /// one of random weights.
    ///
    /// # Errors
    /// [`TrainError::OtherModel`], [`TrainError::NoBase`], [`TrainError::OtherAdapters`],
    /// [`TrainError::Lora`] or [`TrainError::Config`].
    pub fn start(
        config: &TrainingConfig,
        model: Option<FusedKvDecoder<B>>,
        device: &B::Device,
    ) -> Result<Self, TrainError> {
        let lora = match &config.trainable {
            Some(Trainable::Lora(lora)) => Some(lora),
            _ => None,
        };
        let Some(mut model) = model else {
            if lora.is_some() {
                return Err(TrainError::NoBase);
            }
            // Parameters draw their values when first used; a fork uses them all, in order.
            let model = config.model.init::<B>(device)?.fork(device);
            return Ok(Self::of(model, config.routing.as_ref())?);
        };
        if *model.config() != config.model {
            return Err(TrainError::OtherModel {
                found: Box::new(model.config().clone()),
                expected: Box::new(config.model.clone()),
            });
        }
        match (model.lora(), lora) {
            (None, Some(lora)) => model = model.with_lora(lora)?,
            (found, expected) if found != expected => {
                return Err(TrainError::OtherAdapters {
                    found: found.cloned(),
                    expected: expected.cloned(),
                });
            }
            _ => {}
        }
        Ok(match lora {
            Some(_) => Self::adapted(model),
            None => Self::of(model.with_float_weights(), config.routing.as_ref())?,
        })
    }

    /// A decoder all of whose parameters are in the record, and the plans that it is trained for.
    ///
    /// # Errors
    /// [`ConfigError`] for a plan that does not fit.
    fn of(model: FusedKvDecoder<B>, routing: Option<&Routing>) -> Result<Self, ConfigError> {
        let Some(routing) = routing else {
            return Ok(Self::whole(model));
        };
        let plans = routing.plans.iter();
        let plans = plans.map(|plan| OtherPlan::new(&model, plan));
        Ok(Self {
            kind: Kind::Routed {
                plans: plans.collect::<Result<_, _>>()?,
                shares: routing.shares(),
            },
            model,
        })
    }

    /// A trainee like that of a finished training, to load what a checkpoint keeps.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn to_load(
        config: &TrainingConfig,
        base: Option<FusedKvDecoder<B>>,
        device: &B::Device,
    ) -> Result<Self, TrainError> {
        match config.trainable {
            Some(Trainable::Lora(_)) => Self::start(config, base, device),
            // All that matters is in the record.
            _ => Ok(Self::of(
                config.model.init(device)?,
                config.routing.as_ref(),
            )?),
        }
    }

    /// A decoder whose adapters train alone.
    pub fn adapted(model: FusedKvDecoder<B>) -> Self {
        let base = fingerprint(&model, |name| !is_adapter(name));
        Self {
            kind: Kind::Adapters { base },
            model,
        }
    }

    /// A decoder all of whose parameters a record has.
    pub fn whole(model: FusedKvDecoder<B>) -> Self {
        let kind = Kind::Whole;
        Self { model, kind }
    }

    /// The decoder that is trained under each plan of a routing, in its order; of any other training
    /// the one there is.
    pub fn decoders(&self) -> Vec<FusedKvDecoder<B>> {
        match &self.kind {
            Kind::Routed { plans, .. } => {
                let plans = plans.iter();
                plans.map(|plan| self.model.under(plan)).collect()
            }
            _ => vec![self.model.clone()],
        }
    }

    /// What the layers of each of its [`decoders`](Self::decoders) read.
    pub fn layouts(&self) -> Vec<KvLayout> {
        match &self.kind {
            Kind::Routed { plans, .. } => plans.iter().map(|plan| plan.layout().clone()).collect(),
            _ => vec![self.model.layout().clone()],
        }
    }

    /// Whether a record is of this decoder.
    pub fn check_record(&self, record: &TraineeRecord<B>) -> Result<(), OtherRecord> {
        match (&self.kind, record) {
            (Kind::Whole, TraineeRecord::Whole(record)) => Ok(self.model.check_record(record)?),
            (Kind::Routed { plans, .. }, TraineeRecord::Routed { model, plans: of }) => {
                self.model.check_record(model)?;
                let mut pairs = plans.iter().zip(of);
                match plans.len() == of.len() && pairs.all(|(plan, of)| plan.is_of(of)) {
                    true => Ok(()),
                    false => Err(OtherRecord::Plans),
                }
            }
            (Kind::Adapters { base }, TraineeRecord::Adapters { base: of, adapters }) => {
                if base != of {
                    return Err(OtherRecord::Base);
                }
                let own = self.model.adapters().into_iter();
                let own: BTreeMap<_, _> = own
                    .map(|(layer, name, lora)| (path(layer, &name), [lora.a.dims(), lora.b.dims()]))
                    .collect();
                let found = adapters.iter();
                let found = found.map(|(name, [a, b])| (name.clone(), [a.dims(), b.dims()]));
                match own.into_iter().eq(found) {
                    true => Ok(()),
                    false => Err(OtherRecord::Adapters),
                }
            }
            (Kind::Routed { .. }, _) | (_, TraineeRecord::Routed { .. }) => Err(OtherRecord::Plans),
            _ => Err(OtherRecord::Adapters),
        }
    }
}

/// Where an adapter is.
fn path(layer: usize, projection: &str) -> String {
    format!("layers.{layer}.{projection}")
}

/// A record that is not of a training's decoder.
#[derive(Debug, thiserror::Error)]
pub(super) enum OtherRecord {
    #[error(transparent)]
    Decoder(#[from] RecordError),
    #[error("it holds adapters of another decoder")]
    Base,
    #[error("it does not hold the adapters that the run's configuration says")]
    Adapters,
    #[error("it does not hold what the plans of the run's routing need")]
    Plans,
}

/// A number that the parameters of other decoders most likely do not have, of those whose names count:
/// that of their numbers in f32.
pub(super) fn fingerprint<B: Backend>(model: &FusedKvDecoder<B>, counts: fn(&str) -> bool) -> u64 {
    struct Hash {
        path: ModulePath,
        counts: fn(&str) -> bool,
        hash: Xxh3Default,
    }

    impl<B: Backend> ModuleVisitor<B> for Hash {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let name = self.path.tensor();
            if (self.counts)(&name) {
                self.hash.update(name.as_bytes());
                self.hash
                    .update(param.val().into_data().convert::<f32>().as_bytes());
            }
        }
    }

    let mut visitor = Hash {
        path: ModulePath::default(),
        counts,
        hash: Xxh3Default::new(),
    };
    model.visit(&mut visitor);
    visitor.hash.digest()
}

impl<B: Backend> Module<B> for Trainee<B> {
    type Record = TraineeRecord<B>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        // What plans add is where their decoder is.
        self.model.collect_devices(devices)
    }

    fn fork(self, device: &B::Device) -> Self {
        rebuilt!(self, |module| Module::<B>::fork(module, device))
    }

    fn to_device(self, device: &B::Device) -> Self {
        rebuilt!(self, |module| Module::<B>::to_device(module, device))
    }

    /// What a plan adds has the names it has in a decoder of that plan, and so one name may be there once
    /// for each plan.
    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        self.model.visit(visitor);
        if let Kind::Routed { plans, .. } = &self.kind {
            for plan in plans {
                plan.visit(visitor);
            }
        }
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        rebuilt!(self, |module| Module::<B>::map(module, mapper))
    }

    /// A record that is of another decoder, which [`Trainee::check_record`] tells, changes nothing.
    fn load_record(mut self, record: TraineeRecord<B>) -> Self {
        match record {
            TraineeRecord::Whole(record) => Self {
                model: self.model.load_record(record),
                ..self
            },
            TraineeRecord::Routed { model, plans: of } => {
                self.model = self.model.load_record(model);
                if let Kind::Routed { plans, .. } = &mut self.kind {
                    let loaded = plans.drain(..).zip(of);
                    *plans = loaded.map(|(plan, of)| plan.load_record(of)).collect();
                }
                self
            }
            TraineeRecord::Adapters { mut adapters, .. } => {
                let load = |layer, name: &str, lora: &mut Lora<B>| {
                    if let Some([a, b]) = adapters.remove(&path(layer, name)) {
                        for (own, of) in [(&mut lora.a, a), (&mut lora.b, b)] {
                            let dtype = own.val().dtype();
                            let loaded = own.clone().load_record(of);
                            // Numbers are kept in f32, and only training has parameters round them.
                            *own = match loaded.val().dtype() == dtype {
                                true => loaded,
                                false => loaded.map(|numbers| numbers.cast(dtype)),
                            };
                        }
                    }
                    Ok::<_, Infallible>(())
                };
                let Ok(()) = self.model.try_for_each_adapter(load);
                self
            }
        }
    }

    fn into_record(self) -> TraineeRecord<B> {
        let base = match self.kind {
            Kind::Whole => return TraineeRecord::Whole(self.model.into_record()),
            Kind::Routed { plans, .. } => {
                return TraineeRecord::Routed {
                    model: self.model.into_record(),
                    plans: plans.into_iter().map(Module::into_record).collect(),
                };
            }
            Kind::Adapters { base } => base,
        };
        let adapters = self.model.adapters().into_iter();
        let adapters = adapters.map(|(layer, name, lora)| {
            let both = [&lora.a, &lora.b].map(|matrix| matrix.clone());
            (path(layer, &name), both)
        });
        TraineeRecord::Adapters {
            base,
            adapters: adapters.collect(),
        }
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for Trainee<B> {
    type InnerModule = Trainee<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        rebuilt!(self, |module| AutodiffModule::<B>::valid(module))
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        rebuilt!(module, |module| AutodiffModule::<B>::from_inner(module))
    }
}

impl<B: AutodiffBackend> TrainStep for Trainee<B> {
    type Input = Lesson<B>;
    type Output = LanguageOutput<B::InnerBackend>;

    /// # Panics
    /// As a decoder's, and if the lesson's plan is none of the trainee's.
    fn step(&self, lesson: Lesson<B>) -> TrainOutput<Self::Output> {
        match &self.kind {
            Kind::Routed { plans, .. } => {
                let plan = lesson
                    .plan
                    .expect("a routed training draws a plan for each step");
                TrainStep::step(&self.model.under(&plans[plan]), lesson)
            }
            _ => TrainStep::step(&self.model, lesson),
        }
    }
}

impl<B: Backend> InferenceStep for Trainee<B> {
    type Input = LanguageBatch<B>;
    type Output = LanguageOutput<B>;

    /// Of a routed training under every plan.
    fn step(&self, batch: Self::Input) -> Self::Output {
        let Kind::Routed { plans, shares } = &self.kind else {
            return InferenceStep::step(&self.model, batch);
        };
        let plans = plans.iter();
        let outputs = plans.map(|plan| InferenceStep::step(&self.model.under(plan), batch.clone()));
        LanguageOutput::of_plans(outputs.collect(), shares)
    }
}

impl<B: Backend> fmt::Display for Trainee<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.model.fmt(f)
    }
}

impl<B: Backend> ModuleDisplayDefault for Trainee<B> {
    fn content(&self, content: Content) -> Option<Content> {
        self.model.content(content)
    }
}

impl<B: Backend> ModuleDisplay for Trainee<B> {}
