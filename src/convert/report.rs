//! What each stage of a conversion did, and what it brought.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::plan::KvPlan;

/// How far the blends of a converted layer are from the keys and values it had: ‖blend − original‖² /
/// ‖original‖² over the calibration text, 0 of those that stay its own; 1 is as far as zeros are.
/// Before are the weights of FusedKV-Lite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerFit {
    /// The layer, counted from 0.
    pub layer: usize,
    /// Of its keys, after RoPE.
    pub key: FitError,
    /// Of its values.
    pub value: FitError,
}

/// How far the residual stream is from the standard decoder's: ‖x − y‖² / ‖y‖², the mean over the
/// tokens of the calibration text. The layers below are fitted already.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerMatch {
    /// The layer, counted from 0.
    pub layer: usize,
    /// After its attention.
    pub attention: FitError,
    /// After its feed-forward block; before is with its attention fitted.
    pub feed_forward: FitError,
}

/// A relative squared error before and after a fit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FitError {
    /// With the weights there were.
    pub before: f64,
    /// With the fitted weights; the same where nothing is fitted.
    pub after: f64,
}

/// A stage of a conversion; each starts where the one before it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Stage {
    /// The standard decoder's weights, fusion weights as FusedKV-Lite's.
    Weights,
    /// Fusion weights fitted to the keys and values that layers had.
    Blends,
    /// Last projections fitted to the residual stream, layer by layer.
    Layers,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Weights => "weights",
            Self::Blends => "blends",
            Self::Layers => "layers",
        })
    }
}

/// What one stage did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StageReport {
    /// The stage.
    pub stage: Stage,
    /// On the held-out text, per token, after the stage; none without such a text.
    pub perplexity: Option<f64>,
    /// What the stage took, scoring not included.
    pub seconds: f64,
    /// Of [`Stage::Blends`], layer by layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blends: Vec<LayerFit>,
    /// Of [`Stage::Layers`], layer by layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerMatch>,
}

/// What a conversion did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ConversionReport {
    /// The plan converted to.
    pub plan: KvPlan,
    /// Tokens per window, of both texts.
    pub context: usize,
    /// Tokens of the calibration text.
    pub calibration_tokens: usize,
    /// Tokens of the held-out text; all but the first are predicted.
    pub held_out_tokens: usize,
    /// Cached numbers per token, as a share of the standard decoder's.
    pub cache: f64,
    /// The standard decoder's perplexity on the held-out text.
    pub standard_perplexity: Option<f64>,
    /// The stages, in order.
    pub stages: Vec<StageReport>,
}
