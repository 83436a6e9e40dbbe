//! Configurations that no decoder can be built from.

use thiserror::Error;

use crate::plan::PlanError;

/// A configuration no decoder can be built from.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The plan does not fit.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A size of 0.
    #[error("{field} is 0, expected at least 1")]
    Zero {
        /// The field's name.
        field: &'static str,
    },
    /// Query heads that cannot be shared out evenly.
    #[error("n_heads is {n_heads}, expected a multiple of n_kv_heads ({n_kv_heads})")]
    HeadGroups {
        /// Query heads.
        n_heads: usize,
        /// Key/value heads.
        n_kv_heads: usize,
    },
    /// RoPE rotates pairs of channels.
    #[error("head_dim is {0}, expected an even number")]
    OddHeadDim(usize),
    /// Channels that RoPE cannot rotate.
    #[error("rotary_dim is {rotary_dim}, expected an even number of at most head_dim ({head_dim})")]
    RotaryDim {
        /// Channels asked for.
        rotary_dim: usize,
        /// Channels of a head.
        head_dim: usize,
    },
    /// Not one number per rotated pair of channels.
    #[error("{field} has {found} factors, expected {expected}: one per rotated pair of channels")]
    RopeFactors {
        /// The field's name.
        field: &'static str,
        /// Factors given.
        found: usize,
        /// Pairs of channels.
        expected: usize,
    },
    /// Not one description per layer.
    #[error("{field} describes {found} layers, expected {n_layers} or none")]
    LayerCount {
        /// The field's name.
        field: &'static str,
        /// Layers described.
        found: usize,
        /// Layers of the decoder.
        n_layers: usize,
    },
    /// A number outside its range.
    #[error("{field} is {value}, expected {expected}")]
    Range {
        /// The field's name.
        field: &'static str,
        /// What it was.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
}

/// That a number is above 0, and one.
pub(super) fn positive(field: &'static str, value: f64) -> Result<(), ConfigError> {
    range(field, value, value > 0.0, "a positive number")
}

/// That a number `fits`, and is one.
pub(super) fn range(
    field: &'static str,
    value: f64,
    fits: bool,
    expected: &'static str,
) -> Result<(), ConfigError> {
    match fits && value.is_finite() {
        true => Ok(()),
        false => Err(ConfigError::Range {
            field,
            value,
            expected,
        }),
    }
}
