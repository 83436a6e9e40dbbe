//! A decoder's parameters by their names in checkpoints.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::FusedKvDecoder;
use crate::parameters::ModulePath;

impl<B: Backend> FusedKvDecoder<B> {
    /// The numbers of a parameter with D dimensions, by its name in a checkpoint; none where the decoder
    /// has no such parameter. Projections are `[input, output]`, the transpose of what files have, and
    /// one in fewer bits is widened to f32.
    ///
    /// To go through all parameters, to change or to freeze some, there are Burn's
    /// [`visit`](Module::visit) and [`map`](Module::map), which call modules as checkpoints do, but for
    /// `model.` before all and for `weight`, which is `gamma` in norms; training chooses by name
    /// (`train::Trainable`).
    ///
    /// ```
    /// use fusedkv::backend::{Flex, FlexDevice};
    /// use fusedkv::{FusedKvDecoderConfig, KvPlan};
    ///
    /// let config = FusedKvDecoderConfig::tiny(256, KvPlan::FusedKv { storage_layers: 3 });
    /// let model = config.init::<Flex>(&FlexDevice::default())?;
    /// let up = model.parameter::<2>("model.layers.3.mlp.up_proj.weight");
    /// assert_eq!(up.unwrap().dims(), [config.hidden_size, config.ffn_size]);
    /// // Its keys are a blend of other layers'.
    /// assert!(model.parameter::<2>("model.layers.3.self_attn.k_proj.weight").is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn parameter<const D: usize>(&self, name: &str) -> Option<Tensor<B, D>> {
        let mut find = Find {
            name,
            path: ModulePath::default(),
            found: None,
        };
        self.visit(&mut find);
        find.found
    }
}

struct Find<'n, B: Backend, const D: usize> {
    name: &'n str,
    path: ModulePath,
    found: Option<Tensor<B, D>>,
}

impl<B: Backend, const D: usize> ModuleVisitor<B> for Find<'_, B, D> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const E: usize>(&mut self, param: &Param<Tensor<B, E>>) {
        if D == E && self.path.tensor() == self.name {
            self.found = Some(Tensor::from_primitive(param.val().into_primitive()));
        }
    }
}
