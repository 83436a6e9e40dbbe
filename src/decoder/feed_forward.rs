//! The feed-forward block of a layer.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use super::projection::Projection;
use crate::config::FusedKvDecoderConfig;
use crate::kernels::swiglu;

/// `down(silu(gate(x)) ⊙ up(x))` (arXiv 2002.05202).
///
/// Burn's `SwiGlu` has the first two projections under other names than checkpoints do.
#[derive(Module, Debug)]
pub struct SwiGluBlock<B: Backend> {
    /// `[hidden_size, ffn_size]`.
    pub gate_proj: Projection<B>,
    /// `[hidden_size, ffn_size]`.
    pub up_proj: Projection<B>,
    /// `[ffn_size, hidden_size]`.
    pub down_proj: Projection<B>,
}

impl<B: Backend> SwiGluBlock<B> {
    pub(super) fn new(config: &FusedKvDecoderConfig, device: &B::Device) -> Self {
        let (hidden, ffn) = (config.hidden_size, config.ffn_size);
        let projection = |shape| Projection::new(shape, &config.initializer(), device);
        Self {
            gate_proj: projection([hidden, ffn]),
            up_proj: projection([hidden, ffn]),
            down_proj: projection([ffn, hidden]),
        }
    }

    /// # Shapes
    /// - x, output: `[batch, seq, hidden_size]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let gate = self.gate_proj.forward(x.clone());
        let up = self.up_proj.forward(x);
        self.down_proj.forward(swiglu(gate, up))
    }
}
