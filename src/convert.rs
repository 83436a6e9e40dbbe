//! From a standard decoder to one of another plan, ready for further training.
//!
//! Where a layer stores keys or values under the new plan, it keeps its projection of them; where
//! it does not, it loses it and reads stored layers instead. Its fusion weights start as
//! FusedKV-Lite's, or are fitted so that the blends come closest to the keys and values it had:
//! least squares per kv head and channel (per pair of channels for keys, after RoPE), as one linear
//! regression each, on a text.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use nalgebra::{DMatrixView, DVector, DVectorView};
use thiserror::Error;

use crate::attention::lite_source;
use crate::cache::CacheError;
use crate::config::{ConfigError, FusedKvDecoderConfig};
use crate::decoder::{ForwardError, FusedKvDecoder};
use crate::numbers::numbers;
use crate::plan::{KvLayout, KvPart, KvPlan, KvShape, PerPart};
use crate::tokens::{TokenBatch, TokensError};

/// Pulls fitted weights to where they started, as a share of the sources' mean square: decides
/// where the text does not, e.g. between sources that are alike.
const RIDGE: f64 = 1e-6;

/// A conversion that cannot be done.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// Only a decoder whose layers all have keys and values of their own can be converted.
    #[error("the decoder's plan is `{method}`, expected `standard`")]
    NotStandard {
        /// Its plan's method.
        method: &'static str,
    },
    /// The plan does not fit the decoder.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Windows of no tokens, or longer than the decoder can read.
    #[error("context is {context}, expected 1 to {max_positions}")]
    Context {
        /// Tokens per window.
        context: usize,
        /// What the decoder is configured for.
        max_positions: usize,
    },
    /// The decoder cannot read the calibration text.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

impl From<TokensError> for ConvertError {
    fn from(error: TokensError) -> Self {
        Self::Forward(error.into())
    }
}

impl From<CacheError> for ConvertError {
    fn from(error: CacheError) -> Self {
        Self::Forward(error.into())
    }
}

/// How far the blends of a converted layer are from the keys and values it had; 0 of those that stay
/// its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerFit {
    /// The layer, counted from 0.
    pub layer: usize,
    /// Of its keys, after RoPE.
    pub key: FitError,
    /// Of its values.
    pub value: FitError,
}

/// ‖blend − original‖² / ‖original‖² over the calibration text; 1 is as far as zeros are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FitError {
    /// With the weights of FusedKV-Lite.
    pub before: f64,
    /// With the fitted weights; the same where the plan has none.
    pub after: f64,
}

/// A decoder of another plan with the weights of a standard one; fusion weights are FusedKV-Lite's,
/// the α of YOCO++ 0.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::{FusedKvDecoderConfig, KvPlan, convert};
///
/// let config = FusedKvDecoderConfig::tiny(256, KvPlan::Standard);
/// let standard = config.init::<Flex>(&FlexDevice::default())?;
/// let plan = KvPlan::FusedKv { storage_layers: 3 };
/// let fused = convert::convert(&standard, &plan)?;
/// let text: Vec<u32> = (0..200).map(|i| i * i % 256).collect();
/// let (fitted, layers) = convert::convert_fitted(&standard, &plan, &text, 64)?;
/// assert!(layers[0].key.after <= layers[0].key.before);
/// # let _ = (fused, fitted);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ConvertError::NotStandard`], [`ConvertError::Config`].
pub fn convert<B: Backend>(
    model: &FusedKvDecoder<B>,
    plan: &KvPlan,
) -> Result<FusedKvDecoder<B>, ConvertError> {
    let config = model.config();
    if config.plan != KvPlan::Standard {
        return Err(ConvertError::NotStandard {
            method: config.plan.method(),
        });
    }
    let config = FusedKvDecoderConfig {
        plan: plan.clone(),
        ..config.clone()
    };
    model.visit(&mut Draw);
    let mut converted = config.init::<B>(&model.device())?;
    converted.embed_tokens = model.embed_tokens.clone();
    converted.embed_tokens_per_layer = model.embed_tokens_per_layer.clone();
    converted.per_layer_model_projection = model.per_layer_model_projection.clone();
    converted.per_layer_projection_norm = model.per_layer_projection_norm.clone();
    converted.norm = model.norm.clone();
    converted.lm_head = model.lm_head.clone();
    for (to, from) in converted.layers.iter_mut().zip(&model.layers) {
        let (fusion, residual) = (
            to.self_attn.kv_fusion.take(),
            to.self_attn.kv_residual.take(),
        );
        let keeps_k_proj = to.self_attn.k_proj.is_some();
        let keeps_k_norm = to.self_attn.k_norm.is_some();
        let keeps_v_proj = to.self_attn.v_proj.is_some();
        // Everything but what the plan decides is the standard decoder's.
        *to = from.clone();
        let to = &mut to.self_attn;
        to.k_proj = to.k_proj.take().filter(|_| keeps_k_proj);
        to.k_norm = to.k_norm.take().filter(|_| keeps_k_norm);
        to.v_proj = to.v_proj.take().filter(|_| keeps_v_proj);
        let dtype = model.dtype();
        to.kv_fusion = fusion.map(|fusion| cast(fusion, dtype));
        to.kv_residual = residual.map(|residual| cast(residual, dtype));
    }
    Ok(converted)
}

/// [`convert`] with fusion weights fitted on a calibration text, read in windows of `context`
/// tokens, and how well they fit.
///
/// Plans without weights are converted as [`convert`] does; their errors are reported all the same.
/// The normal equations are summed in f64 window by window: memory does not grow with the text.
///
/// # Errors
/// [`ConvertError`].
pub fn convert_fitted<B: Backend>(
    model: &FusedKvDecoder<B>,
    plan: &KvPlan,
    tokens: &[u32],
    context: usize,
) -> Result<(FusedKvDecoder<B>, Vec<LayerFit>), ConvertError> {
    let mut converted = convert(model, plan)?;
    let config = model.config();
    if context == 0 || context > config.max_positions {
        return Err(ConvertError::Context {
            context,
            max_positions: config.max_positions,
        });
    }
    let mut fits = Vec::new();
    let layout = converted.layout();
    for (layer, kv) in layout.layers().iter().enumerate() {
        let reuses = |part| !kv.part(part).is_own();
        if KvPart::BOTH.into_iter().any(reuses) {
            let regressions = PerPart::new(|part| Regression::new(layout, layer, part, config));
            fits.push((layer, regressions));
        }
    }
    let device = model.device();
    // No text at all is an error as in any other pass.
    for window in tokens
        .chunks(context)
        .chain(tokens.is_empty().then_some(tokens))
    {
        let batch = TokenBatch::from_rows(&[window], config.vocab_size, &device)?;
        let stored = model.keys_and_values(batch)?;
        for part in KvPart::BOTH {
            // A standard decoder stores every layer's.
            let all = (0..config.n_layers).map(|layer| numbers(stored(part, layer)));
            let all: Vec<_> = all.collect();
            for (layer, regressions) in &mut fits {
                regressions[part].add(&all, *layer);
            }
        }
    }
    let mut layers = Vec::new();
    for (layer, regressions) in fits {
        let (key_weights, key) = regressions[KvPart::Key].solve();
        let (value_weights, value) = regressions[KvPart::Value].solve();
        if let Some(fusion) = &mut converted.layers[layer].self_attn.kv_fusion {
            set(fusion.weight_mut(KvPart::Key), key_weights);
            set(fusion.weight_mut(KvPart::Value), value_weights);
        }
        layers.push(LayerFit { layer, key, value });
    }
    Ok((converted, layers))
}

/// Uses every parameter: those of random weights draw their values then, and a clone made before
/// draws others.
struct Draw;

impl<B: Backend> ModuleVisitor<B> for Draw {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        param.val();
    }
}

/// A module whose parameters are floats of type `dtype`.
fn cast<B: Backend, M: Module<B>>(module: M, dtype: DType) -> M {
    module.map(&mut Cast(dtype))
}

struct Cast(DType);

impl<B: Backend> ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

fn set<B: Backend>(param: &mut Option<Param<Tensor<B, 3>>>, weights: Vec<f64>) {
    if let Some(old) = param.take() {
        *param = Some(old.map(|old| {
            let data = TensorData::new(weights, old.dims());
            Tensor::from_data(data, (&old.device(), old.dtype())).require_grad()
        }));
    }
}

/// The normal equations of one layer's keys or values: for every weight group g (kv head and
/// channel), G_g w = m_g with G_g = Σ x xᵀ, m_g = Σ x y over tokens, where x are the sources' numbers
/// and y the layer's own.
struct Regression {
    sources: Vec<usize>,
    /// The weight of each source in FusedKV-Lite.
    start: Vec<f64>,
    part: KvPart,
    kv: KvShape,
    /// Kv heads and weights per head; one of each where all share.
    heads: usize,
    weights: usize,
    /// Whether the plan has weights.
    learned: bool,
    /// `[groups, sources, sources]`
    gram: Vec<f64>,
    /// `[groups, sources]`
    moment: Vec<f64>,
    /// Σ y² of all groups.
    square: f64,
}

impl Regression {
    fn new(layout: &KvLayout, layer: usize, part: KvPart, config: &FusedKvDecoderConfig) -> Self {
        let sources = layout.sources(part, layer).to_vec();
        let source = layout.layer(layer).part(part);
        let kv = config.layer(layer).kv;
        let shape = source.weights_shape(part, &kv);
        let [n, heads, weights] = shape.unwrap_or([sources.len(), 1, 1]);
        let lite = lite_source(part, &sources);
        Self {
            start: sources
                .iter()
                .map(|&source| f64::from(u8::from(Some(source) == lite)))
                .collect(),
            gram: vec![0.0; heads * weights * n * n],
            moment: vec![0.0; heads * weights * n],
            square: 0.0,
            learned: shape.is_some(),
            sources,
            part,
            kv,
            heads,
            weights,
        }
    }

    /// Adds a window's numbers, `all[layer]` being `[n_kv_heads, seq, head_dim]`.
    fn add(&mut self, all: &[Vec<f32>], layer: usize) {
        let n = self.sources.len();
        let target = &all[layer];
        let head_numbers = target.len() / self.heads;
        let shared = self.weights == 1;
        let mut x = vec![0.0; n];
        for (i, &y) in target.iter().enumerate() {
            let weight = match shared {
                true => 0,
                false => self.kv.weight_of(self.part, i % self.kv.head_dim),
            };
            let group = i / head_numbers * self.weights + weight;
            for (x, &source) in x.iter_mut().zip(&self.sources) {
                *x = f64::from(all[source][i]);
            }
            let y = f64::from(y);
            self.square += y * y;
            let gram = &mut self.gram[group * n * n..][..n * n];
            let moment = &mut self.moment[group * n..][..n];
            for (row, (moment, a)) in gram.chunks_mut(n).zip(moment.iter_mut().zip(&x)) {
                *moment += a * y;
                for (sum, b) in row.iter_mut().zip(&x) {
                    *sum += a * b;
                }
            }
        }
    }

    /// The weights `[sources, heads, channels]`, and the errors.
    fn solve(&self) -> (Vec<f64>, FitError) {
        let n = self.sources.len();
        let groups = self.heads * self.weights;
        let start = DVector::from_column_slice(&self.start);
        let mut weights = vec![0.0; n * groups];
        let (mut before, mut after) = (self.square, self.square);
        for group in 0..groups {
            let gram = DMatrixView::from_slice(&self.gram[group * n * n..][..n * n], n, n);
            let moment = DVectorView::from_slice(&self.moment[group * n..][..n], n);
            let fitted = match self.learned {
                true => ridge(gram, moment, &start),
                false => start.clone(),
            };
            // ‖y − x w‖² = ‖y‖² − 2 m·w + wᵀ G w
            let excess = |w: &DVector<f64>| w.dot(&(gram * w)) - 2.0 * moment.dot(w);
            before += excess(&start);
            after += excess(&fitted);
            for (source, &weight) in fitted.iter().enumerate() {
                weights[source * groups + group] = weight;
            }
        }
        // Differences of sums may fall below zero by rounding.
        let relative = |error: f64| match self.square > 0.0 {
            true => error.max(0.0) / self.square,
            false => 0.0,
        };
        let error = FitError {
            before: relative(before),
            after: relative(after),
        };
        (weights, error)
    }
}

/// argmin ‖y − x w‖² + λ ‖w − start‖²: (G + λ I)(w − start) = m − G start. Where the text has
/// nothing, or no numbers, the start.
fn ridge(
    gram: DMatrixView<'_, f64>,
    moment: DVectorView<'_, f64>,
    start: &DVector<f64>,
) -> DVector<f64> {
    let mut matrix = gram.into_owned();
    let lambda = RIDGE * gram.trace() / start.len() as f64;
    for i in 0..start.len() {
        matrix[(i, i)] += lambda;
    }
    match matrix.cholesky() {
        Some(factors) => start + factors.solve(&(moment - gram * start)),
        None => start.clone(),
    }
}
