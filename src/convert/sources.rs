//! Which layers are best kept, and what the others best read.

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::layerwise::{Pair, fit_half, goals};
use super::stages::{ConversionConfig, convert_in_stages};
use super::{ConvertError, TOKENS_PER_PASS, convert, windows};
use crate::decoder::{FusedKvDecoder, Half};
use crate::plan::{BlendWeights, KvPlan, KvSource, LayerKv};

/// A plan for a standard decoder, and what it was chosen by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlanChoice {
    /// The plan of the lowest perplexity among those tried.
    pub plan: KvPlan,
    /// The plans found by the errors, and FusedKV at the same cache.
    pub tried: Vec<TriedPlan>,
    /// What each layer loses by reading each layer below alone.
    pub errors: Vec<SourceError>,
}

/// A plan that a model was converted to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TriedPlan {
    /// The plan.
    pub plan: KvPlan,
    /// After the last stage, on the text's last quarter.
    pub perplexity: f64,
}

/// What a layer loses by reading a layer below instead of itself.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceError {
    /// The layer that reads, counted from 0.
    pub layer: usize,
    /// The layer it reads.
    pub source: usize,
    /// ‖x − y‖² / ‖y‖² of the residual stream after its attention, the mean over tokens, when it alone
    /// reads another layer and its blend and output projection are fitted.
    pub error: f64,
}

/// Chooses a plan that stores `cache` of the layers' keys and values (rounded down to whole layers), by
/// what the layers of this model lose. The rule:
///
/// 1. The error of every layer by every layer below of its kind ([`SourceError`]), on the text's first
///    4096 tokens.
/// 2. From all layers storing, the one goes whose going adds least to the sum of the errors of those
///    that do not store, each by the best of those that do; again until few enough store. Of equals
///    the highest goes.
/// 3. Layers that do not store read, per channel weighted, the one that is best for them, or blend the
///    best two: two plans.
/// 4. These and FusedKV of as many layers are converted to on the text's first three quarters; the one
///    that predicts the last quarter best is chosen.
///
/// # Errors
/// [`ConvertError::Setting`] if `cache` is not below 1 or too small for a layer of every kind, and as
/// [`convert_in_stages`].
pub fn choose_plan<B: Backend>(
    model: &FusedKvDecoder<B>,
    cache: f64,
    tokens: &[u32],
    config: &ConversionConfig,
) -> Result<PlanChoice, ConvertError> {
    config.validate()?;
    let (kinds, of) = model.config().kinds();
    let stored = (cache * of.len() as f64) as usize;
    if !(stored >= kinds.len() && stored < of.len()) {
        return Err(ConvertError::Setting {
            field: "cache",
            value: cache,
            expected: "below 1 and enough for a layer of every kind",
        });
    }
    let (calibration, held_out) = tokens.split_at(tokens.len() / 4 * 3);
    let errors = errors(model, &of, calibration, config)?;
    let stores = stores(&of, &errors, stored);
    let found = [1, 2].map(|most| plan(&of, &errors, &stores, most));
    let fused = KvPlan::FusedKv {
        storage_layers: stored,
    };
    let mut tried = Vec::new();
    let settings = config.with_blends(false).with_layers(true);
    for plan in found.into_iter().chain([fused]) {
        // FusedKV asks for more than there may be: two layers, one of every kind at the bottom.
        if plan.resolve_kinds(&of).is_err() {
            continue;
        }
        let (_, report) =
            convert_in_stages(model, &plan, calibration, held_out, &settings, |_| ())?;
        let last = report.stages.last().and_then(|stage| stage.perplexity);
        let perplexity = last.unwrap_or(f64::NAN);
        tried.push(TriedPlan { plan, perplexity });
    }
    let best = tried
        .iter()
        .min_by(|a, b| a.perplexity.total_cmp(&b.perplexity));
    let best = best.expect("the plan found is one that can be tried");
    Ok(PlanChoice {
        plan: best.plan.clone(),
        tried,
        errors,
    })
}

/// Every layer's by every layer below of its kind, layer by layer.
fn errors<B: Backend>(
    model: &FusedKvDecoder<B>,
    kinds: &[usize],
    tokens: &[u32],
    config: &ConversionConfig,
) -> Result<Vec<SourceError>, ConvertError> {
    let n_layers = kinds.len();
    let few = &tokens[..tokens.len().min(TOKENS_PER_PASS)];
    let mut pairs = Vec::new();
    for batch in windows(model, few, config.context, config.bos)? {
        let standard = model.stream(batch)?;
        let converted = standard.clone();
        pairs.push(Pair {
            standard,
            converted,
        });
    }
    let readers = (0..n_layers).map(|source| {
        let layer = |layer| match layer > source && kinds[layer] == kinds[source] {
            true => blend(vec![source]),
            false => LayerKv::OWN,
        };
        let layers = (0..n_layers).map(layer).collect();
        convert(model, &KvPlan::Custom { layers })
    });
    let mut readers: Vec<_> = readers.collect::<Result<_, _>>()?;
    let mut errors = Vec::new();
    for layer in 0..n_layers {
        for pair in &mut pairs {
            model.put(layer, &mut pair.standard);
            pair.converted = pair.standard.clone();
        }
        let goals = goals(Half::Attention, layer, model, &pairs);
        for (source, reader) in readers.iter_mut().enumerate().take(layer) {
            if kinds[source] == kinds[layer] {
                let fit = fit_half(Half::Attention, layer, reader, &pairs, &goals, config.ridge);
                errors.push(SourceError {
                    layer,
                    source,
                    error: fit.0.after,
                });
            }
        }
        for (pair, goal) in pairs.iter_mut().zip(goals) {
            let stream = &mut pair.standard;
            stream.x = goal;
            let inputs = model.inputs(Half::FeedForward, layer, stream);
            stream.x = model.after(Half::FeedForward, layer, stream.x.clone(), inputs);
            stream.x = model.behind(layer, stream.x.clone(), stream);
        }
    }
    Ok(errors)
}

/// Keys and values blended of `sources`, per channel.
fn blend(sources: Vec<usize>) -> LayerKv {
    let blend = KvSource::Blend {
        sources,
        weights: BlendWeights::PerChannel,
    };
    LayerKv {
        key: blend.clone(),
        value: blend,
    }
}

/// Rule 2 of [`choose_plan`].
fn stores(kinds: &[usize], errors: &[SourceError], stored: usize) -> Vec<usize> {
    let mut stores: Vec<usize> = (0..kinds.len()).collect();
    while stores.len() > stored {
        let without = |going: usize| -> Vec<usize> {
            let left = stores.iter().copied().filter(|&store| store != going);
            left.collect()
        };
        let costs = stores.iter().rev().map(|&going| {
            let left = without(going);
            let readers = (0..kinds.len()).filter(|layer| !left.contains(layer));
            // None where a layer has nothing left to read.
            let lost = readers.map(|layer| Some(best(errors, layer, &left).first()?.error));
            (going, lost.sum::<Option<f64>>().unwrap_or(f64::INFINITY))
        });
        let going = costs.min_by(|(_, a), (_, b)| a.total_cmp(b));
        let (going, _) = going.expect("more store than shall");
        stores = without(going);
    }
    stores
}

/// Rule 3 of [`choose_plan`], of `most` sources.
fn plan(kinds: &[usize], errors: &[SourceError], stores: &[usize], most: usize) -> KvPlan {
    let layer = |layer| match stores.contains(&layer) {
        true => LayerKv::OWN,
        false => {
            let best = best(errors, layer, stores);
            let mut sources: Vec<_> = best.iter().take(most).map(|e| e.source).collect();
            sources.sort_unstable();
            blend(sources)
        }
    };
    KvPlan::Custom {
        layers: (0..kinds.len()).map(layer).collect(),
    }
}

/// The errors of a layer by those of `stores` that it can read, the least first.
fn best(errors: &[SourceError], layer: usize, stores: &[usize]) -> Vec<SourceError> {
    let readable = |e: &&SourceError| e.layer == layer && stores.contains(&e.source);
    let mut found: Vec<_> = errors.iter().filter(readable).copied().collect();
    found.sort_by(|a, b| a.error.total_cmp(&b.error));
    found
}
