//! Records of decoders, which carry the plan they are of.
//!
//! Burn loads a record module by module and drops an optional one that only the module or only the
//! record has. A record of another plan would thus become a decoder without some of its weights, or
//! with the weights of another method; [`FusedKvDecoder::try_load_record`] refuses it.

use std::marker::PhantomData;
use std::sync::Arc;

use burn::module::{
    AutodiffModule, Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
    ModuleVisitor,
};
use burn::record::{PrecisionSettings, Record};
use burn::tensor::backend::{AutodiffBackend, Backend};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::FusedKvDecoder;
use crate::plan::{KvLayout, KvPart, KvSource, LayerKv, SourceForm};

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
        /// Its path, as in `layers.3.self_attn.k_proj`.
        parameter: String,
        /// Whether it is the record that has it.
        in_record: bool,
    },
}

fn has(it: bool) -> &'static str {
    if it { "has" } else { "lacks" }
}

/// What a decoder's record is made of.
pub type DecoderRecord<B> = <FusedKvDecoder<B> as Module<B>>::Record;

impl<B: Backend> FusedKvDecoder<B> {
    /// [`Module::load_record`] of a record of this decoder's plan.
    ///
    /// Records know their plan since version 0.1; older ones are told apart by what parameters they
    /// have.
    ///
    /// # Errors
    /// [`RecordError`] naming the layer, or the parameter, that differs.
    pub fn try_load_record(self, record: DecoderRecord<B>) -> Result<Self, RecordError> {
        self.check_record(&record)?;
        Ok(self.load_record(record))
    }

    /// Whether a record is of this decoder.
    pub(crate) fn check_record(&self, record: &DecoderRecord<B>) -> Result<(), RecordError> {
        record.plan.check(&self.plan.layout)?;
        if record.layers.len() != self.layers.len() {
            return Err(RecordError::Depth {
                record: record.layers.len(),
                decoder: self.layers.len(),
            });
        }
        let check = |parameter: &str, own: bool, in_record: bool| {
            if own == in_record {
                return Ok(());
            }
            Err(RecordError::Parameter {
                parameter: parameter.to_owned(),
                in_record,
            })
        };
        macro_rules! check_own {
            ($($module:ident),+) => {
                $(check(stringify!($module), self.$module.is_some(), record.$module.is_some())?;)+
            };
        }
        check_own!(
            lm_head,
            embed_tokens_per_layer,
            per_layer_model_projection,
            per_layer_projection_norm
        );
        for (i, (own, record)) in self.layers.iter().zip(&record.layers).enumerate() {
            // Whether one of them has what the other may lack.
            macro_rules! has {
                ($of:ident.$($module:ident).+ =>) => { $of.$($module).+.is_some() };
                ($of:ident.$($module:ident).+ => $field:ident) => {
                    $of.$($module).+.as_ref().is_some_and(|module| module.$field.is_some())
                };
            }
            macro_rules! check {
                ($($module:ident).+ => $($field:ident)?) => {{
                    let own = has!(own.$($module).+ => $($field)?);
                    let record = has!(record.$($module).+ => $($field)?);
                    let name = concat!($(".", stringify!($module)),+ $(, ".", stringify!($field))?);
                    check(&format!("layers.{i}{name}"), own, record)?;
                }};
            }
            check!(input_layernorm =>);
            check!(pre_feedforward_layernorm =>);
            check!(post_feedforward_layernorm =>);
            check!(per_layer_input_gate =>);
            check!(per_layer_input_gate => lora);
            check!(per_layer_projection =>);
            check!(per_layer_projection => lora);
            check!(post_per_layer_input_norm =>);
            check!(layer_scalar =>);
            check!(self_attn.q_proj.bias =>);
            check!(self_attn.q_proj.lora =>);
            check!(self_attn.k_proj =>);
            check!(self_attn.k_proj => bias);
            check!(self_attn.k_proj => lora);
            check!(self_attn.v_proj =>);
            check!(self_attn.v_proj => bias);
            check!(self_attn.v_proj => lora);
            check!(self_attn.o_proj.bias =>);
            check!(self_attn.o_proj.lora =>);
            check!(self_attn.q_norm =>);
            check!(self_attn.k_norm =>);
            check!(self_attn.kv_fusion => key_weight);
            check!(self_attn.kv_fusion => value_weight);
            check!(self_attn.kv_residual => key_weight);
            check!(self_attn.kv_residual => value_weight);
            check!(mlp.gate_proj.bias =>);
            check!(mlp.gate_proj.lora =>);
            check!(mlp.up_proj.bias =>);
            check!(mlp.up_proj.lora =>);
            check!(mlp.down_proj.bias =>);
            check!(mlp.down_proj.lora =>);
        }
        Ok(())
    }
}

/// A decoder's plan among its modules: no parameters, but a part of its record.
#[derive(Clone, Debug)]
pub struct PlanModule<B: Backend> {
    pub(super) layout: Arc<KvLayout>,
    backend: PhantomData<B>,
}

/// What each layer of a recorded decoder does; none in records of before they were kept.
#[derive(Clone, Debug, Default)]
pub struct PlanRecord(Option<Vec<LayerKv>>);

impl PlanRecord {
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

impl<B: Backend> PlanModule<B> {
    pub(super) fn new(layout: KvLayout) -> Self {
        Self::of(Arc::new(layout))
    }

    fn of(layout: Arc<KvLayout>) -> Self {
        Self {
            layout,
            backend: PhantomData,
        }
    }
}

impl<B: Backend> Module<B> for PlanModule<B> {
    type Record = PlanRecord;

    /// # Panics
    /// If the record is of another plan, because Burn's loading knows no errors;
    /// [`FusedKvDecoder::try_load_record`] returns them.
    fn load_record(self, record: PlanRecord) -> Self {
        if let Err(error) = record.check(&self.layout) {
            panic!("{error}; `try_load_record` returns this as an error");
        }
        self
    }

    fn into_record(self) -> PlanRecord {
        PlanRecord(Some(self.layout.layers().to_vec()))
    }

    fn visit<V: ModuleVisitor<B>>(&self, _visitor: &mut V) {}

    fn map<M: ModuleMapper<B>>(self, _mapper: &mut M) -> Self {
        self
    }

    fn to_device(self, _device: &B::Device) -> Self {
        self
    }

    fn fork(self, _device: &B::Device) -> Self {
        self
    }

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        devices
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for PlanModule<B> {
    type InnerModule = PlanModule<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        PlanModule::of(self.layout.clone())
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        Self::of(module.layout)
    }
}

impl<B: Backend> ModuleDisplayDefault for PlanModule<B> {
    fn content(&self, content: Content) -> Option<Content> {
        let [keys, values] = KvPart::BOTH.map(|part| self.layout.n_stored(part));
        let layers = self.layout.n_layers();
        content
            .add_formatted(&format!(
                "of {layers} layers, {keys} store keys, {values} values"
            ))
            .optional()
    }
}

impl<B: Backend> ModuleDisplay for PlanModule<B> {}

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
