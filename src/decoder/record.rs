//! Records of decoders, which carry the plan they are of.
//!
//! Burn loads a record module by module, drops an optional one that only the module or only the record
//! has, and looks at no shape. A record of another plan would thus become a decoder without some of its
//! weights, or with the weights of another method. A decoder compares all of a record with itself first:
//! [`FusedKvDecoder::try_load_record`] returns what differs, Burn's `load_record` panics with it.

use burn::module::{EmptyRecord, Module};
use burn::record::{PrecisionSettings, Record};
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::listed::tensors_of;
use super::{DecoderLayer, Embedding, FusedKvDecoder, Norm, Projection};
use crate::parameters::TensorSpec;
use crate::plan::{KvLayout, KvSource, LayerKv, SourceForm};

/// A record that is not of this decoder.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The record has another number of layers.
    #[error("the record has {record} layers, the decoder {decoder}")]
    Depth {
        /// Layers of the record.
        record: usize,
        /// Layers of the decoder.
        decoder: usize,
    },
    /// A layer gets its keys and values from elsewhere.
    #[error("layer {layer} of the record has {record}, of the decoder {decoder}")]
    Plan {
        /// The layer, counted from 0.
        layer: usize,
        /// What it does in the record's plan.
        record: Box<LayerKv>,
        /// What it does in the decoder's.
        decoder: Box<LayerKv>,
    },
    /// A parameter that only one of them has.
    #[error("the record {} `{parameter}`, which the decoder {}", has(*.in_record), has(!*.in_record))]
    Parameter {
        /// Its name in a checkpoint, as in `model.layers.3.self_attn.k_proj.weight`.
        parameter: String,
        /// Whether it is the record that has it.
        in_record: bool,
    },
    /// A parameter of another shape.
    #[error("`{parameter}` of the record has shape {record:?}, of the decoder {decoder:?}")]
    Shape {
        /// Its name in a checkpoint.
        parameter: String,
        /// Its shape in the record, as in memory.
        record: Vec<usize>,
        /// Its shape in the decoder.
        decoder: Vec<usize>,
    },
}

fn has(it: bool) -> &'static str {
    if it { "has" } else { "lacks" }
}

/// A decoder's parameters, and the plan they are of.
#[derive(Record)]
pub struct DecoderRecord<B: Backend> {
    /// Which layers store, what the others read.
    pub plan: PlanRecord,
    /// Vectors of tokens.
    pub embed_tokens: RecordOf<B, Embedding<B>>,
    /// What layers are given of the tokens themselves.
    pub embed_tokens_per_layer: Option<RecordOf<B, Embedding<B>>>,
    /// As `embed_tokens_per_layer`.
    pub per_layer_model_projection: Option<RecordOf<B, Projection<B>>>,
    /// As `embed_tokens_per_layer`.
    pub per_layer_projection_norm: Option<RecordOf<B, Norm<B>>>,
    /// The layers, bottom first.
    pub layers: Vec<RecordOf<B, DecoderLayer<B>>>,
    /// Before the head.
    pub norm: RecordOf<B, Norm<B>>,
    /// The head, where it is not the embedding.
    pub lm_head: Option<RecordOf<B, Projection<B>>>,
    // One for each field that was no parameter when records were first written: binary ones have a
    // byte for it.
    pub(super) dropout: EmptyRecord,
    pub(super) ropes: EmptyRecord,
    pub(super) windows: EmptyRecord,
    pub(super) cache_shape: EmptyRecord,
    pub(super) config: EmptyRecord,
    pub(super) prefill_chunk: EmptyRecord,
}

/// The record of a module `M`.
pub(super) type RecordOf<B, M> = <M as Module<B>>::Record;

impl<B: Backend> FusedKvDecoder<B> {
    /// [`Module::load_record`] of a record of this decoder's plan, block and sizes.
    ///
    /// Records know their plan since version 0.1; older ones are told apart by what parameters they
    /// have.
    ///
    /// # Errors
    /// [`RecordError`] naming the layer, or the parameter, that differs.
    pub fn try_load_record(self, record: DecoderRecord<B>) -> Result<Self, RecordError> {
        self.check_record(&record)?;
        Ok(self.load_checked(record))
    }

    /// Whether a record is of this decoder.
    pub(crate) fn check_record(&self, record: &DecoderRecord<B>) -> Result<(), RecordError> {
        record.plan.check(&self.layout)?;
        if record.layers.len() != self.layers.len() {
            return Err(RecordError::Depth {
                record: record.layers.len(),
                decoder: self.layers.len(),
            });
        }
        let (found, expected) = (record.tensors(), tensors_of(self));
        let alike = found.iter().zip(&expected).take_while(|(a, b)| a == b);
        let at = alike.count();
        let has = |tensors: &[TensorSpec], name: &str| tensors.iter().any(|t| t.name == name);
        match (found.get(at), expected.get(at)) {
            (Some(found), Some(expected)) if found.name == expected.name => {
                Err(RecordError::Shape {
                    parameter: found.name.clone(),
                    record: found.shape.clone(),
                    decoder: expected.shape.clone(),
                })
            }
            (Some(one), _) if !has(&expected, &one.name) => Err(RecordError::Parameter {
                parameter: one.name.clone(),
                in_record: true,
            }),
            (_, Some(one)) => Err(RecordError::Parameter {
                parameter: one.name.clone(),
                in_record: false,
            }),
            (_, None) => Ok(()),
        }
    }
}

/// What each layer of a recorded decoder does; none in records of before they were kept.
#[derive(Clone, Debug, Default)]
pub struct PlanRecord(Option<Vec<LayerKv>>);

impl PlanRecord {
    pub(super) fn new(layout: &KvLayout) -> Self {
        Self(Some(layout.layers().to_vec()))
    }

    fn check(&self, layout: &KvLayout) -> Result<(), RecordError> {
        let (Some(record), decoder) = (&self.0, layout.layers()) else {
            return Ok(());
        };
        if record.len() != decoder.len() {
            return Err(RecordError::Depth {
                record: record.len(),
                decoder: decoder.len(),
            });
        }
        match record.iter().zip(decoder).position(|(a, b)| a != b) {
            Some(layer) => Err(RecordError::Plan {
                layer,
                record: Box::new(record[layer].clone()),
                decoder: Box::new(decoder[layer].clone()),
            }),
            None => Ok(()),
        }
    }
}

/// A layer of a plan as records hold it: also in formats that do not describe themselves.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordedLayer {
    /// As it is written.
    Layer {
        /// Where its keys come from.
        key: SourceForm,
        /// Where its values come from.
        value: SourceForm,
    },
    /// Both are the layer's own: as it was before keys and values were planned apart.
    Store {
        /// What is added to both.
        #[serde(default)]
        residual: Option<usize>,
    },
    /// Neither is, from the same time.
    Reuse {
        /// Where its keys come from.
        key: SourceForm,
        /// Where its values come from.
        value: SourceForm,
    },
}

impl From<LayerKv> for RecordedLayer {
    fn from(LayerKv { key, value }: LayerKv) -> Self {
        Self::Layer {
            key: key.into(),
            value: value.into(),
        }
    }
}

impl From<RecordedLayer> for LayerKv {
    fn from(layer: RecordedLayer) -> Self {
        match layer {
            RecordedLayer::Layer { key, value } | RecordedLayer::Reuse { key, value } => Self {
                key: key.into(),
                value: value.into(),
            },
            RecordedLayer::Store { residual } => Self {
                key: KvSource::Own { residual },
                value: KvSource::Own { residual },
            },
        }
    }
}

impl<B: Backend> Record<B> for PlanRecord {
    type Item<S: PrecisionSettings> = Option<Vec<RecordedLayer>>;

    fn into_item<S: PrecisionSettings>(self) -> Self::Item<S> {
        let layers = self.0?;
        Some(layers.into_iter().map(RecordedLayer::from).collect())
    }

    fn from_item<S: PrecisionSettings>(item: Self::Item<S>, _device: &B::Device) -> Self {
        Self(item.map(|layers| layers.into_iter().map(LayerKv::from).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As records named layers before keys and values were planned apart.
    #[test]
    fn older_layers_are_read() {
        let read = |json: &str| LayerKv::from(serde_json::from_str::<RecordedLayer>(json).unwrap());
        assert_eq!(read(r#"{"store":{}}"#), LayerKv::OWN);
        let own = KvSource::Own { residual: Some(0) };
        let added = read(r#"{"store":{"residual":0}}"#);
        assert_eq!((&added.key, &added.value), (&own, &own));
        let reused = read(
            r#"{"reuse":{"key":{"as_is":1},
                         "value":{"blend":{"sources":[0,1],"weights":"per_layer"}}}}"#,
        );
        assert_eq!(reused.key, KvSource::AsIs(1));
        assert!(matches!(reused.value, KvSource::Blend { .. }));
    }
}
