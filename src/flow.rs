//! Where reusing layers take their keys and values from: the FusedKV paper's probe.
//!
//! A decoder of [`KvPlan::DenseFusion`](crate::KvPlan::DenseFusion) learns one scalar per layer and
//! source. The paper finds that values come from the lowest layers, keys from the middle
//! (arXiv 2512.03870); [`information_flow`] reads the same off any model.

use burn::module::Param;
use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::decoder::FusedKvDecoder;
use crate::plan::KvPart;

/// The weights of all layers that reuse keys, and of all that reuse values: they may be others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InformationFlow {
    /// Depth of the decoder.
    pub n_layers: usize,
    /// Of the keys, bottom layer first.
    pub keys: Vec<LayerFlow>,
    /// Of the values, bottom layer first.
    pub values: Vec<LayerFlow>,
}

/// What one layer reads, and how much of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerFlow {
    /// The layer, counted from 0.
    pub layer: usize,
    /// The stored layers it reads, counted from 0.
    pub sources: Vec<usize>,
    /// The magnitude of each source's weight, averaged over kv heads and channels; 1 where the
    /// plan takes a source as it is.
    pub weights: Vec<f64>,
}

/// The magnitudes of a decoder's fusion weights.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::{FusedKvDecoderConfig, KvPlan, information_flow};
///
/// let config = FusedKvDecoderConfig::tiny(64, KvPlan::DenseFusion { storage_layers: 3 });
/// let model = config.init::<Flex>(&FlexDevice::default())?;
/// let flow = information_flow(&model);
/// assert_eq!(flow.keys[0].layer, 3);
/// assert_eq!(flow.keys[0].weights, [0.0, 0.0, 1.0]); // it starts as FusedKV-Lite
/// assert_eq!(flow.values[0].weights, [1.0, 0.0, 0.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn information_flow<B: Backend>(model: &FusedKvDecoder<B>) -> InformationFlow {
    let mut flow = InformationFlow {
        n_layers: model.layers.len(),
        keys: Vec::new(),
        values: Vec::new(),
    };
    let layout = model.layout();
    for (layer, kv) in layout.layers().iter().enumerate() {
        let attention = &model.layers[layer].self_attn;
        for (part, flows) in [
            (KvPart::Key, &mut flow.keys),
            (KvPart::Value, &mut flow.values),
        ] {
            if kv.part(part).is_own() {
                continue;
            }
            let (sources, weights) = (layout.sources(part, layer), attention.blend(part));
            flows.push(layer_flow(layer, sources, weights));
        }
    }
    flow
}

fn layer_flow<B: Backend>(
    layer: usize,
    sources: &[usize],
    weight: Option<&Param<Tensor<B, 3>>>,
) -> LayerFlow {
    let weights = match weight {
        None => vec![1.0; sources.len()],
        Some(weight) => {
            let weights: Vec<f64> = weight.val().into_data().iter().collect();
            weights
                .chunks(weights.len() / sources.len())
                .map(|source| source.iter().map(|w| w.abs()).sum::<f64>() / source.len() as f64)
                .collect()
        }
    };
    LayerFlow {
        layer,
        sources: sources.to_vec(),
        weights,
    }
}
