//! Blends fitted to the keys or values that a layer had.

use burn::module::Param;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use nalgebra::{DMatrixView, DVector, DVectorView};

use super::report::{FitError, LayerFit};
use crate::attention::lite_source;
use crate::config::FusedKvDecoderConfig;
use crate::decoder::{FusedKvDecoder, Stream};
use crate::numbers::numbers;
use crate::plan::{KvLayout, KvPart, KvShape, PerPart};

/// Pulls fitted weights to where they started, as a share of the sources' mean square: decides
/// where the text does not, e.g. between sources that are alike.
const RIDGE: f64 = 1e-6;

/// Those of one layer's keys and values.
pub(super) struct Regressions {
    layer: usize,
    parts: PerPart<Regression>,
}

impl Regressions {
    pub fn new<B: Backend>(model: &FusedKvDecoder<B>, layer: usize) -> Self {
        let (layout, config) = (model.layout(), model.config());
        let parts = PerPart::new(|part| Regression::new(layout, layer, part, config));
        Self { layer, parts }
    }

    /// Adds the tokens of a stream with the sources, and of the one with the layer's own keys and values.
    pub fn add<B: Backend>(&mut self, sources: &Stream<B>, own: &Stream<B>) {
        for part in KvPart::BOTH {
            let regression = &mut self.parts[part];
            let target = own.stored(part, self.layer);
            let [rows, ..] = target.dims();
            let target = numbers(target);
            let read = regression.sources.iter();
            let read: Vec<_> = read.map(|&s| numbers(sources.stored(part, s))).collect();
            let len = target.len() / rows;
            for (row, target) in target.chunks(len).enumerate() {
                let read: Vec<_> = read.iter().map(|all| &all[row * len..][..len]).collect();
                regression.add(&read, target);
            }
        }
    }

    /// Gives the layer of `model` the fitted weights, where its plan has any.
    pub fn solve<B: Backend>(&self, model: &mut FusedKvDecoder<B>) -> LayerFit {
        let (key_weights, key) = self.parts[KvPart::Key].solve();
        let (value_weights, value) = self.parts[KvPart::Value].solve();
        let attention = &mut model.layers[self.layer].self_attn;
        for (part, weights) in [(KvPart::Key, key_weights), (KvPart::Value, value_weights)] {
            if let Some(blend) = attention.blend_mut(part) {
                set(blend, weights);
            }
        }
        LayerFit {
            layer: self.layer,
            key,
            value,
        }
    }
}

fn set<B: Backend>(param: &mut Param<Tensor<B, 3>>, weights: Vec<f64>) {
    *param = param.clone().map(|old| {
        let data = TensorData::new(weights, old.dims());
        Tensor::from_data(data, (&old.device(), old.dtype())).require_grad()
    });
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

    /// Adds one row's numbers, `[n_kv_heads, seq, head_dim]` of every source and of the layer itself.
    fn add(&mut self, sources: &[&[f32]], target: &[f32]) {
        let n = self.sources.len();
        let head_numbers = target.len() / self.heads;
        let shared = self.weights == 1;
        let mut x = vec![0.0; n];
        for (i, &y) in target.iter().enumerate() {
            let weight = match shared {
                true => 0,
                false => self.kv.weight_of(self.part, i % self.kv.head_dim),
            };
            let group = i / head_numbers * self.weights + weight;
            for (x, source) in x.iter_mut().zip(sources) {
                *x = f64::from(source[i]);
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
