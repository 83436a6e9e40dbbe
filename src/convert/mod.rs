//! From a standard decoder to one of another plan, in stages, each of which can be left out.
//!
//! 1. [`convert`]: where a layer stores keys or values under the new plan, it keeps its projection of
//!    them; where it does not, it loses it and reads stored layers instead, with the fusion weights of
//!    FusedKV-Lite.
//! 2. [`convert_fitted`]: fusion weights such that the blends come closest to the keys and values the
//!    layer had: least squares per kv head and channel (per pair of channels for keys, after RoPE), as
//!    one linear regression each, on a text.
//! 3. [`Stage::Layers`] of [`convert_in_stages`]: layer by layer from the bottom, the last projection of
//!    attention and of the feed-forward block, so that the residual stream comes closest to the
//!    standard decoder's; what was lost below is mended on the way.
//!
//! All are closed forms: nothing is trained. [`choose_plan`] finds the layers that are best kept.

mod error;
mod layerwise;
mod normal;
mod regression;
mod report;
mod sources;
mod stages;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, backend::Backend};

pub use error::ConvertError;
pub use report::{ConversionReport, FitError, LayerFit, LayerMatch, Stage, StageReport};
pub use sources::{PlanChoice, SourceError, TriedPlan, choose_plan};
pub use stages::{ConversionConfig, convert_in_stages};

use crate::decoder::{FusedKvDecoder, OtherPlan};
use crate::plan::{KvPart, KvPlan};
use crate::tokens::TokenBatch;
use regression::Regressions;

/// Tokens of a pass over the calibration text.
const TOKENS_PER_PASS: usize = 4096;

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
/// [`ConvertError::NotStandard`], [`ConvertError::Adapted`], [`ConvertError::Config`].
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
    if model.lora().is_some() {
        return Err(ConvertError::Adapted);
    }
    model.visit(&mut Draw);
    Ok(model.under(&OtherPlan::new(model, plan)?))
}

/// [`convert`] with fusion weights fitted on a calibration text, read in windows of `context`
/// tokens, and how well they fit.
///
/// Plans without weights are converted as [`convert`] does; their errors are reported all the same.
/// The normal equations are summed in f64 pass by pass: memory does not grow with the text.
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
    let layers = fit_blends(
        model,
        &mut converted,
        windows(model, tokens, context, None)?,
    )?;
    Ok((converted, layers))
}

/// Fits the fusion weights of a decoder that a standard one was converted to.
fn fit_blends<B: Backend>(
    model: &FusedKvDecoder<B>,
    converted: &mut FusedKvDecoder<B>,
    batches: Vec<TokenBatch<B>>,
) -> Result<Vec<LayerFit>, ConvertError> {
    let n_layers = model.config().n_layers;
    let reuses = |&layer: &usize| {
        let kv = converted.layout().layer(layer);
        KvPart::BOTH.iter().any(|&part| !kv.part(part).is_own())
    };
    let fits = (0..n_layers).filter(reuses);
    let mut fits: Vec<_> = fits
        .map(|layer| Regressions::new(converted, layer))
        .collect();
    for batch in batches {
        let mut stream = model.stream(batch)?;
        for layer in 0..n_layers {
            model.pass_layer(layer, &mut stream);
        }
        for fit in &mut fits {
            fit.add(&stream, &stream);
        }
    }
    Ok(fits.iter().map(|fit| fit.solve(converted)).collect())
}

/// A text in windows of `context` tokens, each behind `bos` if there is one, as many in a batch as a pass
/// takes; a last, shorter one by itself.
fn windows<B: Backend>(
    model: &FusedKvDecoder<B>,
    tokens: &[u32],
    context: usize,
    bos: Option<u32>,
) -> Result<Vec<TokenBatch<B>>, ConvertError> {
    let config = model.config();
    let max_positions = config.max_positions - usize::from(bos.is_some());
    if context == 0 || context > max_positions {
        return Err(ConvertError::Context {
            context,
            max_positions,
        });
    }
    let device = model.device();
    let (full, rest) = tokens.split_at(tokens.len() / context * context);
    let pass = (TOKENS_PER_PASS / context).max(1) * context;
    // No text at all is an error as in any other pass.
    let alone = !rest.is_empty() || full.is_empty();
    let batches = full.chunks(pass).chain(alone.then_some(rest));
    let batch = |tokens: &[u32]| {
        let rows = tokens.chunks(context);
        let rows = rows.map(|row| bos.iter().chain(row).copied().collect());
        let rows: Vec<Vec<u32>> = rows.collect();
        Ok(TokenBatch::from_rows(&rows, config.vocab_size, &device)?)
    };
    batches.map(batch).collect()
}

/// Uses every parameter: those of random weights draw their values then, and a clone made before
/// draws others.
struct Draw;

impl<B: Backend> ModuleVisitor<B> for Draw {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        param.val();
    }
}
