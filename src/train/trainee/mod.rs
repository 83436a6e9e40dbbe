//! What a training trains, and what its checkpoints keep of it: all of a decoder, or its adapters
//! alone, which are small beside the base that they leave as it is.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;

use burn::module::{
    AutodiffModule, Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
    ModuleVisitor, Param,
};
use burn::record::{PrecisionSettings, Record};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn_train::{InferenceStep, TrainOutput, TrainStep};
use serde::de::value::{MapAccessDeserializer, StringDeserializer};
use serde::de::{DeserializeSeed, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::Xxh3Default;

use super::batch::LanguageBatch;
use super::config::TrainingConfig;
use super::error::TrainError;
use super::objective::Lesson;
use super::step::LanguageOutput;
use super::trainable::Trainable;
use crate::decoder::{DecoderRecord, FusedKvDecoder, Lora, RecordError};
use crate::parameters::ModulePath;

/// A decoder that is trained.
#[derive(Clone, Debug)]
pub(super) struct Trainee<B: Backend> {
    pub model: FusedKvDecoder<B>,
    /// Where its adapters train and nothing else: the [`fingerprint`] of the base.
    base: Option<u64>,
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
            return Ok(Self { model, base: None });
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
            None => Self {
                model: model.with_float_weights(),
                base: None,
            },
        })
    }

    /// A decoder whose adapters train alone.
    pub fn adapted(model: FusedKvDecoder<B>) -> Self {
        Self {
            base: Some(fingerprint(&model)),
            model,
        }
    }

    /// A decoder all of whose parameters a record has.
    pub fn whole(model: FusedKvDecoder<B>) -> Self {
        Self { model, base: None }
    }

    pub fn map_model(self, f: impl FnOnce(FusedKvDecoder<B>) -> FusedKvDecoder<B>) -> Self {
        Self {
            model: f(self.model),
            base: self.base,
        }
    }

    /// Whether a record is of this decoder.
    pub fn check_record(&self, record: &TraineeRecord<B>) -> Result<(), OtherRecord> {
        match (self.base, record) {
            (None, TraineeRecord::Whole(record)) => Ok(self.model.check_record(record)?),
            (Some(base), TraineeRecord::Adapters { base: of, adapters }) => {
                if base != *of {
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
}

/// A number that the parameters of other decoders most likely do not have, adapters left out: that of
/// their numbers in f32.
fn fingerprint<B: Backend>(model: &FusedKvDecoder<B>) -> u64 {
    struct Hash(ModulePath, Xxh3Default);

    impl<B: Backend> ModuleVisitor<B> for Hash {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let name = self.0.tensor();
            if !is_adapter(&name) {
                self.1.update(name.as_bytes());
                self.1
                    .update(param.val().into_data().convert::<f32>().as_bytes());
            }
        }
    }

    let mut hash = Hash(ModulePath::default(), Xxh3Default::new());
    model.visit(&mut hash);
    hash.1.digest()
}

/// Whether a parameter is of an adapter, by its name.
pub(super) fn is_adapter(name: &str) -> bool {
    name.contains(".lora.")
}

impl<B: Backend> Module<B> for Trainee<B> {
    type Record = TraineeRecord<B>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        self.model.collect_devices(devices)
    }

    fn fork(self, device: &B::Device) -> Self {
        self.map_model(|model| model.fork(device))
    }

    fn to_device(self, device: &B::Device) -> Self {
        self.map_model(|model| model.to_device(device))
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        self.model.visit(visitor);
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        self.map_model(|model| model.map(mapper))
    }

    /// A record that is of another decoder, which [`Trainee::check_record`] tells, changes nothing.
    fn load_record(mut self, record: TraineeRecord<B>) -> Self {
        match record {
            TraineeRecord::Whole(record) => self.map_model(|model| model.load_record(record)),
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
        let Some(base) = self.base else {
            return TraineeRecord::Whole(self.model.into_record());
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
        Trainee {
            model: self.model.valid(),
            base: self.base,
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        Self {
            model: FusedKvDecoder::from_inner(module.model),
            base: module.base,
        }
    }
}

impl<B: AutodiffBackend> TrainStep for Trainee<B> {
    type Input = Lesson<B>;
    type Output = LanguageOutput<B::InnerBackend>;

    fn step(&self, lesson: Lesson<B>) -> TrainOutput<Self::Output> {
        TrainStep::step(&self.model, lesson)
    }
}

impl<B: Backend> InferenceStep for Trainee<B> {
    type Input = LanguageBatch<B>;
    type Output = LanguageOutput<B>;

    fn step(&self, batch: Self::Input) -> Self::Output {
        InferenceStep::step(&self.model, batch)
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

/// What a checkpoint keeps of a [`Trainee`].
pub(super) enum TraineeRecord<B: Backend> {
    /// All of it, as a decoder's own record.
    Whole(DecoderRecord<B>),
    Adapters {
        /// The [`fingerprint`] of what they stand beside.
        base: u64,
        /// Both matrices of each.
        adapters: BTreeMap<String, [Param<Tensor<B, 2>>; 2]>,
    },
}

impl<B: Backend> Record<B> for TraineeRecord<B> {
    type Item<S: PrecisionSettings> = TraineeItem<
        <DecoderRecord<B> as Record<B>>::Item<S>,
        <Param<Tensor<B, 2>> as Record<B>>::Item<S>,
    >;

    fn into_item<S: PrecisionSettings>(self) -> Self::Item<S> {
        match self {
            Self::Whole(record) => TraineeItem::Whole(record.into_item()),
            Self::Adapters { base, adapters } => {
                let adapters = adapters.into_iter();
                let item = |(name, both): (String, [Param<Tensor<B, 2>>; 2])| {
                    (name, both.map(Record::<B>::into_item))
                };
                TraineeItem::Adapters(AdapterItems {
                    base_fingerprint: base,
                    adapters: adapters.map(item).collect(),
                })
            }
        }
    }

    fn from_item<S: PrecisionSettings>(item: Self::Item<S>, device: &B::Device) -> Self {
        match item {
            TraineeItem::Whole(item) => Self::Whole(Record::<B>::from_item(item, device)),
            TraineeItem::Adapters(items) => {
                let adapters = items.adapters.into_iter().map(|(name, both)| {
                    (name, both.map(|item| Record::<B>::from_item(item, device)))
                });
                Self::Adapters {
                    base: items.base_fingerprint,
                    adapters: adapters.collect(),
                }
            }
        }
    }
}

/// A [`TraineeRecord`] in a file: the whole decoder is written as it was before there were adapters,
/// and told apart by the first key.
#[derive(Clone)]
pub(super) enum TraineeItem<W, P> {
    Whole(W),
    Adapters(AdapterItems<P>),
}

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct AdapterItems<P> {
    base_fingerprint: u64,
    adapters: BTreeMap<String, [P; 2]>,
}

/// The first key of [`AdapterItems`], which no decoder's record has.
const FIRST_KEY: &str = "base_fingerprint";

impl<W: Serialize, P: Serialize> Serialize for TraineeItem<W, P> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Whole(item) => item.serialize(serializer),
            Self::Adapters(items) => items.serialize(serializer),
        }
    }
}

impl<'de, W: Deserialize<'de>, P: Deserialize<'de>> Deserialize<'de> for TraineeItem<W, P> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByFirstKey<W, P>(PhantomData<(W, P)>);

        impl<'de, W: Deserialize<'de>, P: Deserialize<'de>> Visitor<'de> for ByFirstKey<W, P> {
            type Value = TraineeItem<W, P>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a decoder's record or one of its adapters")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let first: Option<String> = map.next_key()?;
                let adapters = first.as_deref() == Some(FIRST_KEY);
                let whole = MapAccessDeserializer::new(WithFirst { first, rest: map });
                match adapters {
                    true => Deserialize::deserialize(whole).map(TraineeItem::Adapters),
                    false => Deserialize::deserialize(whole).map(TraineeItem::Whole),
                }
            }
        }

        deserializer.deserialize_map(ByFirstKey(PhantomData))
    }
}

/// A map whose first key has been read.
struct WithFirst<A> {
    first: Option<String>,
    rest: A,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for WithFirst<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        match self.first.take() {
            Some(first) => seed.deserialize(StringDeserializer::new(first)).map(Some),
            None => self.rest.next_key_seed(seed),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.rest.next_value_seed(seed)
    }
}
