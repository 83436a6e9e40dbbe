//! The one walk through a plan's layers, and what it is done for: logits without a cache, or through one.

use burn::tensor::{Int, Tensor, backend::Backend};

use super::attention::Projected;
use super::span::{Span, last};
use super::{ForwardError, FusedKvDecoder, Rope};
use crate::attention::FusionForm;
use crate::cache::{FusedKvCache, KvStore, Uncached};
use crate::holes::Holes;
use crate::kernels::among_threads;
use crate::kernels::operands::Visibility;
use crate::plan::Reach;
use crate::tokens::TokenBatch;

/// Which positions' logits a cached pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// The last position's: prefill and decoding. Layers above the highest that stores compute
    /// nothing for the other positions.
    Last,
    /// All positions': scoring, checking drafts.
    All,
}

/// Where a walk through the layers begins.
struct Start<B: Backend> {
    tokens: Tensor<B, 2, Int>,
    layer: usize,
    /// The residual stream below it.
    x: Tensor<B, 3>,
    /// Whether rows have unequal numbers of tokens.
    ragged: bool,
}

impl<B: Backend> FusedKvDecoder<B> {
    /// All positions' logits, without a cache: training and scoring.
    ///
    /// # Shapes
    /// - tokens: `[batch, seq]`
    /// - output: `[batch, seq, vocab_size]`; meaningless where `tokens` is padding
    ///
    /// # Errors
    /// [`ForwardError::Tokens`] if there are none, [`ForwardError::TooManyPositions`] beyond
    /// `max_positions`.
    ///
    /// # Panics
    /// Token ids are not checked here, where they may live on an accelerator: on most backends one
    /// beyond the vocabulary panics. [`TokenBatch::from_rows`] checks them.
    pub fn forward(&self, tokens: impl Into<TokenBatch<B>>) -> Result<Tensor<B, 3>, ForwardError> {
        self.uncached(tokens.into(), None)
    }

    /// [`forward`](Self::forward) with the blend computed in a form of your choice, to compare them.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_with(
        &self,
        tokens: impl Into<TokenBatch<B>>,
        form: FusionForm,
    ) -> Result<Tensor<B, 3>, ForwardError> {
        self.uncached(tokens.into(), Some(form))
    }

    fn uncached(
        &self,
        tokens: TokenBatch<B>,
        form: Option<FusionForm>,
    ) -> Result<Tensor<B, 3>, ForwardError> {
        let mut store = Uncached::new();
        let x = self.uncached_walk(tokens, None, &mut store, form, &mut |_, _| {})?;
        Ok(self.logits(self.norm.forward(x)))
    }

    /// What the head reads for all positions of tokens without a past,
    /// `[batch, seq, hidden_size]`: the last layer's output, normalised. `watch` is shown the residual
    /// stream below every layer, by the layer's number, and that above the last. Layers below the one of
    /// `from` are passed over: the stream below it is given, and none above may read their keys or values.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    #[cfg(feature = "train")]
    pub(crate) fn states(
        &self,
        tokens: impl Into<TokenBatch<B>>,
        from: Option<(usize, Tensor<B, 3>)>,
        watch: &mut dyn FnMut(usize, &Tensor<B, 3>),
    ) -> Result<Tensor<B, 3>, ForwardError> {
        let mut store = Uncached::new();
        let x = self.uncached_walk(tokens.into(), from, &mut store, None, watch)?;
        Ok(self.norm.forward(x))
    }

    /// What the last layer gives for all positions of tokens without a past, and in `store` the keys
    /// and values that were stored.
    fn uncached_walk(
        &self,
        tokens: TokenBatch<B>,
        from: Option<(usize, Tensor<B, 3>)>,
        store: &mut Uncached<B>,
        form: Option<FusionForm>,
        watch: &mut dyn FnMut(usize, &Tensor<B, 3>),
    ) -> Result<Tensor<B, 3>, ForwardError> {
        tokens.check()?;
        let [batch, _] = tokens.dims();
        let past = vec![0; batch];
        let reach = self.check_positions(&tokens, &past)?;
        let spans = self.spans(&tokens, &past, 0, &[], reach);
        let start = self.start(tokens, from);
        Ok(self.walk(start, spans, store, form, Some(Logits::All), watch))
    }

    /// Appends a chunk of tokens to the cache and returns logits: prefill in chunks of any size,
    /// decoding of one or several tokens. Each row continues where it stands; padding on its left
    /// is skipped, so that rows of different lengths give what each gives alone, but for
    /// [`RopeScaling`](crate::config::RopeScaling) by length, which goes by the longest row of a call.
    ///
    /// # Shapes
    /// - tokens: `[batch, seq]`
    /// - output: `[batch, 1, vocab_size]` for [`Logits::Last`], `[batch, seq, vocab_size]` for
    ///   [`Logits::All`]
    ///
    /// # Errors
    /// - [`ForwardError::Tokens`] if there are none
    /// - [`ForwardError::Cache`] of [`PlanMismatch`](crate::CacheError::PlanMismatch),
    ///   [`BatchMismatch`](crate::CacheError::BatchMismatch) or
    ///   [`OverCapacity`](crate::CacheError::OverCapacity) if the cache cannot take the tokens
    /// - [`ForwardError::TooManyPositions`] beyond `max_positions`
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_cached(
        &self,
        tokens: impl Into<TokenBatch<B>>,
        cache: &mut FusedKvCache<B>,
        logits: Logits,
    ) -> Result<Tensor<B, 3>, ForwardError> {
        let tokens = tokens.into();
        tokens.check()?;
        cache.check(&self.cache_shape, tokens.dims())?;
        // Of all tokens, however many passes they take.
        let reach = self.check_positions(&tokens, &cache.row_lens())?;
        let (first, last) = match (logits, self.prefill_chunk) {
            (Logits::Last, Some(most)) => tokens.split(most),
            _ => (Vec::new(), tokens),
        };
        Ok(among_threads::<B, _>(|| {
            for tokens in first {
                self.pass(tokens, cache, reach, None);
            }
            let x = self.pass(last, cache, reach, Some(logits));
            self.logits(self.norm.forward(x))
        }))
    }

    /// Appends checked tokens, some of those whose positions end at `reach`, to the cache;
    /// [`walk`](Self::walk).
    fn pass(
        &self,
        tokens: TokenBatch<B>,
        cache: &mut FusedKvCache<B>,
        reach: usize,
        logits: Option<Logits>,
    ) -> Tensor<B, 3> {
        let past = cache.row_lens();
        let spans = self.spans(&tokens, &past, cache.len(), cache.holes(), reach);
        let padding = tokens.padding().to_vec();
        let mut append = cache.append(tokens.dims()[1]);
        let start = self.start(tokens, None);
        let x = self.walk(start, spans, &mut append, None, logits, &mut |_, _| {});
        append.commit(&padding);
        x
    }

    /// Where a walk starts: below the first layer, with the tokens' embeddings, or below the layer of
    /// `from` with a stream that was led there.
    fn start(&self, tokens: TokenBatch<B>, from: Option<(usize, Tensor<B, 3>)>) -> Start<B> {
        // A row with few tokens among others' many still sees those before this pass.
        let ragged = tokens.padding().iter().any(|&padding| padding > 0);
        let tokens = tokens.into_tensor();
        let (layer, x) = from.unwrap_or_else(|| (0, self.embed(tokens.clone())));
        Start {
            tokens,
            layer,
            x,
            ragged,
        }
    }

    /// The one walk through the plan that every forward pass is: what the head needs for the logits
    /// asked for. Where none are it ends at the last keys and values, with nothing for the head.
    fn walk(
        &self,
        start: Start<B>,
        spans: Vec<Span<B>>,
        store: &mut impl KvStore<B>,
        form: Option<FusionForm>,
        logits: Option<Logits>,
        watch: &mut dyn FnMut(usize, &Tensor<B, 3>),
    ) -> Tensor<B, 3> {
        let Start {
            tokens,
            layer: first,
            mut x,
            ragged,
        } = start;
        let [_, seq, _] = x.dims();
        let layout = self.layout();
        let wanted = match logits {
            None => 0,
            Some(Logits::Last) => 1,
            Some(Logits::All) => seq,
        };
        let window = |layer| self.windows[layout.kind(layer)].filter(|_| !ragged);
        let reach = Reach::of_layers(layout, window, seq, wanted);
        let inputs = self.layer_inputs(tokens, &reach);
        let mut inputs = inputs.into_iter().skip(first);
        let layers = self.layers.iter().zip(&reach).enumerate();
        for (i, (layer, reach)) in layers.skip(first) {
            watch(i, &x);
            let span = &spans[layout.kind(i)];
            let attention = &layer.self_attn;
            let Projected {
                query,
                keys,
                values,
            } = attention.project(&layer.attention_input(&x), reach);
            attention.put(keys, values, span, reach, store);
            let Some(query) = query else { break };
            // From here on nobody reads the other positions.
            x = last(x, reach.queries);
            let attended = attention.forward(form, query, span, store);
            x = layer.add_attention(x, attended, &self.dropout);
            let output = layer.mlp.forward(layer.feed_forward_input(&x));
            x = layer.add_feed_forward(x, output, &self.dropout);
            x = layer.add_input(x, inputs.next());
        }
        watch(self.layers.len(), &x);
        x
    }

    /// What the bottom layer reads.
    pub(super) fn embed(&self, tokens: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let x = self.embed_tokens.forward(tokens, self.dtype());
        match self.config.block.embedding_scale {
            Some(scale) => x * scale,
            None => x,
        }
    }

    /// Logits of the last layer's output, normalised.
    pub(crate) fn logits(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let logits = match &self.lm_head {
            Some(head) => head.forward(x),
            None => self.embed_tokens.weight.transposed_product(x),
        };
        match self.config.block.logit_softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// Where the positions of `tokens` after `past[row]` tokens of each row end, if there are angles for all.
    pub(super) fn check_positions(
        &self,
        tokens: &TokenBatch<B>,
        past: &[usize],
    ) -> Result<usize, ForwardError> {
        let [_, seq] = tokens.dims();
        let max_positions = self.config.max_positions;
        let mut reach = 0;
        for (row, (past, padding)) in past.iter().zip(tokens.padding()).enumerate() {
            let positions = past + seq - padding;
            if positions > max_positions {
                return Err(ForwardError::TooManyPositions {
                    row,
                    positions,
                    max_positions,
                });
            }
            reach = reach.max(positions);
        }
        Ok(reach)
    }

    /// Positions and visibility, for every kind of layers, of `tokens` after `past[row]` tokens of
    /// each row in `cached` slots with `holes`. Positions of the text end at `reach`, which decides the
    /// frequencies of some kinds of RoPE.
    pub(super) fn spans(
        &self,
        tokens: &TokenBatch<B>,
        past: &[usize],
        cached: usize,
        holes: &[Holes],
        reach: usize,
    ) -> Vec<Span<B>> {
        let [_, seq] = tokens.dims();
        let device = tokens.device();
        let holes = tokens.holes(holes, cached);
        let angles = |rope: &Rope| {
            if holes.is_empty() {
                return rope.angles([1, seq], cached..cached + seq, reach, &device);
            }
            let rows = past.iter().zip(tokens.padding());
            let positions = rows.flat_map(|(past, &padding)| {
                (0..seq).map(move |i| past + i.saturating_sub(padding))
            });
            rope.angles([past.len(), seq], positions, reach, &device)
        };
        let span = |(rope, window): (&Option<Rope>, &Option<usize>)| Span {
            angles: rope.as_ref().map(angles),
            visibility: Visibility::new(*window, holes.clone(), cached + seq),
        };
        self.ropes
            .iter()
            .zip(self.windows.iter())
            .map(span)
            .collect()
    }
}
