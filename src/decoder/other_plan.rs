//! A standard decoder's parameters under another plan.

use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor, backend::Backend};

use super::FusedKvDecoder;
use super::attention::PlanParameters;
use super::listed::listed;
use crate::cache::CacheShape;
use crate::config::{ConfigError, FusedKvDecoderConfig};
use crate::plan::{KvLayout, KvPlan};

/// A plan for a standard decoder, and the parameters that a decoder of that plan has beyond it: the
/// weights of blends and the α of YOCO++. The module has them where the decoder would.
#[derive(Module, Debug)]
pub(crate) struct OtherPlan<B: Backend> {
    /// One of each layer, bottom first.
    layers: Vec<LayerParameters<B>>,
    #[module(skip)]
    config: Arc<FusedKvDecoderConfig>,
    #[module(skip)]
    layout: Arc<KvLayout>,
    #[module(skip)]
    cache_shape: Arc<CacheShape>,
}

/// What a layer of another plan has beyond a standard one.
#[derive(Module, Debug)]
pub(crate) struct LayerParameters<B: Backend> {
    self_attn: PlanParameters<B>,
}

listed!(OtherPlanRecord: layers);
listed!(LayerParametersRecord: self_attn);

impl<B: Backend> OtherPlan<B> {
    /// Parameters that start as the configuration of `model`, a standard decoder, says, in its float
    /// type and on its device.
    ///
    /// # Errors
    /// [`ConfigError`] as [`FusedKvDecoderConfig::validate`].
    pub fn new(model: &FusedKvDecoder<B>, plan: &KvPlan) -> Result<Self, ConfigError> {
        let config = FusedKvDecoderConfig {
            plan: plan.clone(),
            ..model.config().clone()
        };
        let layout = Arc::new(config.validate()?);
        let device = model.device();
        let layers = layout.layers().iter().enumerate();
        let layers = layers.map(|(index, layer)| LayerParameters {
            self_attn: PlanParameters::new(&config, layer, index, &device),
        });
        let plan = Self {
            layers: layers.collect(),
            cache_shape: Arc::new(config.cache_shape(&layout)),
            config: Arc::new(config),
            layout,
        };
        Ok(plan.map(&mut Cast(model.dtype())))
    }

    /// The plan, spelled out.
    #[cfg(feature = "train")]
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Whether a record has what the plan needs, and nothing else.
    #[cfg(feature = "train")]
    pub fn is_of(&self, record: &OtherPlanRecord<B>) -> bool {
        use super::listed::{Listed, tensors_of};

        let (mut path, mut found) = (Default::default(), Vec::new());
        record.list(&mut path, &mut found);
        found == tensors_of(self)
    }
}

struct Cast(DType);

impl<B: Backend> ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

impl<B: Backend> FusedKvDecoder<B> {
    /// The decoder under another plan. It has no parameters of its own: all are this one's or the plan's,
    /// by the same identity.
    ///
    /// # Panics
    /// If this decoder lacks a projection that the plan needs; a standard one lacks none.
    pub(crate) fn under(&self, plan: &OtherPlan<B>) -> Self {
        let mut decoder = self.clone();
        let of_plan = plan.layout.layers().iter().zip(&plan.layers);
        for (own, (layer, parameters)) in decoder.layers.iter_mut().zip(of_plan) {
            let attention = own.self_attn.clone();
            own.self_attn = attention.under(layer, parameters.self_attn.clone());
        }
        Self {
            layout: plan.layout.clone(),
            cache_shape: plan.cache_shape.clone(),
            config: plan.config.clone(),
            ..decoder
        }
    }
}
