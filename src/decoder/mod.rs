//! The decoder: tokens → embedding → layers, each told by the plan where its keys and values come
//! from → output head.

mod attention;
#[cfg(all(test, feature = "flex"))]
mod dispatch;
mod embedding;
mod error;
mod feed_forward;
mod layer;
mod layer_input;
mod lora;
mod matrices;
mod norm;
mod projection;
mod record;
mod rope;
#[cfg(feature = "convert")]
mod stream;
mod weight;

use std::sync::Arc;

use burn::module::{Initializer, Module};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{DType, Int, Tensor, backend::Backend};

pub use attention::Attention;
pub use embedding::Embedding;
pub use error::ForwardError;
pub use feed_forward::FeedForward;
pub use layer::DecoderLayer;
pub use lora::{Lora, LoraConfig, LoraError};
pub use norm::Norm;
pub use projection::Projection;
pub use record::{DecoderRecord, PlanModule, PlanRecord, RecordError};
pub use rope::{Rope, RopeAngles, RopeError};
#[cfg(feature = "convert")]
pub(crate) use stream::{Half, Stream};
pub use weight::{PackedWeight, Weight, WeightError, WeightFormat};

use crate::attention::FusionForm;
use crate::cache::{
    CacheDtype, CacheError, CacheShape, FusedKvCache, KvStore, SlotShape, Uncached,
};
use crate::config::{ConfigError, FusedKvDecoderConfig, LayerSpec};
use crate::holes::Holes;
use crate::kernels::operands::Visibility;
use crate::kernels::{self, among_threads};
use crate::plan::{KvLayout, Reach};
use crate::tokens::TokenBatch;

/// A decoder whose [plan](crate::KvPlan) says which layers have keys and values of their own, and
/// whose [block](crate::config::BlockConfig) says what its layers compute; all methods and families
/// are this decoder.
///
/// Should be created with [`FusedKvDecoderConfig::init`]. Field names are Hugging Face's.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::{FusedKvDecoderConfig, KvPlan, Logits, TokenBatch};
///
/// let device = FlexDevice::default();
/// let config = FusedKvDecoderConfig::tiny(64, KvPlan::FusedKv { storage_layers: 3 });
/// let model = config.init::<Flex>(&device)?;
///
/// // Training and scoring: all logits, no cache.
/// let batch = TokenBatch::from_rows(&[vec![1, 2, 3, 4]], 64, &device)?;
/// let logits = model.forward(batch.clone())?;
/// assert_eq!(logits.dims(), [1, 4, 64]);
///
/// // Inference: prefill, then decode one token.
/// let mut cache = model.new_cache(1, 16)?;
/// model.forward_cached(batch, &mut cache, Logits::Last)?;
/// let next = TokenBatch::from_rows(&[vec![5]], 64, &device)?;
/// let logits = model.forward_cached(next, &mut cache, Logits::Last)?;
/// assert_eq!((logits.dims(), cache.len()), ([1, 1, 64], 5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Module, Debug)]
pub struct FusedKvDecoder<B: Backend> {
    /// First, so that a record of another plan is refused before anything is loaded.
    plan: PlanModule<B>,
    /// `[vocab_size, hidden_size]`.
    pub embed_tokens: Embedding<B>,
    /// What layers are given of the tokens themselves, in blocks that have it, one layer beside the
    /// other: `[vocab_size, n_layers · layer_input_size]`.
    pub embed_tokens_per_layer: Option<Embedding<B>>,
    /// `[hidden_size, n_layers · layer_input_size]`.
    pub per_layer_model_projection: Option<Projection<B>>,
    /// Over layer_input_size.
    pub per_layer_projection_norm: Option<Norm<B>>,
    /// The layers, bottom first.
    pub layers: Vec<DecoderLayer<B>>,
    /// Over hidden_size, before the head.
    pub norm: Norm<B>,
    /// `[hidden_size, vocab_size]`; none where the embedding is the head.
    pub lm_head: Option<Projection<B>>,
    dropout: Dropout,
    /// Of every kind of layers; none where it does not rotate.
    #[module(skip)]
    ropes: Arc<Vec<Option<Rope>>>,
    /// Of every kind of layers.
    #[module(skip)]
    windows: Arc<Vec<Option<usize>>>,
    /// What every cached pass compares its cache with.
    #[module(skip)]
    cache_shape: Arc<CacheShape>,
    #[module(skip)]
    config: Arc<FusedKvDecoderConfig>,
    /// What the adapters beside its projections are.
    #[module(skip)]
    lora: Option<Arc<LoraConfig>>,
    /// Tokens of all rows that a cached pass reads at once; none: all of them.
    #[module(skip)]
    prefill_chunk: Option<usize>,
}

/// Which positions' logits a cached pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// The last position's: prefill and decoding. Layers above the highest that stores compute
    /// nothing for the other positions.
    Last,
    /// All positions': scoring, checking drafts.
    All,
}

/// What all layers of one kind share of one chunk of tokens.
#[derive(Clone, Debug)]
pub(crate) struct Span<B: Backend> {
    /// None where the kind does not rotate.
    pub angles: Option<RopeAngles<B>>,
    pub visibility: Visibility<B>,
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

impl FusedKvDecoderConfig {
    /// Builds a decoder with random weights.
    ///
    /// # Errors
    /// [`ConfigError`] as [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<FusedKvDecoder<B>, ConfigError> {
        let plan = PlanModule::new(self.validate()?);
        let layout = &plan.layout;
        let (kinds, _) = self.kinds();
        let rope = |spec: &LayerSpec| Some(Rope::new(spec.kv.head_dim, spec.kind.rope.clone()?));
        let embedding =
            |width| Embedding::new([self.vocab_size, width], &self.initializer(), device);
        let input = self.block.layer_input_size;
        let inputs = input.map(|input| self.n_layers * input);
        Ok(FusedKvDecoder {
            embed_tokens: embedding(self.hidden_size),
            embed_tokens_per_layer: inputs.map(embedding),
            per_layer_model_projection: inputs.map(|inputs| {
                let shape = [self.hidden_size, inputs];
                Projection::new(shape, false, &self.initializer(), device)
            }),
            per_layer_projection_norm: input.map(|input| Norm::new(input, self, device)),
            layers: (0..self.n_layers)
                .map(|index| DecoderLayer::new(self, layout, index, device))
                .collect(),
            norm: Norm::new(self.hidden_size, self, device),
            lm_head: (!self.tie_embeddings).then(|| {
                let shape = [self.hidden_size, self.vocab_size];
                Projection::new(shape, false, &self.initializer(), device)
            }),
            dropout: DropoutConfig::new(self.dropout).init(),
            ropes: Arc::new(kinds.iter().map(rope).collect()),
            windows: Arc::new(kinds.iter().map(|spec| spec.kind.window).collect()),
            cache_shape: Arc::new(self.cache_shape(layout)),
            config: Arc::new(self.clone()),
            lora: None,
            prefill_chunk: kernels::tokens_per_pass::<B>(),
            plan,
        })
    }

    fn cache_shape(&self, layout: &Arc<KvLayout>) -> CacheShape {
        let slot = |index| {
            let spec = self.layer(index);
            SlotShape {
                n_kv_heads: spec.kv.n_kv_heads,
                head_dim: spec.kv.head_dim,
                window: spec.kind.window,
            }
        };
        CacheShape {
            layout: layout.clone(),
            slots: (0..self.n_layers).map(slot).collect(),
        }
    }

    fn initializer(&self) -> Initializer {
        Initializer::Normal {
            mean: 0.0,
            std: self.init_std,
        }
    }
}

impl<B: Backend> FusedKvDecoder<B> {
    /// The configuration the decoder was built from.
    pub fn config(&self) -> &FusedKvDecoderConfig {
        &self.config
    }

    /// The plan, spelled out for this decoder's layers.
    pub fn layout(&self) -> &KvLayout {
        &self.plan.layout
    }

    /// The float type that it computes in.
    pub fn dtype(&self) -> DType {
        self.norm.gamma.val().dtype()
    }

    /// Where it is.
    pub fn device(&self) -> B::Device {
        self.norm.gamma.val().device()
    }

    /// Reads long prompts this many tokens of all rows at a time, at least one of each: activations
    /// then take memory for no more. Without it, as many as the backend is fastest with. The logits
    /// are the same but for rounding.
    #[must_use]
    pub fn with_prefill_chunk(self, tokens: usize) -> Self {
        Self {
            prefill_chunk: Some(tokens),
            ..self
        }
    }

    /// An empty cache for `batch` rows of up to `capacity` tokens, in the decoder's float type and
    /// on its device.
    ///
    /// # Errors
    /// [`CacheError::Zero`] if `batch` or `capacity` is 0, [`CacheError::TooLarge`] if their bytes
    /// cannot be addressed, [`CacheError::Autodiff`] on a backend that tracks gradients.
    pub fn new_cache(&self, batch: usize, capacity: usize) -> Result<FusedKvCache<B>, CacheError> {
        self.new_cache_of(CacheDtype::Model, batch, capacity)
    }

    /// [`new_cache`](Self::new_cache) of other numbers: half or a quarter of the bytes.
    ///
    /// # Errors
    /// As [`new_cache`](Self::new_cache), and [`CacheError::UnsupportedDtype`] if the backend has
    /// no such numbers.
    pub fn new_cache_of(
        &self,
        dtype: CacheDtype,
        batch: usize,
        capacity: usize,
    ) -> Result<FusedKvCache<B>, CacheError> {
        let device = self.device();
        if B::ad_enabled(&device) {
            return Err(CacheError::Autodiff {
                backend: B::name(&device),
            });
        }
        FusedKvCache::new(
            CacheShape::clone(&self.cache_shape),
            batch,
            capacity,
            dtype,
            self.dtype(),
            &device,
        )
    }

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
        self.check_positions(&tokens, &past)?;
        let spans = self.spans(&tokens, &past, 0, &[]);
        let start = self.start(tokens, from);
        Ok(self.walk(start, spans, store, form, Some(Logits::All), watch))
    }

    /// Appends a chunk of tokens to the cache and returns logits: prefill in chunks of any size,
    /// decoding of one or several tokens. Each row continues where it stands; padding on its left
    /// is skipped, so that rows of different lengths give what each gives alone.
    ///
    /// # Shapes
    /// - tokens: `[batch, seq]`
    /// - output: `[batch, 1, vocab_size]` for [`Logits::Last`], `[batch, seq, vocab_size]` for
    ///   [`Logits::All`]
    ///
    /// # Errors
    /// - [`ForwardError::Tokens`] if there are none
    /// - [`CacheError::PlanMismatch`], [`CacheError::BatchMismatch`] or
    ///   [`CacheError::OverCapacity`] if the cache cannot take the tokens
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
        self.check_positions(&tokens, &cache.row_lens())?;
        let (first, last) = match (logits, self.prefill_chunk) {
            (Logits::Last, Some(most)) => tokens.split(most),
            _ => (Vec::new(), tokens),
        };
        Ok(among_threads::<B, _>(|| {
            for tokens in first {
                self.pass(tokens, cache, None);
            }
            let x = self.pass(last, cache, Some(logits));
            self.logits(self.norm.forward(x))
        }))
    }

    /// Appends checked tokens to the cache; [`walk`](Self::walk).
    fn pass(
        &self,
        tokens: TokenBatch<B>,
        cache: &mut FusedKvCache<B>,
        logits: Option<Logits>,
    ) -> Tensor<B, 3> {
        let spans = self.spans(&tokens, &cache.row_lens(), cache.len(), cache.holes());
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
            let input = layer.attention_input(&x);
            layer.self_attn.put(layout, i, &input, span, reach, store);
            if reach.queries == 0 {
                break;
            }
            // From here on nobody reads the other positions.
            x = last(x, reach.queries);
            let input = last(input, reach.queries);
            let attended = layer.self_attn.forward(form, layout, i, input, span, store);
            x = layer.add_attention(x, attended, &self.dropout);
            let output = layer.mlp.forward(layer.feed_forward_input(&x));
            x = layer.add_feed_forward(x, output, &self.dropout);
            x = layer.add_input(x, inputs.next());
        }
        watch(self.layers.len(), &x);
        x
    }

    /// What the bottom layer reads.
    fn embed(&self, tokens: Tensor<B, 2, Int>) -> Tensor<B, 3> {
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

    /// Whether there are angles for `tokens` after `past[row]` tokens of each row.
    fn check_positions(&self, tokens: &TokenBatch<B>, past: &[usize]) -> Result<(), ForwardError> {
        let [_, seq] = tokens.dims();
        let max_positions = self.config.max_positions;
        for (row, (past, padding)) in past.iter().zip(tokens.padding()).enumerate() {
            let positions = past + seq - padding;
            if positions > max_positions {
                return Err(ForwardError::TooManyPositions {
                    row,
                    positions,
                    max_positions,
                });
            }
        }
        Ok(())
    }

    /// Positions and visibility, for every kind of layers, of `tokens` after `past[row]` tokens of
    /// each row in `cached` slots with `holes`.
    fn spans(
        &self,
        tokens: &TokenBatch<B>,
        past: &[usize],
        cached: usize,
        holes: &[Holes],
    ) -> Vec<Span<B>> {
        let [_, seq] = tokens.dims();
        let device = tokens.device();
        let holes = tokens.holes(holes, cached);
        let positions: Option<Vec<Vec<usize>>> = (!holes.is_empty()).then(|| {
            let rows = past.iter().zip(tokens.padding());
            rows.map(|(past, &padding)| {
                (0..seq).map(|i| past + i.saturating_sub(padding)).collect()
            })
            .collect()
        });
        let angles = |rope: &Rope| match &positions {
            None => rope.range(cached, seq, &device),
            Some(positions) => {
                let angles = rope.gather(positions, &device);
                angles.expect("every row of a batch has as many columns")
            }
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

/// The last `len` positions of `[batch, seq, width]`.
fn last<B: Backend>(x: Tensor<B, 3>, len: usize) -> Tensor<B, 3> {
    let [_, seq, _] = x.dims();
    match seq == len {
        true => x,
        false => x.narrow(1, seq - len, len),
    }
}
