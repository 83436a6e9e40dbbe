//! A conversion from its first stage to its last.

use std::time::Instant;

use burn::config::Config;
use burn::tensor::backend::Backend;

use super::report::{ConversionReport, LayerFit, Stage, StageReport};
use super::{ConvertError, convert, fit_blends, layerwise, windows};
use crate::decoder::FusedKvDecoder;
use crate::plan::{KvLayout, KvPart, KvPlan};
use crate::score::{ScoreConfig, score};

/// How a conversion is done.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct ConversionConfig {
    /// Tokens per window of both texts.
    pub context: usize,
    /// A token that every window begins with beside them, the beginning of a text: for models that were
    /// trained to find one (`Tokenizer::bos`). It takes one of the decoder's positions.
    pub bos: Option<u32>,
    /// Whether fusion weights are fitted by themselves ([`Stage::Blends`]). [`Stage::Layers`] fits them
    /// as well, to what its layers then read.
    #[config(default = true)]
    pub blends: bool,
    /// Whether last projections are fitted ([`Stage::Layers`]).
    #[config(default = true)]
    pub layers: bool,
    /// What pulls the weights of [`Stage::Layers`] to where they were, as that many tokens at which they
    /// were right; above 0. The default was tried on one model of 135 M parameters and 8192 tokens.
    #[config(default = 1024.0)]
    pub ridge: f64,
}

impl ConversionConfig {
    pub(super) fn validate(&self) -> Result<(), ConvertError> {
        match self.ridge > 0.0 && self.ridge.is_finite() {
            true => Ok(()),
            false => Err(ConvertError::Setting {
                field: "ridge",
                value: self.ridge,
                expected: "a number above 0",
            }),
        }
    }
}

/// A standard decoder under another plan, in the stages that `config` says, and what each brought.
///
/// Fits on `calibration`; scores on `held_out` before the first stage and after each, unless it is
/// empty. `progress` gets each stage's report when it is done. [`Stage::Layers`] keeps both decoders'
/// streams at one layer, what that layer's last projection reads, and the stored keys and values that
/// layers above it read: about tokens · (4 · hidden_size + ffn_size + those) numbers.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::convert::{ConversionConfig, convert_in_stages};
/// use fusedkv::{FusedKvDecoderConfig, KvPlan};
///
/// let config = FusedKvDecoderConfig::tiny(256, KvPlan::Standard);
/// let standard = config.init::<Flex>(&FlexDevice::default())?;
/// let text: Vec<u32> = (0..600).map(|i| i * i % 251).collect();
/// let (calibration, held_out) = text.split_at(500);
/// let plan = KvPlan::FusedKv { storage_layers: 3 };
/// let settings = ConversionConfig::new(64);
/// let (fused, report) =
///     convert_in_stages(&standard, &plan, calibration, held_out, &settings, |stage| {
///         println!("{}: {:?}", stage.stage, stage.perplexity);
///     })?;
/// let layer = report.stages[2].layers[0];
/// assert!(layer.attention.after <= layer.attention.before);
/// # let _ = fused;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ConvertError`].
pub fn convert_in_stages<B: Backend>(
    model: &FusedKvDecoder<B>,
    plan: &KvPlan,
    calibration: &[u32],
    held_out: &[u32],
    config: &ConversionConfig,
    mut progress: impl FnMut(&StageReport),
) -> Result<(FusedKvDecoder<B>, ConversionReport), ConvertError> {
    config.validate()?;
    let context = config.context;
    let start = Instant::now();
    let mut converted = convert(model, plan)?;
    let seconds = start.elapsed().as_secs_f64();
    // Before any work is lost on it.
    let batches = match config.blends || config.layers {
        true => windows(model, calibration, context, config.bos)?,
        false => Vec::new(),
    };
    let perplexity = |model: &FusedKvDecoder<B>| match held_out {
        [] => Ok(None),
        text => {
            let score = score(model, text, &ScoreConfig::new(context).with_bos(config.bos));
            score.map(|score| Some(score.perplexity()))
        }
    };
    let mut report = ConversionReport {
        plan: plan.clone(),
        context,
        calibration_tokens: calibration.len(),
        held_out_tokens: held_out.len(),
        cache: stored_share(converted.layout()),
        standard_perplexity: perplexity(model)?,
        stages: Vec::new(),
    };
    let mut done = |stage, converted: &_, seconds, blends: Vec<LayerFit>, layers| {
        let stage = StageReport {
            stage,
            perplexity: perplexity(converted)?,
            seconds,
            blends,
            layers,
        };
        progress(&stage);
        report.stages.push(stage);
        Ok::<_, ConvertError>(())
    };
    done(Stage::Weights, &converted, seconds, Vec::new(), Vec::new())?;
    if config.blends {
        let start = Instant::now();
        let fits = fit_blends(model, &mut converted, batches.clone())?;
        let seconds = start.elapsed().as_secs_f64();
        done(Stage::Blends, &converted, seconds, fits, Vec::new())?;
    }
    if config.layers {
        let start = Instant::now();
        let layers = layerwise::fit(model, &mut converted, batches, config.ridge)?;
        let seconds = start.elapsed().as_secs_f64();
        done(Stage::Layers, &converted, seconds, Vec::new(), layers)?;
    }
    Ok((converted, report))
}

/// Stored keys and values as a share of those of all layers.
fn stored_share(layout: &KvLayout) -> f64 {
    let stored: usize = KvPart::BOTH.map(|part| layout.n_stored(part)).iter().sum();
    stored as f64 / (2 * layout.n_layers()) as f64
}
