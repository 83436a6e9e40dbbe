//! The feed-forward block of a layer.

use burn::module::Module;
use burn::tensor::activation::{gelu, gelu_approximate};
use burn::tensor::{Tensor, backend::Backend};

use super::listed::listed;
use super::projection::{Projection, projections};
use crate::config::{Activation, FusedKvDecoderConfig};
use crate::kernels::swiglu;

/// `down(f(gate(x)) ⊙ up(x))` (arXiv 2002.05202), f being the block's [`Activation`].
///
/// Burn's `SwiGlu` has the first two projections under other names than checkpoints do.
#[derive(Module, Debug)]
pub struct FeedForward<B: Backend> {
    /// `[hidden_size, ffn_size]`.
    pub(crate) gate_proj: Projection<B>,
    /// `[hidden_size, ffn_size]`.
    pub(crate) up_proj: Projection<B>,
    /// `[ffn_size, hidden_size]`.
    pub(crate) down_proj: Projection<B>,
    #[module(skip)]
    activation: Activation,
}

projections!(FeedForward: gate_proj, up_proj, down_proj);
listed!(FeedForwardRecord: gate_proj, up_proj, down_proj);

impl<B: Backend> FeedForward<B> {
    pub(super) fn new(config: &FusedKvDecoderConfig, ffn_size: usize, device: &B::Device) -> Self {
        let (hidden, bias) = (config.hidden_size, config.block.mlp_bias);
        let projection = |shape| Projection::new(shape, bias, &config.initializer(), device);
        Self {
            gate_proj: projection([hidden, ffn_size]),
            up_proj: projection([hidden, ffn_size]),
            down_proj: projection([ffn_size, hidden]),
            activation: config.block.activation,
        }
    }

    /// # Shapes
    /// - x, output: `[batch, seq, hidden_size]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.down_proj.forward(self.inner(x))
    }

    /// f(gate(x)) ⊙ up(x), `[batch, seq, ffn_size]`.
    pub(super) fn inner(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let both = Projection::forward_each(&[&self.gate_proj, &self.up_proj], &x);
        let [gate, up]: [_; 2] = both.try_into().expect("one of each projection");
        gated(self.activation, gate, up)
    }
}

/// `f(gate) ⊙ up`.
pub(super) fn gated<B: Backend>(
    activation: Activation,
    gate: Tensor<B, 3>,
    up: Tensor<B, 3>,
) -> Tensor<B, 3> {
    match activation {
        Activation::Silu => swiglu(gate, up),
        Activation::Gelu => gelu(gate) * up,
        Activation::GeluTanh => gelu_approximate(gate) * up,
    }
}
