//! One layer: attention and SwiGLU, each behind an RMSNorm and beside a residual connection.

use burn::module::Module;
use burn::nn::{Linear, RmsNorm};
use burn::tensor::{Tensor, backend::Backend};

use super::attention::Attention;
use super::{new_linear, new_norm, project};
use crate::config::FusedKvDecoderConfig;
use crate::kernels::swiglu;
use crate::plan::LayerKv;

/// The parameters of one layer; the decoder walks through them. Field names are those of Hugging
/// Face's Qwen3.
#[derive(Module, Debug)]
pub struct DecoderLayer<B: Backend> {
    /// Over hidden_size, before attention.
    pub input_layernorm: RmsNorm<B>,
    /// The attention.
    pub self_attn: Attention<B>,
    /// Over hidden_size, before SwiGLU.
    pub post_attention_layernorm: RmsNorm<B>,
    /// The SwiGLU block.
    pub mlp: SwiGluBlock<B>,
}

impl<B: Backend> DecoderLayer<B> {
    pub(crate) fn new(config: &FusedKvDecoderConfig, layer: &LayerKv, device: &B::Device) -> Self {
        Self {
            input_layernorm: new_norm(config.hidden_size, config, device),
            self_attn: Attention::new(config, layer, device),
            post_attention_layernorm: new_norm(config.hidden_size, config, device),
            mlp: SwiGluBlock::new(config, device),
        }
    }
}

/// `down(silu(gate(x)) ⊙ up(x))` (arXiv 2002.05202).
///
/// Burn's `SwiGlu` has the first two projections under other names than checkpoints do.
#[derive(Module, Debug)]
pub struct SwiGluBlock<B: Backend> {
    /// `[hidden_size, ffn_size]`.
    pub gate_proj: Linear<B>,
    /// `[hidden_size, ffn_size]`.
    pub up_proj: Linear<B>,
    /// `[ffn_size, hidden_size]`.
    pub down_proj: Linear<B>,
}

impl<B: Backend> SwiGluBlock<B> {
    fn new(config: &FusedKvDecoderConfig, device: &B::Device) -> Self {
        let (hidden, ffn) = (config.hidden_size, config.ffn_size);
        Self {
            gate_proj: new_linear(hidden, ffn, config, device),
            up_proj: new_linear(hidden, ffn, config, device),
            down_proj: new_linear(ffn, hidden, config, device),
        }
    }

    /// # Shapes
    /// - x, output: `[batch, seq, hidden_size]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let gate = project(&self.gate_proj, x.clone());
        let up = project(&self.up_proj, x);
        project(&self.down_proj, swiglu(gate, up))
    }
}
