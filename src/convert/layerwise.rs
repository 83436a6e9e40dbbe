//! Layer by layer: the last projections of a converted decoder's layers, fitted so that its residual
//! stream comes closest to the standard decoder's.
//!
//! For a half of a layer (attention, feed-forward) with last projection W, inputs h and stream x, and
//! y the standard decoder's stream after it, W + Δ with Δ = argmin Σ ‖y − x − (W + Δ) h‖² / ‖y‖² + λ ‖Δ‖².
//! x and h are the converted decoder's own, so that what was lost below is mended as well as what is
//! lost here. The weight 1 / ‖y‖² is that of what the next norm makes of an error.
//!
//! Behind a norm, u = (W + Δ) h reaches the stream as u / r ⊙ g. The fit holds r, the root mean square
//! of each token's u, where it was; whether the stream has come closer is measured.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};

use super::normal::NormalEquations;
use super::regression::Regressions;
use super::report::{FitError, LayerMatch};
use crate::decoder::{DecoderLayer, ForwardError, FusedKvDecoder, Half, Projection, Stream};
use crate::plan::{KvPart, LayerKv};
use crate::tokens::TokenBatch;

/// One batch in both decoders, at the same place.
pub(super) struct Pair<B: Backend> {
    pub standard: Stream<B>,
    pub converted: Stream<B>,
}

/// Fits every layer of `converted` from the lowest whose keys or values are not its own alone; below,
/// its weights are those of `standard`.
pub(super) fn fit<B: Backend>(
    standard: &FusedKvDecoder<B>,
    converted: &mut FusedKvDecoder<B>,
    batches: Vec<TokenBatch<B>>,
    ridge: f64,
) -> Result<Vec<LayerMatch>, ForwardError> {
    let layout = converted.layout().clone();
    let Some(lowest) = layout.layers().iter().position(|kv| *kv != LayerKv::OWN) else {
        return Ok(Vec::new());
    };
    let mut pairs = Vec::new();
    for batch in batches {
        let mut stream = converted.stream(batch)?;
        for layer in 0..lowest {
            converted.pass_layer(layer, &mut stream);
        }
        pairs.push(Pair {
            standard: stream.fork(),
            converted: stream,
        });
    }
    let fit = |layer: usize| {
        for pair in &mut pairs {
            standard.put(layer, &mut pair.standard);
            converted.put(layer, &mut pair.converted);
        }
        let mut half = |half| {
            let goals = goals(half, layer, standard, &pairs);
            let (error, streams) = fit_half(half, layer, converted, &pairs, &goals, ridge);
            for ((pair, goal), x) in pairs.iter_mut().zip(goals).zip(streams) {
                (pair.standard.x, pair.converted.x) = (goal, x);
            }
            error
        };
        let (attention, feed_forward) = (half(Half::Attention), half(Half::FeedForward));
        for pair in &mut pairs {
            for (model, stream) in [
                (standard, &mut pair.standard),
                (&*converted, &mut pair.converted),
            ] {
                stream.x = model.behind(layer, stream.x.clone(), stream);
            }
            pair.standard.store.retain(|_, _| false);
            pair.converted.store.retain(|part, source| {
                (layer + 1..layout.n_layers()).any(|reader| {
                    layout.sources(part, reader).contains(&source)
                        || layout.layer(reader).part(part).residual() == Some(source)
                })
            });
        }
        LayerMatch {
            layer,
            attention,
            feed_forward,
        }
    };
    Ok((lowest..layout.n_layers()).map(fit).collect())
}

/// Where the standard decoder's streams stand after a half of a layer.
pub(super) fn goals<B: Backend>(
    half: Half,
    index: usize,
    standard: &FusedKvDecoder<B>,
    pairs: &[Pair<B>],
) -> Vec<Tensor<B, 3>> {
    let goals = pairs.iter().map(|pair| {
        let inputs = standard.inputs(half, index, &pair.standard);
        standard.after(half, index, pair.standard.x.clone(), inputs)
    });
    goals.collect()
}

/// Fits a half of a layer, and where that leaves the converted decoder's streams.
pub(super) fn fit_half<B: Backend>(
    half: Half,
    index: usize,
    converted: &mut FusedKvDecoder<B>,
    pairs: &[Pair<B>],
    goals: &[Tensor<B, 3>],
    ridge: f64,
) -> (FitError, Vec<Tensor<B, 3>>) {
    let walk = |model: &FusedKvDecoder<B>, inputs: &[Tensor<B, 3>]| -> Vec<Tensor<B, 3>> {
        let after = pairs.iter().zip(inputs).map(|(pair, inputs)| {
            model.after(half, index, pair.converted.x.clone(), inputs.clone())
        });
        after.collect()
    };
    let read = |model: &FusedKvDecoder<B>| -> Vec<Tensor<B, 3>> {
        let inputs = pairs
            .iter()
            .map(|pair| model.inputs(half, index, &pair.converted));
        inputs.collect()
    };
    let mut inputs = read(converted);
    let mut streams = walk(converted, &inputs);
    let before = distance(goals, &streams);
    let mut after = before;
    // Nothing is lost where both are the same.
    if before > 0.0 {
        let kept = converted.layers[index].clone();
        let blends = KvPart::BOTH.map(|part| kept.self_attn.blend(part).is_some());
        if half == Half::Attention && blends.contains(&true) {
            let mut blends = Regressions::new(converted, index);
            for pair in pairs.iter() {
                blends.add(&pair.converted, &pair.standard);
            }
            blends.solve(converted);
            inputs = read(converted);
        }
        let missing = walk(converted, &inputs);
        let layer = &mut converted.layers[index];
        let equations = equations(half, layer, goals, &inputs, missing);
        if let Some(change) = equations.solve(ridge) {
            move_by(layer.last_projection_mut(half), change);
        }
        let fitted = walk(converted, &inputs);
        after = distance(goals, &fitted);
        if after <= before {
            streams = fitted;
        } else {
            converted.layers[index] = kept;
            after = before;
        }
    }
    (FitError { before, after }, streams)
}

/// Those of the change of a half's last projection that takes tokens from `streams` to `goals`, of
/// what it reads, `inputs`.
fn equations<B: Backend>(
    half: Half,
    layer: &DecoderLayer<B>,
    goals: &[Tensor<B, 3>],
    inputs: &[Tensor<B, 3>],
    streams: Vec<Tensor<B, 3>>,
) -> NormalEquations {
    let projection = layer.last_projection(half);
    let [width, outputs] = projection.weight.dims();
    let rows = width + usize::from(projection.bias.is_some());
    let mut equations = NormalEquations::new(rows, outputs);
    for ((goal, inputs), x) in goals.iter().zip(inputs).zip(streams) {
        let goal = wide(goal.clone());
        let mut missing = goal.clone() - wide(x);
        let mut weight = squares(goal).clamp_min(f32::MIN_POSITIVE).sqrt().recip();
        if let Some(norm) = layer.last_norm(half) {
            let [gain, rms] = norm.factors(wide(projection.forward(inputs.clone())));
            let gain = wide(gain);
            // A channel that the norm all but closes has no say.
            let squared = gain.clone().square();
            let floor = squared.clone().mean_dim(2) * 1e-4 + f64::from(f32::MIN_POSITIVE);
            missing = missing * rms.clone() * gain / (squared + floor);
            weight = weight / rms;
        }
        let mut inputs = wide(inputs.clone());
        if projection.bias.is_some() {
            let [batch, seq, _] = inputs.dims();
            let one = Tensor::ones([batch, seq, 1], (&inputs.device(), inputs.dtype()));
            inputs = Tensor::cat(vec![inputs, one], 2);
        }
        equations.add(
            (inputs * weight.clone()).flatten(0, 1),
            (missing * weight).flatten(0, 1),
        );
    }
    equations
}

/// Adds `[inputs, outputs]` to the weight, and a last row to the bias.
fn move_by<B: Backend>(projection: &mut Projection<B>, change: Vec<f64>) {
    let [inputs, outputs] = projection.weight.dims();
    let (weight, bias) = change.split_at(inputs * outputs);
    let kept = projection.clone();
    projection.weight = kept.weight.map(|kept| moved(kept, weight));
    projection.bias = kept.bias.map(|kept| kept.map(|kept| moved(kept, bias)));
}

fn moved<B: Backend, const D: usize>(kept: Tensor<B, D>, change: &[f64]) -> Tensor<B, D> {
    let change = TensorData::new(change.to_vec(), kept.dims());
    let change = Tensor::from_data(change, (&kept.device(), kept.dtype()));
    (kept.detach() + change).require_grad()
}

/// The mean over all tokens of ‖x − y‖² / ‖y‖², y being the goal.
fn distance<B: Backend>(goals: &[Tensor<B, 3>], streams: &[Tensor<B, 3>]) -> f64 {
    let (mut sum, mut tokens) = (0.0, 0);
    for (goal, x) in goals.iter().zip(streams) {
        let goal = wide(goal.clone());
        let size = squares(goal.clone()).clamp_min(f32::MIN_POSITIVE);
        let apart = squares(goal - wide(x.clone())) / size;
        let [batch, seq, _] = apart.dims();
        tokens += batch * seq;
        sum += apart.into_data().iter::<f64>().sum::<f64>();
    }
    sum / tokens as f64
}

/// Each token's ‖x‖², `[batch, seq, 1]`.
fn squares<B: Backend>(x: Tensor<B, 3>) -> Tensor<B, 3> {
    x.square().sum_dim(2)
}

/// f32 at least.
fn wide<B: Backend>(x: Tensor<B, 3>) -> Tensor<B, 3> {
    match x.dtype() {
        DType::F16 | DType::BF16 => x.cast(DType::F32),
        _ => x,
    }
}
