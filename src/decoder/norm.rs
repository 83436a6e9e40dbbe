//! RMSNorm.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::listed::listed;
use crate::config::FusedKvDecoderConfig;
use crate::kernels::rms_norm;

/// `x / √(mean(x²) + ε) ⊙ g` over the last dimension (arXiv 1910.07467), where g is the parameter or,
/// in families that train it around 0, 1 + the parameter.
#[derive(Module, Debug)]
pub struct Norm<B: Backend> {
    /// `[width]`.
    pub(crate) gamma: Param<Tensor<B, 1>>,
    epsilon: f64,
    unit_offset: bool,
}

listed!(NormRecord: gamma);

impl<B: Backend> Norm<B> {
    /// One that multiplies with 1.
    pub(super) fn new(width: usize, config: &FusedKvDecoderConfig, device: &B::Device) -> Self {
        let unit_offset = config.block.norm_unit_offset;
        let initializer = match unit_offset {
            true => Initializer::Zeros,
            false => Initializer::Ones,
        };
        Self {
            gamma: initializer.init([width], device),
            epsilon: config.rms_norm_eps,
            unit_offset,
        }
    }

    /// # Shapes
    /// - x, output: `[…, width]`
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        rms_norm(x, self.gain(), self.epsilon)
    }

    /// g, `[width]`.
    fn gain(&self) -> Tensor<B, 1> {
        let gamma = self.gamma.val();
        match self.unit_offset {
            true => gamma + 1.0,
            false => gamma,
        }
    }

    /// The norm as a product, x / r ⊙ g: g, `[1, …, width]`, and r, `[…, 1]`.
    #[cfg(feature = "convert")]
    pub(crate) fn factors<const D: usize>(&self, x: Tensor<B, D>) -> [Tensor<B, D>; 2] {
        let rms = (x.square().mean_dim(D - 1) + self.epsilon).sqrt();
        [self.gain().unsqueeze(), rms]
    }
}
