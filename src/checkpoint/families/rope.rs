//! RoPE's keys: `rope_parameters` of newer files, `rope_theta` and `rope_scaling` of older ones.

use serde_json::{Map, Value, json};

use super::super::error::CheckpointError;
use super::super::keys::Keys;
use super::{Format, MAX_POSITIONS};
use crate::config::{FusedKvDecoderConfig, RopeConfig, RopeScaling};

/// How a family's files tell RoPE.
#[derive(Clone, Copy)]
pub(super) enum RopeKeys {
    /// One for all layers, of all channels.
    Flat,
    /// One for all layers, of some channels; LongRoPE or none, under several names, with the
    /// positions of training beside.
    Phi3,
    /// One for full attention, and one for layers with a window, which is never scaled in older files
    /// and has this base where they do not say.
    ByLayerType {
        sliding_theta: f64,
        /// The share of channels that full attention rotates where files do not say; none: all. A
        /// family that has one has no older files.
        rotated: Option<f64>,
    },
}

/// Of layers with full attention, and of those with a window where theirs is another.
pub(super) struct Ropes {
    pub full: RopeConfig,
    pub sliding: Option<RopeConfig>,
}

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";
const PROPORTIONAL: &str = "proportional";
const POSITIONS: &str = "original_max_position_embeddings";
const TYPES: &str = "\"default\", \"linear\", \"dynamic\", \"proportional\", \"llama3\", \"yarn\" or \
                     \"longrope\"";
const ROTATED: &str = "partial_rotary_factor";

impl Ropes {
    pub fn of(&self, sliding: bool) -> &RopeConfig {
        self.sliding
            .as_ref()
            .filter(|_| sliding)
            .unwrap_or(&self.full)
    }

    /// The positions a model of `max_position_embeddings` reads: with a base that grows with the
    /// text, there is no last one; files with YaRN may tell those of the first training alone.
    pub fn reach(&self, told: usize) -> usize {
        match self.full.scaling {
            RopeScaling::Dynamic { .. } => MAX_POSITIONS,
            RopeScaling::Yarn {
                factor, positions, ..
            } => told.max((factor * positions as f64).min(MAX_POSITIONS as f64) as usize),
            _ => told,
        }
    }
}

pub(super) fn read(
    keys: &Keys,
    format: &Format,
    head_dim: usize,
    max_positions: usize,
) -> Result<Ropes, CheckpointError> {
    let scaling = keys.object("rope_scaling")?.filter(|rope| !rope.is_empty());
    let parameters = keys.object("rope_parameters")?;
    let read = |theta: f64, rope: Option<&Keys>| {
        Reader {
            keys,
            format,
            head_dim,
            max_positions,
        }
        .rope(theta, rope)
    };
    let theta = keys.number("rope_theta")?;
    let default = format.defaults.rope_theta;
    let RopeKeys::ByLayerType {
        sliding_theta,
        rotated,
    } = format.rope
    else {
        let rope = scaling.as_ref().or(parameters.as_ref());
        // The base may be told twice, but not in two ways.
        for rope in [&scaling, &parameters].into_iter().flatten() {
            if let (Some(theta), Some(found)) = (theta, rope.number("rope_theta")?)
                && theta != found
            {
                let expected = format!("{found}, as in `{}`", rope.name());
                return Err(keys.wrong("rope_theta", expected));
            }
        }
        let told = match &parameters {
            Some(rope) => rope.number("rope_theta")?,
            None => None,
        };
        return Ok(Ropes {
            full: read(theta.or(told).unwrap_or(default), rope)?,
            sliding: None,
        });
    };
    let by_type = |kind: &str| match &parameters {
        Some(parameters) => parameters.object(kind),
        None => Ok(None),
    };
    let full = scaling.or(by_type(FULL)?);
    let local = keys.number("rope_local_base_freq")?;
    let theta = theta.unwrap_or(default);
    Ok(Ropes {
        full: match (&full, rotated) {
            (None, Some(rotated)) => RopeConfig {
                scaling: RopeScaling::Proportional {
                    rotated,
                    factor: 1.0,
                },
                ..RopeConfig::new(theta)
            },
            _ => read(theta, full.as_ref())?,
        },
        sliding: Some(read(
            local.unwrap_or(sliding_theta),
            by_type(SLIDING)?.as_ref(),
        )?),
    })
}

struct Reader<'a> {
    /// The whole file's.
    keys: &'a Keys,
    format: &'a Format,
    head_dim: usize,
    max_positions: usize,
}

impl Reader<'_> {
    /// What an object says of RoPE, with a base for one that says none.
    fn rope(&self, theta: f64, rope: Option<&Keys>) -> Result<RopeConfig, CheckpointError> {
        let rotary_dim = self.rotary_dim(rope)?;
        let Some(rope) = rope else {
            return Ok(RopeConfig {
                rotary_dim,
                ..RopeConfig::new(theta)
            });
        };
        Ok(RopeConfig {
            theta: rope.number("rope_theta")?.unwrap_or(theta),
            rotary_dim,
            scaling: self.scaling(rope, rotary_dim.unwrap_or(self.head_dim))?,
        })
    }

    /// The share of channels that are rotated, beside the other keys or among RoPE's.
    fn rotated<'k>(&'k self, rope: Option<&'k Keys>) -> Result<(&'k Keys, f64), CheckpointError> {
        let rope = rope.filter(|rope| rope.get(ROTATED).is_some());
        let keys = rope.unwrap_or(self.keys);
        Ok((keys, keys.number(ROTATED)?.unwrap_or(1.0)))
    }

    /// Channels that are rotated, the first ones; none: all.
    fn rotary_dim(&self, rope: Option<&Keys>) -> Result<Option<usize>, CheckpointError> {
        match self.rotated(rope)? {
            (_, 1.0) => Ok(None),
            (_, rotated) if matches!(self.format.rope, RopeKeys::Phi3) => {
                Ok(Some((self.head_dim as f64 * rotated) as usize))
            }
            // Its own channels, which are not the first ones.
            _ if rope.is_some_and(is_proportional) => Ok(None),
            (keys, _) => Err(keys.wrong(ROTATED, "1")),
        }
    }

    fn scaling(&self, rope: &Keys, rotary_dim: usize) -> Result<RopeScaling, CheckpointError> {
        let type_key = match rope.get("rope_type") {
            Some(_) => "rope_type",
            None => "type",
        };
        let name = rope.text(type_key)?;
        let number = |key: &str, default: f64| -> Result<f64, CheckpointError> {
            Ok(rope.number(key)?.unwrap_or(default))
        };
        let needed = |key: &str| rope.number(key)?.ok_or_else(|| rope.wrong(key, "a number"));
        let positions = || -> Result<usize, CheckpointError> {
            let beside = match self.format.rope {
                RopeKeys::Phi3 => self.keys.optional_count(POSITIONS)?.or(Some(4096)),
                _ => None,
            };
            Ok(match beside {
                Some(positions) => positions,
                None => rope
                    .optional_count(POSITIONS)?
                    .unwrap_or(self.max_positions),
            })
        };
        match (name.as_deref().unwrap_or("default"), self.format.rope) {
            ("default", _) => Ok(RopeScaling::Default),
            ("longrope" | "su" | "yarn", RopeKeys::Phi3) | ("longrope", _) => {
                let factors = |key: &str| {
                    let factors = rope.numbers(key)?;
                    let pairs = rotary_dim / 2;
                    let expected = format!("a list of {pairs} numbers");
                    let factors = factors.filter(|factors| factors.len() == pairs);
                    factors.ok_or_else(|| rope.wrong(key, expected))
                };
                let positions = positions()?;
                Ok(RopeScaling::LongRope {
                    short_factor: factors("short_factor")?,
                    long_factor: factors("long_factor")?,
                    attention_factor: match rope.number("attention_factor")? {
                        Some(factor) => factor,
                        None => {
                            let longer = self.max_positions as f64 / positions as f64;
                            let longer = number("factor", longer)?;
                            long_rope_factor(longer, positions)
                        }
                    },
                    positions,
                })
            }
            (_, RopeKeys::Phi3) => Err(rope.wrong(type_key, "\"default\" or \"longrope\"")),
            ("linear", _) => Ok(RopeScaling::Linear {
                factor: needed("factor")?,
            }),
            (PROPORTIONAL, _) => Ok(RopeScaling::Proportional {
                rotated: self.rotated(Some(rope))?.1,
                factor: number("factor", 1.0)?,
            }),
            ("dynamic", _) => Ok(RopeScaling::Dynamic {
                factor: needed("factor")?,
                positions: self.max_positions,
            }),
            ("llama3", _) => Ok(RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                positions: positions()?,
            }),
            ("yarn", _) => {
                let factor = needed("factor")?;
                let told = rope.number("attention_factor")?;
                let [scale, all] = ["mscale", "mscale_all_dim"].map(|key| number(key, 0.0));
                Ok(RopeScaling::Yarn {
                    factor,
                    beta_fast: number("beta_fast", 32.0)?,
                    beta_slow: number("beta_slow", 1.0)?,
                    attention_factor: match (told, scale?, all?) {
                        (Some(told), _, _) => told,
                        (None, 0.0, _) | (None, _, 0.0) => yarn_factor(factor, 1.0),
                        (None, scale, all) => yarn_factor(factor, scale) / yarn_factor(factor, all),
                    },
                    truncate: rope.flag("truncate")?.unwrap_or(true),
                    positions: positions()?,
                })
            }
            _ => Err(rope.wrong(type_key, TYPES)),
        }
    }
}

fn is_proportional(rope: &Keys) -> bool {
    let kind = rope.get("rope_type").or_else(|| rope.get("type"));
    kind.and_then(Value::as_str) == Some(PROPORTIONAL)
}

/// √(1 + ln s / ln L), for texts s times as long as the L positions of training (arXiv 2402.13753).
fn long_rope_factor(longer: f64, positions: usize) -> f64 {
    match longer > 1.0 {
        true => (1.0 + longer.ln() / (positions as f64).ln()).sqrt(),
        false => 1.0,
    }
}

/// 0.1 · m · ln s + 1, for texts s times as long (arXiv 2309.00071).
fn yarn_factor(longer: f64, scale: f64) -> f64 {
    match longer > 1.0 {
        true => 0.1 * scale * longer.ln() + 1.0,
        false => 1.0,
    }
}

/// Writes `rope_parameters`, and what older readers know: `rope_theta` and, where there is any, the
/// scaling.
pub(super) fn write(json: &mut Value, config: &FusedKvDecoderConfig, format: &Format) {
    let full = config.rope();
    let object = object(&full, config, format);
    let has_older_files = !matches!(
        format.rope,
        RopeKeys::ByLayerType {
            rotated: Some(_),
            ..
        }
    );
    if has_older_files {
        json["rope_theta"] = json!(full.theta);
        if full.scaling != RopeScaling::Default {
            json["rope_scaling"] = object.clone();
        }
    }
    if let RopeScaling::Dynamic { positions, .. } = full.scaling {
        json["max_position_embeddings"] = json!(positions);
    }
    if let (RopeKeys::Phi3, RopeScaling::LongRope { positions, .. }) = (format.rope, &full.scaling)
    {
        json[POSITIONS] = json!(positions);
    }
    match format.rope {
        RopeKeys::Flat | RopeKeys::Phi3 => json["rope_parameters"] = object,
        RopeKeys::ByLayerType { sliding_theta, .. } => {
            let slides = |kind: &&crate::config::LayerKind| kind.window.is_some();
            let sliding = config.block.layers.iter().find(slides);
            let sliding = sliding.and_then(|kind| kind.rope.clone());
            let sliding = sliding.unwrap_or_else(|| RopeConfig::new(sliding_theta));
            if has_older_files {
                json["rope_local_base_freq"] = json!(sliding.theta);
            }
            let sliding = self::object(&sliding, config, format);
            json["rope_parameters"] = json!({ FULL: object, SLIDING: sliding });
        }
    }
}

fn object(rope: &RopeConfig, config: &FusedKvDecoderConfig, format: &Format) -> Value {
    let mut map = Map::new();
    let mut set = |key: &str, value: Value| {
        map.insert(key.to_owned(), value);
    };
    set("rope_theta", json!(rope.theta));
    if let (RopeKeys::Phi3, Some(rotary_dim)) = (format.rope, rope.rotary_dim) {
        let factor = rotary_dim as f64 / config.head_dim as f64;
        set(ROTATED, json!(factor));
    }
    let name = match &rope.scaling {
        RopeScaling::Default => "default",
        RopeScaling::Linear { factor } => {
            set("factor", json!(factor));
            "linear"
        }
        RopeScaling::Dynamic { factor, .. } => {
            set("factor", json!(factor));
            "dynamic"
        }
        RopeScaling::Proportional { rotated, factor } => {
            set(ROTATED, json!(rotated));
            if *factor != 1.0 {
                set("factor", json!(factor));
            }
            PROPORTIONAL
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            positions,
        } => {
            set("factor", json!(factor));
            set("low_freq_factor", json!(low_freq_factor));
            set("high_freq_factor", json!(high_freq_factor));
            set(POSITIONS, json!(positions));
            "llama3"
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
            positions,
        } => {
            set("factor", json!(factor));
            set("beta_fast", json!(beta_fast));
            set("beta_slow", json!(beta_slow));
            set("attention_factor", json!(attention_factor));
            set("truncate", json!(truncate));
            set(POSITIONS, json!(positions));
            "yarn"
        }
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            attention_factor,
            positions,
        } => {
            set("short_factor", json!(short_factor));
            set("long_factor", json!(long_factor));
            set("attention_factor", json!(attention_factor));
            set(POSITIONS, json!(positions));
            "longrope"
        }
    };
    set("rope_type", json!(name));
    Value::Object(map)
}
