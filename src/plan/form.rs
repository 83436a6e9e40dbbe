//! Plans as JSON spells them: a checkpoint's `kv_plan`.
//!
//! A layer that has nothing but keys and values of its own, or none of its own, is written as it was
//! before they were planned apart, so that older readers know it.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::PlanError;
use super::layout::{BlendWeights, KvSource, LayerKv};
use super::{CUSTOM, KvPlan, METHODS, Method, Parameter};

/// `{"method": …}` with what belongs to the method, and nothing else.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlanForm {
    method: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    storage_layers: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    factor: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layers: Option<Vec<LayerKv>>,
}

impl From<KvPlan> for PlanForm {
    fn from(mut plan: KvPlan) -> Self {
        let mut form = Self {
            method: plan.method().to_owned(),
            storage_layers: plan.storage_layers_mut().copied(),
            ..Self::default()
        };
        match plan {
            KvPlan::Cla { factor } => form.factor = Some(factor),
            KvPlan::Custom { layers } => form.layers = Some(layers),
            _ => {}
        }
        form
    }
}

impl TryFrom<PlanForm> for KvPlan {
    type Error = PlanError;

    fn try_from(form: PlanForm) -> Result<Self, PlanError> {
        let PlanForm {
            method: name,
            storage_layers,
            factor,
            layers,
        } = form;
        let known = METHODS.iter().find(|known| known.name == name);
        let expected = match known {
            Some(Method { parameter, .. }) => match parameter {
                Parameter::None => None,
                Parameter::StorageLayers => Some("storage_layers"),
                Parameter::Factor => Some("factor"),
            },
            None if name == CUSTOM => Some("layers"),
            None => return Err(PlanError::UnknownMethod(name)),
        };
        for (key, is_there) in [
            ("storage_layers", storage_layers.is_some()),
            ("factor", factor.is_some()),
            ("layers", layers.is_some()),
        ] {
            match (expected == Some(key), is_there) {
                (true, false) => return Err(PlanError::MissingKey { method: name, key }),
                // The format lets `standard` have it.
                (false, true) if key == "storage_layers" && expected.is_none() => {}
                (false, true) => return Err(PlanError::UnknownKey { method: name, key }),
                _ => {}
            }
        }
        Ok(match (known, layers) {
            (Some(method), _) => (method.plan)(storage_layers.or(factor).unwrap_or_default()),
            (None, layers) => KvPlan::Custom {
                layers: layers.unwrap_or_default(),
            },
        })
    }
}

/// `{"store": {…}}`, `{"reuse": {…}}` or `{"key": …, "value": …}`.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayerForm {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    store: Option<StoreForm>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reuse: Option<ReuseForm>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<KvSource>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<KvSource>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreForm {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    residual: Option<usize>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReuseForm {
    key: KvSource,
    value: KvSource,
}

impl From<LayerKv> for LayerForm {
    fn from(LayerKv { key, value }: LayerKv) -> Self {
        use KvSource::Own;
        let mut form = Self::default();
        match (&key, &value) {
            (Own { residual: a }, Own { residual: b }) if a == b => {
                form.store = Some(StoreForm { residual: *a });
            }
            (Own { .. }, _) | (_, Own { .. }) => {
                (form.key, form.value) = (Some(key), Some(value));
            }
            // Also blends that a layer's own are part of, which older readers refuse.
            _ => form.reuse = Some(ReuseForm { key, value }),
        }
        form
    }
}

impl TryFrom<LayerForm> for LayerKv {
    type Error = PlanError;

    fn try_from(form: LayerForm) -> Result<Self, PlanError> {
        match (form.store, form.reuse, form.key, form.value) {
            (Some(StoreForm { residual }), None, None, None) => {
                let own = KvSource::Own { residual };
                Ok(Self {
                    key: own.clone(),
                    value: own,
                })
            }
            (None, Some(ReuseForm { key, value }), None, None)
                if !key.is_own() && !value.is_own() =>
            {
                Ok(Self { key, value })
            }
            (None, None, Some(key), Some(value)) => Ok(Self { key, value }),
            _ => Err(PlanError::LayerForm),
        }
    }
}

/// A source as an object of one key, in JSON and in records.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SourceForm {
    /// [`KvSource::Own`]; JSON writes one without a residual `"own"`.
    Own {
        /// What is added.
        #[serde(default)]
        residual: Option<usize>,
    },
    /// [`KvSource::AsIs`].
    AsIs(usize),
    /// [`KvSource::Blend`].
    Blend {
        /// The stored layers.
        sources: Vec<usize>,
        /// What shares one weight.
        weights: BlendWeights,
    },
}

impl From<KvSource> for SourceForm {
    fn from(source: KvSource) -> Self {
        match source {
            KvSource::Own { residual } => Self::Own { residual },
            KvSource::AsIs(source) => Self::AsIs(source),
            KvSource::Blend { sources, weights } => Self::Blend { sources, weights },
        }
    }
}

impl From<SourceForm> for KvSource {
    fn from(form: SourceForm) -> Self {
        match form {
            SourceForm::Own { residual } => Self::Own { residual },
            SourceForm::AsIs(source) => Self::AsIs(source),
            SourceForm::Blend { sources, weights } => Self::Blend { sources, weights },
        }
    }
}

const OWN: &str = "own";

impl Serialize for KvSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if *self == Self::OWN {
            return serializer.serialize_str(OWN);
        }
        SourceForm::from(self.clone()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for KvSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SourceVisitor)
    }
}

struct SourceVisitor;

impl<'de> Visitor<'de> for SourceVisitor {
    type Value = KvSource;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"own\", or an object with `own`, `as_is` or `blend`")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<KvSource, E> {
        match name {
            OWN => Ok(KvSource::OWN),
            _ => Err(E::invalid_value(Unexpected::Str(name), &self)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<KvSource, A::Error> {
        SourceForm::deserialize(MapAccessDeserializer::new(map)).map(KvSource::from)
    }
}
