//! The learned blend of stored keys and values: a_i1 ⊙ K_1 + a_in ⊙ K_n and
//! b_i1 ⊙ V_1 + b_in ⊙ V_n (arXiv 2512.03870), for any number of sources.

use burn::module::{Module, Param};
use burn::tensor::{Distribution, Tensor, TensorData, backend::Backend};

use crate::config::{FusionInit, FusionStart};
use crate::plan::Mix;

/// Configuration of a [`KvFusion`].
#[derive(Clone, Debug, PartialEq)]
pub struct KvFusionConfig {
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// What the keys are blended from.
    pub key: Mix,
    /// What the values are blended from.
    pub value: Mix,
    /// Where the weights start.
    pub init: FusionInit,
}

impl KvFusionConfig {
    /// A fusion layer, or none if the plan takes keys and values as they are.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Option<KvFusion<B>> {
        // Lite: keys from the highest source, values from the lowest.
        let key_weight = self.weight(&self.key, self.head_dim / 2, |s| s.iter().max(), device);
        let value_weight = self.weight(&self.value, self.head_dim, |s| s.iter().min(), device);
        if key_weight.is_none() && value_weight.is_none() {
            return None;
        }
        Some(KvFusion {
            key_weight,
            value_weight,
        })
    }

    fn weight<B: Backend>(
        &self,
        mix: &Mix,
        channels: usize,
        lite: fn(&[usize]) -> Option<&usize>,
        device: &B::Device,
    ) -> Option<Param<Tensor<B, 3>>> {
        let shape @ [n_sources, heads, channels] = mix.weights_shape(self.n_kv_heads, channels)?;
        let sources = mix.sources();
        let start: Vec<f64> = sources
            .iter()
            .flat_map(|source| {
                let mean = match self.init.start {
                    FusionStart::Lite if lite(sources) == Some(source) => 1.0,
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
/// j + head_dim/2) share one weight, so that scores stay a function of relative position.
#[derive(Module, Debug)]
pub struct KvFusion<B: Backend> {
    /// `[sources, n_kv_heads, head_dim / 2]` or `[sources, 1, 1]`; none if keys come as they are.
    pub key_weight: Option<Param<Tensor<B, 3>>>,
    /// `[sources, n_kv_heads, head_dim]` or `[sources, 1, 1]`; none if values come as they are.
    pub value_weight: Option<Param<Tensor<B, 3>>>,
}

impl<B: Backend> KvFusion<B> {
    /// Key weights, one per source, with both channels of each pair: broadcastable to
    /// `[batch, n_kv_heads, seq, head_dim]`.
    pub fn key_weights(&self) -> Option<Vec<Tensor<B, 4>>> {
        self.key_weight.as_ref().map(|weight| {
            let half = weight.val();
            per_source(match half.dims() {
                [_, 1, 1] => half,
                _ => Tensor::cat(vec![half.clone(), half], 2),
            })
        })
    }

    /// Value weights, one per source: broadcastable to `[batch, n_kv_heads, seq, head_dim]`.
    pub fn value_weights(&self) -> Option<Vec<Tensor<B, 4>>> {
        self.value_weight
            .as_ref()
            .map(|weight| per_source(weight.val()))
    }
}

fn per_source<B: Backend>(weight: Tensor<B, 3>) -> Vec<Tensor<B, 4>> {
    let [sources, heads, channels] = weight.dims();
    (0..sources)
        .map(|source| {
            weight
                .clone()
                .narrow(0, source, 1)
                .reshape([1, heads, 1, channels])
        })
        .collect()
}

/// The α of YOCO++ (arXiv 2604.13556): what a storing layer adds of a lower layer's cached keys
/// and values to its own. At 0 it is YOCO.
#[derive(Module, Debug)]
pub struct KvResidual<B: Backend> {
    /// α of the keys, `[1]`.
    pub key_weight: Param<Tensor<B, 1>>,
    /// α of the values, `[1]`.
    pub value_weight: Param<Tensor<B, 1>>,
}

impl<B: Backend> KvResidual<B> {
    /// Both α at `start`.
    pub fn new(start: f64, device: &B::Device) -> Self {
        let alpha = || Param::from_tensor(Tensor::full([1], start, device));
        Self {
            key_weight: alpha(),
            value_weight: alpha(),
        }
    }
}
