//! The decoder: tokens → embedding → layers, each told by the plan where its keys and values come
//! from → output head.

mod attention;
mod error;
mod feed_forward;
mod layer;
mod projection;
mod record;
mod rope;

use std::sync::Arc;

use burn::module::{Initializer, Module};
use burn::nn::{Dropout, DropoutConfig, Embedding, EmbeddingConfig, RmsNorm, RmsNormConfig};
use burn::tensor::{Bool, Tensor, TensorData, backend::Backend};

pub use attention::Attention;
pub use error::ForwardError;
pub use feed_forward::SwiGluBlock;
pub use layer::DecoderLayer;
pub use projection::Projection;
pub use record::{DecoderRecord, PlanModule, PlanRecord, RecordError};
pub use rope::{Rope, RopeAngles, RopeError};

use crate::attention::FusionForm;
use crate::cache::{CacheDtype, CacheError, CacheShape, FusedKvCache, KvStore, Uncached};
use crate::config::{ConfigError, FusedKvDecoderConfig};
use crate::kernels::operands::Visibility;
use crate::kernels::{self, causal_mask, rms_norm, tied_head};
use crate::plan::KvLayout;
use crate::tokens::TokenBatch;

/// A Qwen3-style decoder whose [plan](crate::KvPlan) says which layers have keys and values of
/// their own; all methods are this decoder.
///
/// Should be created with [`FusedKvDecoderConfig::init`]. Field names are those of Hugging Face's
/// Qwen3.
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
    /// The layers, bottom first.
    pub layers: Vec<DecoderLayer<B>>,
    /// Over hidden_size, before the head.
    pub norm: RmsNorm<B>,
    /// `[hidden_size, vocab_size]`; none where the embedding is the head.
    pub lm_head: Option<Projection<B>>,
    dropout: Dropout,
    #[module(skip)]
    rope: Arc<Rope>,
    #[module(skip)]
    config: Arc<FusedKvDecoderConfig>,
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

/// What all layers share of one chunk of tokens.
#[derive(Clone, Debug)]
pub(crate) struct Span<B: Backend> {
    pub angles: RopeAngles<B>,
    pub visibility: Visibility<B>,
}

impl FusedKvDecoderConfig {
    /// Builds a decoder with random weights.
    ///
    /// # Errors
    /// [`ConfigError`] as [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<FusedKvDecoder<B>, ConfigError> {
        let layout = self.validate()?;
        Ok(FusedKvDecoder {
            embed_tokens: EmbeddingConfig::new(self.vocab_size, self.hidden_size)
                .with_initializer(self.initializer())
                .init(device),
            layers: (0..self.n_layers)
                .map(|index| DecoderLayer::new(self, &layout, index, device))
                .collect(),
            norm: new_norm(self.hidden_size, self, device),
            lm_head: (!self.tie_embeddings).then(|| {
                let shape = [self.hidden_size, self.vocab_size];
                Projection::new(shape, &self.initializer(), device)
            }),
            dropout: DropoutConfig::new(self.dropout).init(),
            rope: Arc::new(Rope::new(self.head_dim, self.rope_theta)),
            config: Arc::new(self.clone()),
            prefill_chunk: kernels::tokens_per_pass::<B>(),
            plan: PlanModule::new(layout),
        })
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
        let embedding = self.embed_tokens.weight.val();
        let device = embedding.device();
        if B::ad_enabled(&device) {
            return Err(CacheError::Autodiff {
                backend: B::name(&device),
            });
        }
        FusedKvCache::new(
            self.cache_shape(),
            batch,
            capacity,
            dtype,
            embedding.dtype(),
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
        tokens.check()?;
        let [batch, _] = tokens.dims();
        let past = vec![0; batch];
        self.check_positions(&tokens, &past)?;
        let span = self.span(&tokens, &past, 0, tokens.hidden_keys(&[], 0));
        let x = self.walk(tokens, span, &mut Uncached::new(), form, Some(Logits::All));
        Ok(self.head(x))
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
        cache.check(&self.cache_shape(), tokens.dims())?;
        self.check_positions(&tokens, &cache.row_lens())?;
        let (first, last) = match (logits, self.prefill_chunk) {
            (Logits::Last, Some(most)) => tokens.split(most),
            _ => (Vec::new(), tokens),
        };
        for tokens in first {
            self.pass(tokens, cache, None);
        }
        Ok(self.head(self.pass(last, cache, Some(logits))))
    }

    /// Appends checked tokens to the cache; [`walk`](Self::walk).
    fn pass(
        &self,
        tokens: TokenBatch<B>,
        cache: &mut FusedKvCache<B>,
        logits: Option<Logits>,
    ) -> Tensor<B, 3> {
        let hidden = tokens.hidden_keys(cache.holes(), cache.len());
        let span = self.span(&tokens, &cache.row_lens(), cache.len(), hidden);
        let padding = tokens.padding().to_vec();
        let mut append = cache.append(tokens.dims()[1]);
        let x = self.walk(tokens, span, &mut append, None, logits);
        append.commit(&padding);
        x
    }

    fn cache_shape(&self) -> CacheShape {
        CacheShape {
            layout: self.plan.layout.clone(),
            n_kv_heads: self.config.n_kv_heads,
            head_dim: self.config.head_dim,
        }
    }

    /// The one walk through the plan that every forward pass is: what the head needs for the logits
    /// asked for. Where none are it ends at the last keys and values, with nothing for the head.
    fn walk(
        &self,
        tokens: TokenBatch<B>,
        mut span: Span<B>,
        store: &mut impl KvStore<B>,
        form: Option<FusionForm>,
        logits: Option<Logits>,
    ) -> Tensor<B, 3> {
        let [_, seq] = tokens.dims();
        let mut x = self.embed_tokens.forward(tokens.into_tensor());
        let layout = self.layout();
        for (i, layer) in self.layers.iter().enumerate() {
            let attention = &layer.self_attn;
            let mut normed = rms_norm(&layer.input_layernorm, x.clone());
            attention.put(layout, i, &normed, &span, store);
            if i == layout.last_store() {
                match logits {
                    None => break,
                    // From here on nobody reads the other positions.
                    Some(Logits::Last) if seq > 1 => {
                        x = x.narrow(1, seq - 1, 1);
                        normed = normed.narrow(1, seq - 1, 1);
                        span = span.last();
                    }
                    Some(_) => {}
                }
            }
            let attended = attention.forward(form, layout, i, normed, &span, store);
            x = x + self.dropout.forward(attended);
            let normed = rms_norm(&layer.post_attention_layernorm, x.clone());
            x = x + self.dropout.forward(layer.mlp.forward(normed));
        }
        x
    }

    /// Logits of the last layer's output.
    fn head(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let x = rms_norm(&self.norm, x);
        match &self.lm_head {
            Some(head) => head.forward(x),
            None => tied_head(x, self.embed_tokens.weight.val()),
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

    /// Positions and visibility of `tokens` after `past[row]` tokens of each row in `cached` slots,
    /// of which `hidden` says which hold no token (none: all do).
    fn span(
        &self,
        tokens: &TokenBatch<B>,
        past: &[usize],
        cached: usize,
        hidden: Option<Vec<bool>>,
    ) -> Span<B> {
        let [batch, seq] = tokens.dims();
        let Some(hidden) = hidden else {
            return Span {
                angles: self.rope.range(cached, seq, &tokens.device()),
                visibility: if seq == 1 {
                    Visibility::All
                } else {
                    Visibility::Causal
                },
            };
        };
        let device = tokens.device();
        let positions: Vec<Vec<usize>> = past
            .iter()
            .zip(tokens.padding())
            .map(|(past, &padding)| (0..seq).map(|i| past + i.saturating_sub(padding)).collect())
            .collect();
        let keys = cached + seq;
        let hidden = TensorData::new(hidden, [batch, 1, 1, keys]);
        let hidden = Tensor::<B, 4, Bool>::from_data(hidden, &device).repeat_dim(2, seq);
        let future = causal_mask::<B>(seq, keys, &device).repeat_dim(0, batch);
        let angles = self.rope.gather(&positions, &device);
        Span {
            angles: angles.expect("every row of a batch has as many columns"),
            visibility: Visibility::Except(hidden.bool_or(future)),
        }
    }
}

impl<B: Backend> Span<B> {
    /// The last position's.
    fn last(self) -> Self {
        Self {
            angles: self.angles.last(),
            visibility: self.visibility.last(),
        }
    }
}

fn new_norm<B: Backend>(
    width: usize,
    config: &FusedKvDecoderConfig,
    device: &B::Device,
) -> RmsNorm<B> {
    RmsNormConfig::new(width)
        .with_epsilon(config.rms_norm_eps)
        .init(device)
}
