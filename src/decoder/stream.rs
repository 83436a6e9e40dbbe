//! The walk a step at a time: a residual stream that layers are led past one half at a time, so that
//! their weights can be changed on the way (conversion).

use burn::tensor::{Tensor, backend::Backend};

use super::attention::Projected;
use super::span::Span;
use super::{DecoderLayer, ForwardError, FusedKvDecoder, Norm, Projection};
use crate::cache::{KvStore, Uncached};
use crate::plan::{KvPart, PerPart, Reach};
use crate::tokens::TokenBatch;

/// The two halves of a layer, each of which adds to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Attention,
    FeedForward,
}

/// Tokens without a past on their way through the layers.
#[derive(Clone, Debug)]
pub(crate) struct Stream<B: Backend> {
    /// The residual stream, `[batch, seq, hidden_size]`.
    pub x: Tensor<B, 3>,
    /// Keys and values of the layers passed.
    pub store: Uncached<B>,
    spans: Vec<Span<B>>,
    /// What every layer is given of the tokens themselves, if anything.
    inputs: Vec<Tensor<B, 3>>,
}

impl<B: Backend> FusedKvDecoder<B> {
    /// Tokens before the bottom layer.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub(crate) fn stream(&self, tokens: TokenBatch<B>) -> Result<Stream<B>, ForwardError> {
        tokens.check()?;
        let past = vec![0; tokens.dims()[0]];
        let reach = self.check_positions(&tokens, &past)?;
        let spans = self.spans(&tokens, &past, 0, &[], reach);
        let [_, seq] = tokens.dims();
        let tokens = tokens.into_tensor();
        let x = self.embed(tokens.clone()).detach();
        let all = vec![everything(seq); self.layers.len()];
        let inputs = self.layer_inputs(tokens, &all).into_iter();
        Ok(Stream {
            inputs: inputs.map(Tensor::detach).collect(),
            x,
            store: Uncached::new(),
            spans,
        })
    }

    /// Puts what layer `index` stores into the stream's store; before [`inputs`](Self::inputs) of its
    /// attention.
    pub(crate) fn put(&self, index: usize, stream: &mut Stream<B>) {
        let layer = &self.layers[index];
        let [_, seq, _] = stream.x.dims();
        let stored = Reach {
            queries: 0,
            ..everything(seq)
        };
        let input = layer.attention_input(&stream.x);
        let span = &stream.spans[self.layout().kind(index)];
        let Projected { keys, values, .. } = layer.self_attn.project(&input, &stored);
        (layer.self_attn).put(keys, values, span, &stored, &mut stream.store);
    }

    /// What the last projection of a half reads: the heads' outputs, or the feed-forward block's inner
    /// activations, `[batch, seq, width]`.
    pub(crate) fn inputs(&self, half: Half, index: usize, stream: &Stream<B>) -> Tensor<B, 3> {
        let layer = &self.layers[index];
        let inputs = match half {
            Half::Attention => {
                let input = layer.attention_input(&stream.x);
                let span = &stream.spans[self.layout().kind(index)];
                let query = layer.self_attn.query(input);
                (layer.self_attn).heads(None, query, span, &stream.store)
            }
            Half::FeedForward => layer.mlp.inner(layer.feed_forward_input(&stream.x)),
        };
        inputs.detach()
    }

    /// The residual stream `x` after a half whose last projection read `inputs`.
    pub(crate) fn after(
        &self,
        half: Half,
        index: usize,
        x: Tensor<B, 3>,
        inputs: Tensor<B, 3>,
    ) -> Tensor<B, 3> {
        let layer = &self.layers[index];
        let output = layer.last_projection(half).forward(inputs);
        let x = match half {
            Half::Attention => layer.add_attention(x, output, &self.dropout),
            Half::FeedForward => layer.add_feed_forward(x, output, &self.dropout),
        };
        x.detach()
    }

    /// The residual stream `x` behind layer `index`, after both halves.
    pub(crate) fn behind(&self, index: usize, x: Tensor<B, 3>, stream: &Stream<B>) -> Tensor<B, 3> {
        let input = stream.inputs.get(index).cloned();
        self.layers[index].add_input(x, input).detach()
    }

    /// Leads the stream past layer `index`.
    pub(crate) fn pass_layer(&self, index: usize, stream: &mut Stream<B>) {
        self.put(index, stream);
        for half in [Half::Attention, Half::FeedForward] {
            let inputs = self.inputs(half, index, stream);
            stream.x = self.after(half, index, stream.x.clone(), inputs);
        }
        stream.x = self.behind(index, stream.x.clone(), stream);
    }
}

/// That all of `seq` positions are read.
fn everything(seq: usize) -> Reach {
    Reach {
        stored: PerPart::new(|_| seq),
        queries: seq,
    }
}

impl<B: Backend> DecoderLayer<B> {
    /// What a half ends with.
    pub(crate) fn last_projection(&self, half: Half) -> &Projection<B> {
        match half {
            Half::Attention => &self.self_attn.o_proj,
            Half::FeedForward => &self.mlp.down_proj,
        }
    }

    /// To change it.
    pub(crate) fn last_projection_mut(&mut self, half: Half) -> &mut Projection<B> {
        match half {
            Half::Attention => &mut self.self_attn.o_proj,
            Half::FeedForward => &mut self.mlp.down_proj,
        }
    }

    /// The norm between it and the residual stream.
    pub(crate) fn last_norm(&self, half: Half) -> Option<&Norm<B>> {
        match half {
            Half::Attention => self.attention_output_norm(),
            Half::FeedForward => self.post_feedforward_layernorm.as_ref(),
        }
    }
}

impl<B: Backend> Stream<B> {
    /// The keys or values of a layer passed, `[batch, n_kv_heads, seq, head_dim]`.
    pub(crate) fn stored(&self, part: KvPart, layer: usize) -> Tensor<B, 4> {
        self.store.get(part, layer).float(self.x.dtype())
    }

    /// The same place in the stream, with nothing stored.
    pub(crate) fn fork(&self) -> Self {
        Self {
            store: Uncached::new(),
            ..self.clone()
        }
    }
}
