//! The learned blend of stored keys and values: a_i1 ⊙ K_1 + a_in ⊙ K_n and
//! b_i1 ⊙ V_1 + b_in ⊙ V_n (arXiv 2512.03870), for any number of sources.

use burn::module::{Module, Param};
use burn::tensor::{Distribution, Tensor, TensorData, backend::Backend};

use crate::config::{FusionInit, FusionStart};
use crate::plan::{KvPart, KvShape, KvSource};

/// Configuration of a [`KvFusion`].
#[derive(Clone, Debug, PartialEq)]
pub struct KvFusionConfig {
    /// Heads and channels of the sources.
    pub kv: KvShape,
    /// Where the keys come from.
    pub key: KvSource,
    /// Where the values come from.
    pub value: KvSource,
    /// Where the weights start.
    pub init: FusionInit,
}

impl KvFusionConfig {
    /// A fusion layer, or none if the plan takes keys and values as they are.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Option<KvFusion<B>> {
        let key_weight = self.weight(KvPart::Key, device);
        let value_weight = self.weight(KvPart::Value, device);
        if key_weight.is_none() && value_weight.is_none() {
            return None;
        }
        Some(KvFusion {
            key_weight,
            value_weight,
            rotated_pairs: self.kv.shared_pairs(KvPart::Key),
        })
    }

    fn weight<B: Backend>(&self, part: KvPart, device: &B::Device) -> Option<Param<Tensor<B, 3>>> {
        let source = match part {
            KvPart::Key => &self.key,
            KvPart::Value => &self.value,
        };
        let KvSource::Blend { sources, .. } = source else {
            return None;
        };
        let shape = source.weights_shape(part, &self.kv)?;
        let [n_sources, heads, channels] = shape;
        let lite = lite_source(part, sources);
        let start: Vec<f64> = sources
            .iter()
            .flat_map(|source| {
                let mean = match self.init.start {
                    FusionStart::Lite if lite == Some(*source) => 1.0,
                    FusionStart::Lite => 0.0,
                    FusionStart::Equal => 1.0 / n_sources as f64,
                };
                std::iter::repeat_n(mean, heads * channels)
            })
            .collect();
        let mut weight = Tensor::from_data(TensorData::new(start, shape), device);
        if self.init.noise > 0.0 {
            weight =
                weight + Tensor::random(shape, Distribution::Normal(0.0, self.init.noise), device);
        }
        Some(Param::from_tensor(weight))
    }
}

/// The weights with which one layer blends stored layers' keys and values.
///
/// Should be created with [`KvFusionConfig`]. Weights are per source, kv head and channel, or one
/// scalar per source. Keys are blended after RoPE: both channels of a rotated pair (j and
/// j + rotary_dim/2) share one weight, so that scores stay a function of relative position; channels
/// that are not rotated have one each.
#[derive(Module, Debug)]
pub struct KvFusion<B: Backend> {
    /// `[sources, n_kv_heads, head_dim − rotary_dim / 2]`, rotated pairs first, or `[sources, 1, 1]`;
    /// none if keys come as they are.
    pub key_weight: Option<Param<Tensor<B, 3>>>,
    /// `[sources, n_kv_heads, head_dim]` or `[sources, 1, 1]`; none if values come as they are.
    pub value_weight: Option<Param<Tensor<B, 3>>>,
    rotated_pairs: usize,
}

impl<B: Backend> KvFusion<B> {
    /// The weights of keys or values, one per source, broadcastable to
    /// `[batch, n_kv_heads, seq, head_dim]`; those of keys with both channels of each pair.
    pub fn weights(&self, part: KvPart) -> Option<Vec<Tensor<B, 4>>> {
        let (weights, pairs) = match part {
            KvPart::Key => (&self.key_weight, self.rotated_pairs),
            KvPart::Value => (&self.value_weight, 0),
        };
        Some(weights_per_source(weights.as_ref()?.val(), pairs))
    }
}

/// The weights of a blend, one per source, broadcastable to `[batch, n_kv_heads, seq, head_dim]`, with
/// both channels of each of the first `pairs`.
pub(crate) fn weights_per_source<B: Backend>(
    weights: Tensor<B, 3>,
    pairs: usize,
) -> Vec<Tensor<B, 4>> {
    let weights = match weights.dims() {
        dims @ [sources, _, _] if dims != [sources, 1, 1] && pairs > 0 => {
            let of_pairs = weights.clone().narrow(2, 0, pairs);
            Tensor::cat(vec![of_pairs, weights], 2)
        }
        _ => weights,
    };
    let [sources, heads, channels] = weights.dims();
    let of = |source| weights.clone().narrow(0, source, 1);
    (0..sources)
        .map(|source| of(source).reshape([1, heads, 1, channels]))
        .collect()
}

/// The source that FusedKV-Lite takes: of keys the highest, of values the lowest
/// (arXiv 2512.03870).
pub(crate) fn lite_source(part: KvPart, sources: &[usize]) -> Option<usize> {
    let sources = sources.iter().copied();
    match part {
        KvPart::Key => sources.max(),
        KvPart::Value => sources.min(),
    }
}
