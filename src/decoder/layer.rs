//! One layer: attention and feed-forward, each beside a residual connection, with norms where its
//! family has them.

use burn::module::Module;
use burn::nn::Dropout;
use burn::tensor::{Tensor, backend::Backend};

use super::Norm;
use super::attention::Attention;
use super::feed_forward::FeedForward;
use crate::config::{FusedKvDecoderConfig, NormPlacement};
use crate::plan::KvLayout;

/// The parameters of one layer; the decoder walks through them. Field names are Hugging Face's.
#[derive(Module, Debug)]
pub struct DecoderLayer<B: Backend> {
    /// Over hidden_size, before attention; none with [`NormPlacement::Post`].
    pub input_layernorm: Option<Norm<B>>,
    /// The attention.
    pub self_attn: Attention<B>,
    /// Over hidden_size, after attention; with [`NormPlacement::Pre`] that is before feed-forward.
    pub post_attention_layernorm: Norm<B>,
    /// Over hidden_size, before feed-forward, with [`NormPlacement::Sandwich`].
    pub pre_feedforward_layernorm: Option<Norm<B>>,
    /// The feed-forward block.
    pub mlp: FeedForward<B>,
    /// Over hidden_size, after feed-forward; none with [`NormPlacement::Pre`].
    pub post_feedforward_layernorm: Option<Norm<B>>,
    #[module(skip)]
    norm_placement: NormPlacement,
}

impl<B: Backend> DecoderLayer<B> {
    pub(super) fn new(
        config: &FusedKvDecoderConfig,
        layout: &KvLayout,
        index: usize,
        device: &B::Device,
    ) -> Self {
        let norm = || Norm::new(config.hidden_size, config, device);
        let placement = config.block.norm_placement;
        let sandwich = placement == NormPlacement::Sandwich;
        let ffn_size = config.layer(index).ffn_size;
        Self {
            input_layernorm: placement.is_before().then(norm),
            self_attn: Attention::new(config, layout, index, device),
            post_attention_layernorm: norm(),
            pre_feedforward_layernorm: sandwich.then(norm),
            mlp: FeedForward::new(config, ffn_size, device),
            post_feedforward_layernorm: placement.is_after().then(norm),
            norm_placement: placement,
        }
    }

    /// What attention reads of the residual stream x.
    pub(super) fn attention_input(&self, x: &Tensor<B, 3>) -> Tensor<B, 3> {
        normed(self.input_layernorm.as_ref(), x.clone())
    }

    /// The residual stream after attention gave `attended`.
    pub(super) fn add_attention(
        &self,
        x: Tensor<B, 3>,
        attended: Tensor<B, 3>,
        dropout: &Dropout,
    ) -> Tensor<B, 3> {
        x + dropout.forward(normed(self.attention_output_norm(), attended))
    }

    /// The norm that attention's output goes through.
    pub(super) fn attention_output_norm(&self) -> Option<&Norm<B>> {
        let after = self.norm_placement.is_after();
        after.then_some(&self.post_attention_layernorm)
    }

    /// What the feed-forward block reads of the residual stream x.
    pub(super) fn feed_forward_input(&self, x: &Tensor<B, 3>) -> Tensor<B, 3> {
        let norm = match self.norm_placement {
            NormPlacement::Pre => Some(&self.post_attention_layernorm),
            NormPlacement::Sandwich => self.pre_feedforward_layernorm.as_ref(),
            NormPlacement::Post => None,
        };
        normed(norm, x.clone())
    }

    /// The residual stream after the feed-forward block gave `output`.
    pub(super) fn add_feed_forward(
        &self,
        x: Tensor<B, 3>,
        output: Tensor<B, 3>,
        dropout: &Dropout,
    ) -> Tensor<B, 3> {
        let after = self.post_feedforward_layernorm.as_ref();
        x + dropout.forward(normed(after, output))
    }
}

fn normed<B: Backend>(norm: Option<&Norm<B>>, x: Tensor<B, 3>) -> Tensor<B, 3> {
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}
