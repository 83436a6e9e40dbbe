//! The decoder: tokens → embedding → layers, each told by the plan where its keys and values come
//! from → output head.

mod attention;
mod by_name;
#[cfg(all(test, feature = "flex"))]
mod dispatch;
mod embedding;
mod error;
mod feed_forward;
mod layer;
mod layer_input;
mod listed;
mod lora;
mod matrices;
mod module;
mod norm;
#[cfg(feature = "convert")]
mod other_plan;
mod projection;
mod record;
mod rope;
mod span;
#[cfg(feature = "convert")]
mod stream;
mod walk;
mod weight;

use std::sync::Arc;

use burn::module::Initializer;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{DType, backend::Backend};

use embedding::Embedding;
pub use error::ForwardError;
pub(crate) use layer::DecoderLayer;
#[cfg(feature = "train")]
pub(crate) use lora::Lora;
pub use lora::{LoraConfig, LoraError};
use norm::Norm;
#[cfg(feature = "convert")]
pub(crate) use other_plan::OtherPlan;
#[cfg(feature = "train")]
pub(crate) use other_plan::OtherPlanRecord;
pub(crate) use projection::Projection;
pub use record::{DecoderRecord, PlanRecord, RecordError};
pub use rope::{Rope, RopeAngles, RopeError};
#[cfg(feature = "convert")]
pub(crate) use stream::{Half, Stream};
pub use walk::Logits;
pub(crate) use weight::Weight;
pub use weight::{WeightError, WeightFormat};

use crate::cache::{CacheDtype, CacheError, CacheShape, FusedKvCache, SlotShape};
use crate::config::{ConfigError, FusedKvDecoderConfig, LayerSpec};
use crate::kernels;
use crate::plan::KvLayout;

/// A decoder whose [plan](crate::KvPlan) says which layers have keys and values of their own, and
/// whose [block](crate::config::BlockConfig) says what its layers compute; all methods and families
/// are this decoder.
///
/// Should be created with [`FusedKvDecoderConfig::init`]. Its parameters have Hugging Face's names
/// ([`parameter`](Self::parameter)); which there are follows from the plan and the block, and nothing
/// that is done to a decoder changes it.
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
#[derive(Clone, Debug)]
pub struct FusedKvDecoder<B: Backend> {
    /// `[vocab_size, hidden_size]`.
    pub(crate) embed_tokens: Embedding<B>,
    /// What layers are given of the tokens themselves, in blocks that have it, one layer beside the
    /// other: `[vocab_size, n_layers · layer_input_size]`.
    pub(crate) embed_tokens_per_layer: Option<Embedding<B>>,
    /// `[hidden_size, n_layers · layer_input_size]`.
    pub(crate) per_layer_model_projection: Option<Projection<B>>,
    /// Over layer_input_size.
    pub(crate) per_layer_projection_norm: Option<Norm<B>>,
    /// The layers, bottom first.
    pub(crate) layers: Vec<DecoderLayer<B>>,
    /// Over hidden_size, before the head.
    pub(crate) norm: Norm<B>,
    /// `[hidden_size, vocab_size]`; none where the embedding is the head.
    pub(crate) lm_head: Option<Projection<B>>,
    /// The plan, spelled out.
    layout: Arc<KvLayout>,
    dropout: Dropout,
    /// Of every kind of layers; none where it does not rotate.
    ropes: Arc<Vec<Option<Rope>>>,
    /// Of every kind of layers.
    windows: Arc<Vec<Option<usize>>>,
    /// What every cached pass compares its cache with.
    cache_shape: Arc<CacheShape>,
    config: Arc<FusedKvDecoderConfig>,
    /// What the adapters beside its projections are.
    lora: Option<Arc<LoraConfig>>,
    /// Tokens of all rows that a cached pass reads at once; none: all of them.
    prefill_chunk: Option<usize>,
}

impl FusedKvDecoderConfig {
    /// Builds a decoder with random weights.
    ///
    /// # Errors
    /// [`ConfigError`] as [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<FusedKvDecoder<B>, ConfigError> {
        let layout = Arc::new(self.validate()?);
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
            layers: (layout.layers().iter().enumerate())
                .map(|(index, layer)| DecoderLayer::new(self, layer, index, device))
                .collect(),
            norm: Norm::new(self.hidden_size, self, device),
            lm_head: (!self.tie_embeddings).then(|| {
                let shape = [self.hidden_size, self.vocab_size];
                Projection::new(shape, false, &self.initializer(), device)
            }),
            dropout: DropoutConfig::new(self.dropout).init(),
            ropes: Arc::new(kinds.iter().map(rope).collect()),
            windows: Arc::new(kinds.iter().map(|spec| spec.kind.window).collect()),
            cache_shape: Arc::new(self.cache_shape(&layout)),
            config: Arc::new(self.clone()),
            lora: None,
            prefill_chunk: kernels::tokens_per_pass::<B>(),
            layout,
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
        &self.layout
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
}
