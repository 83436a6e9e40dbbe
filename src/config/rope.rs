//! RoPE as data: how far each pair of channels turns from one position to the next.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};

use super::error::{ConfigError, positive, range};

/// A rotary position embedding (arXiv 2104.09864).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Channels of a head that are rotated, the first ones; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary_dim: Option<usize>,
    /// How the frequencies are changed for texts longer than the model was first trained on.
    #[serde(default)]
    pub scaling: RopeScaling,
}

/// How RoPE's frequencies θ_j = theta^(−2j/rotary_dim) are changed for longer texts; named as in
/// Hugging Face's `rope_type`.
///
/// [`Dynamic`](Self::Dynamic) and [`LongRope`](Self::LongRope) have other frequencies once a text
/// reaches beyond the positions of training. Which ones is decided for each pass by the last position
/// it reads, as `transformers` does; keys that are cached keep the angles they were rotated by.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
#[non_exhaustive]
pub enum RopeScaling {
    /// As they are.
    #[default]
    Default,
    /// θ_j / factor (arXiv 2306.15595).
    Linear {
        /// How much longer texts are.
        factor: f64,
    },
    /// Of a base that grows with the text beyond `positions`, the "NTK-aware" scaling.
    Dynamic {
        /// How much longer texts may be.
        factor: f64,
        /// Positions of the first training.
        positions: usize,
    },
    /// θ_j / factor of the first pairs of channels; the others are not rotated (Gemma 4).
    Proportional {
        /// The share of the pairs that is, rounded down.
        rotated: f64,
        /// How much longer texts are.
        factor: f64,
    },
    /// Low frequencies divided by the factor, high ones as they are, and a blend between
    /// (Llama 3.1, arXiv 2407.21783).
    Llama3 {
        /// How much longer texts are.
        factor: f64,
        /// Turns within `positions` below which a frequency is low.
        low_freq_factor: f64,
        /// Turns within `positions` above which it is high.
        high_freq_factor: f64,
        /// Positions of the first training.
        positions: usize,
    },
    /// YaRN (arXiv 2309.00071): the same by a ramp over the channels; scores are scaled as well.
    Yarn {
        /// How much longer texts are.
        factor: f64,
        /// Turns within `positions` above which a frequency stays.
        beta_fast: f64,
        /// Turns below which it is divided by the factor.
        beta_slow: f64,
        /// What queries and keys are multiplied with, each.
        attention_factor: f64,
        /// Whether the ramp starts and ends at whole channels.
        truncate: bool,
        /// Positions of the first training.
        positions: usize,
    },
    /// LongRoPE (arXiv 2402.13753): each frequency divided by a factor of its own.
    LongRope {
        /// The divisors of texts of up to `positions`, one per pair of channels.
        short_factor: Vec<f64>,
        /// Those of longer texts.
        long_factor: Vec<f64>,
        /// What queries and keys are multiplied with, each.
        attention_factor: f64,
        /// Positions of the first training.
        positions: usize,
    },
}

impl RopeConfig {
    /// RoPE of all channels, nothing scaled.
    pub fn new(theta: f64) -> Self {
        Self {
            theta,
            rotary_dim: None,
            scaling: RopeScaling::Default,
        }
    }

    /// Channels that are rotated, of a head of `head_dim`.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        self.rotary_dim.unwrap_or(head_dim)
    }

    pub(super) fn validate(&self, head_dim: usize) -> Result<(), ConfigError> {
        positive("rope_theta", self.theta)?;
        let rotary_dim = self.rotary_dim(head_dim);
        if !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim || rotary_dim == 0 {
            return Err(ConfigError::RotaryDim {
                rotary_dim,
                head_dim,
            });
        }
        self.scaling.validate(rotary_dim / 2)
    }

    /// Radians per position of every rotated pair, in texts whose positions are below `reach`.
    pub(crate) fn frequencies(&self, head_dim: usize, reach: usize) -> Vec<f64> {
        let dim = self.rotary_dim(head_dim) as f64;
        let power = |theta: f64, j: usize| theta.powf(-2.0 * j as f64 / dim);
        let pairs = 0..self.rotary_dim(head_dim) / 2;
        let plain = pairs.clone().map(|j| power(self.theta, j));
        match &self.scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Dynamic { factor, positions } => {
                let longer = reach.max(*positions) as f64 / *positions as f64;
                let grown = (factor * longer - (factor - 1.0)).powf(dim / (dim - 2.0));
                pairs.map(|j| power(self.theta * grown, j)).collect()
            }
            RopeScaling::Proportional { rotated, factor } => {
                let rotated = (rotated * dim / 2.0).floor() as usize;
                let scaled = |(j, f)| if j < rotated { f / factor } else { 0.0 };
                plain.enumerate().map(scaled).collect()
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                positions,
            } => plain
                .map(|f| {
                    let turns = *positions as f64 * f / TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                })
                .collect(),
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                positions,
                ..
            } => {
                // The channel whose pair turns so often within `positions`.
                let channel = |turns: f64| {
                    dim * (*positions as f64 / (turns * TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (channel(*beta_fast), channel(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let divided = |j: usize| ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let scaled = |(j, f)| f / factor * divided(j) + f * (1.0 - divided(j));
                plain.enumerate().map(scaled).collect()
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                positions,
                ..
            } => {
                let factors = match reach > *positions {
                    true => long_factor,
                    false => short_factor,
                };
                plain.zip(factors).map(|(f, factor)| f / factor).collect()
            }
        }
    }

    /// What rotated queries and keys are multiplied with, each.
    pub(crate) fn attention_factor(&self) -> f64 {
        match &self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => *attention_factor,
            _ => 1.0,
        }
    }
}

impl RopeScaling {
    fn validate(&self, pairs: usize) -> Result<(), ConfigError> {
        let positions = match self {
            Self::Default => return Ok(()),
            Self::Linear { factor } => return positive("rope factor", *factor),
            Self::Proportional { rotated, factor } => {
                let share = (0.0..=1.0).contains(rotated);
                range("rope rotated", *rotated, share, "a share, 0 to 1")?;
                return positive("rope factor", *factor);
            }
            Self::Dynamic { factor, positions } => {
                positive("rope factor", *factor)?;
                // Its base is taken to the power of dim / (dim − 2).
                range("rotary_dim", 2.0 * pairs as f64, pairs > 1, "more than 2")?;
                positions
            }
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                positions,
            } => {
                positive("rope factor", *factor)?;
                positive("rope low_freq_factor", *low)?;
                let expected = "more than low_freq_factor";
                range("rope high_freq_factor", *high, high > low, expected)?;
                positions
            }
            Self::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor,
                positions,
                ..
            } => {
                positive("rope factor", *factor)?;
                positive("rope beta_fast", *beta_fast)?;
                positive("rope beta_slow", *beta_slow)?;
                positive("rope attention_factor", *attention_factor)?;
                positions
            }
            Self::LongRope {
                short_factor,
                long_factor,
                attention_factor,
                positions,
            } => {
                positive("rope attention_factor", *attention_factor)?;
                for (field, factors) in [
                    ("rope short_factor", short_factor),
                    ("rope long_factor", long_factor),
                ] {
                    if factors.len() != pairs {
                        return Err(ConfigError::RopeFactors {
                            field,
                            found: factors.len(),
                            expected: pairs,
                        });
                    }
                    for factor in factors {
                        positive(field, *factor)?;
                    }
                }
                positions
            }
        };
        match positions {
            0 => Err(ConfigError::Zero {
                field: "rope positions",
            }),
            _ => Ok(()),
        }
    }
}
