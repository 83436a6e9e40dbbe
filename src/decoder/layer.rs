//! One layer: attention and feed-forward, each beside a residual connection, with norms where its
//! family has them.

use burn::module::{Initializer, Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Tensor, backend::Backend};

use super::attention::Attention;
use super::feed_forward::{FeedForward, gated};
use super::listed::listed;
use super::norm::Norm;
use super::projection::{Projection, projections};
use crate::config::{Activation, FusedKvDecoderConfig, NormPlacement};
use crate::plan::LayerKv;

/// The parameters of one layer; the decoder walks through them. Field names are Hugging Face's.
#[derive(Module, Debug)]
pub struct DecoderLayer<B: Backend> {
    /// Over hidden_size, before attention; none with [`NormPlacement::Post`].
    input_layernorm: Option<Norm<B>>,
    /// The attention.
    pub(crate) self_attn: Attention<B>,
    /// Over hidden_size, after attention; with [`NormPlacement::Pre`] that is before feed-forward.
    post_attention_layernorm: Norm<B>,
    /// Over hidden_size, before feed-forward, with [`NormPlacement::Sandwich`].
    pre_feedforward_layernorm: Option<Norm<B>>,
    /// The feed-forward block.
    pub(super) mlp: FeedForward<B>,
    /// Over hidden_size, after feed-forward; none with [`NormPlacement::Pre`].
    pub(super) post_feedforward_layernorm: Option<Norm<B>>,
    /// What it is given of the tokens themselves, in blocks that have it:
    /// `[hidden_size, layer_input_size]`.
    per_layer_input_gate: Option<Projection<B>>,
    /// `[layer_input_size, hidden_size]`.
    per_layer_projection: Option<Projection<B>>,
    /// Over hidden_size.
    post_per_layer_input_norm: Option<Norm<B>>,
    /// `[1]`: what the layer's output is multiplied with, in blocks that have it.
    layer_scalar: Option<Param<Tensor<B, 1>>>,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    norm_placement: NormPlacement,
}

projections!(DecoderLayer: ; per_layer_input_gate, per_layer_projection);
listed!(DecoderLayerRecord: input_layernorm,
    self_attn,
    post_attention_layernorm,
    pre_feedforward_layernorm,
    mlp,
    post_feedforward_layernorm,
    per_layer_input_gate,
    per_layer_projection,
    post_per_layer_input_norm,
    layer_scalar
);

impl<B: Backend> DecoderLayer<B> {
    pub(super) fn new(
        config: &FusedKvDecoderConfig,
        layer: &LayerKv,
        index: usize,
        device: &B::Device,
    ) -> Self {
        let norm = || Norm::new(config.hidden_size, config, device);
        let placement = config.block.norm_placement;
        let sandwich = placement == NormPlacement::Sandwich;
        let ffn_size = config.layer(index).ffn_size;
        let (hidden, input) = (config.hidden_size, config.block.layer_input_size);
        let projection = |shape| Projection::new(shape, false, &config.initializer(), device);
        Self {
            input_layernorm: placement.is_before().then(norm),
            self_attn: Attention::new(config, layer, index, device),
            post_attention_layernorm: norm(),
            pre_feedforward_layernorm: sandwich.then(norm),
            mlp: FeedForward::new(config, ffn_size, device),
            post_feedforward_layernorm: placement.is_after().then(norm),
            per_layer_input_gate: input.map(|input| projection([hidden, input])),
            per_layer_projection: input.map(|input| projection([input, hidden])),
            post_per_layer_input_norm: input.map(|_| norm()),
            layer_scalar: (config.block.layer_scalar).then(|| Initializer::Ones.init([1], device)),
            activation: config.block.activation,
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

    /// The residual stream after what the layer is given of the tokens themselves, if anything.
    ///
    /// # Shapes
    /// - input: `[batch, seq, layer_input_size]`
    pub(super) fn add_input(&self, x: Tensor<B, 3>, input: Option<Tensor<B, 3>>) -> Tensor<B, 3> {
        let modules = (
            &self.per_layer_input_gate,
            &self.per_layer_projection,
            &self.post_per_layer_input_norm,
        );
        let x = match (input, modules) {
            (Some(input), (Some(gate), Some(projection), Some(norm))) => {
                let gated = gated(self.activation, gate.forward(x.clone()), input);
                x + norm.forward(projection.forward(gated))
            }
            _ => x,
        };
        match &self.layer_scalar {
            Some(scalar) => x * scalar.val().unsqueeze(),
            None => x,
        }
    }
}

fn normed<B: Backend>(norm: Option<&Norm<B>>, x: Tensor<B, 3>) -> Tensor<B, 3> {
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}
