//! One layer: attention and SwiGLU, each behind an RMSNorm and beside a residual connection.

use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::backend::Backend;

use super::attention::Attention;
use super::feed_forward::SwiGluBlock;
use super::new_norm;
use crate::config::FusedKvDecoderConfig;
use crate::plan::KvLayout;

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
    pub(super) fn new(
        config: &FusedKvDecoderConfig,
        layout: &KvLayout,
        index: usize,
        device: &B::Device,
    ) -> Self {
        Self {
            input_layernorm: new_norm(config.hidden_size, config, device),
            self_attn: Attention::new(config, layout, index, device),
            post_attention_layernorm: new_norm(config.hidden_size, config, device),
            mlp: SwiGluBlock::new(config, device),
        }
    }
}
