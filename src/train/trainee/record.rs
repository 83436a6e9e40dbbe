//! Records of trainees, and how they are written.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use burn::module::Param;
use burn::record::{PrecisionSettings, Record};
use burn::tensor::{Tensor, backend::Backend};
use serde::de::value::{MapAccessDeserializer, StringDeserializer};
use serde::de::{DeserializeSeed, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::decoder::{DecoderRecord, OtherPlanRecord};

/// What a checkpoint keeps of a [`Trainee`](super::Trainee).
pub(in crate::train) enum TraineeRecord<B: Backend> {
    /// All of it, as a decoder's own record.
    Whole(DecoderRecord<B>),
    Adapters {
        /// The [`fingerprint`] of what they stand beside.
        base: u64,
        /// Both matrices of each.
        adapters: BTreeMap<String, [Param<Tensor<B, 2>>; 2]>,
    },
    Routed {
        /// The standard decoder's.
        model: DecoderRecord<B>,
        /// What each plan adds.
        plans: Vec<OtherPlanRecord<B>>,
    },
}

impl<B: Backend> Record<B> for TraineeRecord<B> {
    type Item<S: PrecisionSettings> = TraineeItem<
        <DecoderRecord<B> as Record<B>>::Item<S>,
        <Param<Tensor<B, 2>> as Record<B>>::Item<S>,
        <OtherPlanRecord<B> as Record<B>>::Item<S>,
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
            Self::Routed { model, plans } => TraineeItem::Routed(RoutedItems {
                routed_plans: plans.into_iter().map(Record::<B>::into_item).collect(),
                model: model.into_item(),
            }),
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
            TraineeItem::Routed(items) => {
                let plans = items.routed_plans.into_iter();
                Self::Routed {
                    model: Record::<B>::from_item(items.model, device),
                    plans: plans
                        .map(|item| Record::<B>::from_item(item, device))
                        .collect(),
                }
            }
        }
    }
}

/// A [`TraineeRecord`] in a file: the whole decoder is written as it was before there was anything
/// else, and told apart by the first key. `W` is the item of a decoder, `P` of a matrix, `O` of what a
/// plan adds.
#[derive(Clone)]
pub(in crate::train) enum TraineeItem<W, P, O> {
    Whole(W),
    Adapters(AdapterItems<P>),
    Routed(RoutedItems<W, O>),
}

#[derive(Clone, Serialize, Deserialize)]
pub(in crate::train) struct AdapterItems<P> {
    base_fingerprint: u64,
    adapters: BTreeMap<String, [P; 2]>,
}

#[derive(Clone, Serialize, Deserialize)]
pub(in crate::train) struct RoutedItems<W, O> {
    routed_plans: Vec<O>,
    model: W,
}

/// The first key of [`AdapterItems`], which no decoder's record has.
const OF_ADAPTERS: &str = "base_fingerprint";
/// The first key of [`RoutedItems`].
const OF_PLANS: &str = "routed_plans";

impl<W: Serialize, P: Serialize, O: Serialize> Serialize for TraineeItem<W, P, O> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Whole(item) => item.serialize(serializer),
            Self::Adapters(items) => items.serialize(serializer),
            Self::Routed(items) => items.serialize(serializer),
        }
    }
}

impl<'de, W, P, O> Deserialize<'de> for TraineeItem<W, P, O>
where
    W: Deserialize<'de>,
    P: Deserialize<'de>,
    O: Deserialize<'de>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByFirstKey<W, P, O>(PhantomData<(W, P, O)>);

        impl<'de, W, P, O> Visitor<'de> for ByFirstKey<W, P, O>
        where
            W: Deserialize<'de>,
            P: Deserialize<'de>,
            O: Deserialize<'de>,
        {
            type Value = TraineeItem<W, P, O>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a decoder's record, one of its adapters, or one with several plans")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let first: Option<String> = map.next_key()?;
                let key = first.clone();
                let all = MapAccessDeserializer::new(WithFirst { first, rest: map });
                match key.as_deref() {
                    Some(OF_ADAPTERS) => Deserialize::deserialize(all).map(TraineeItem::Adapters),
                    Some(OF_PLANS) => Deserialize::deserialize(all).map(TraineeItem::Routed),
                    _ => Deserialize::deserialize(all).map(TraineeItem::Whole),
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
