//! How positions are rotated, as config.json says it.

use std::f64::consts::TAU;

use serde_json::{Map, Value, json};

use super::architectures::{Family, ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT};
use super::error::GgufError;
use super::file::GgufFile;
use super::keys::Keys;
use super::model::Model;

/// llama.cpp's where a file does not say.
const DEFAULT_THETA: f64 = 1e4;

/// By how much positions are divided.
const FACTOR: &str = ".rope.scaling.factor";
/// Its name in older files.
const OLDER_FACTOR: &str = ".rope.scale_linear";

/// Llama 3's, where the frequencies of a file leave a choice.
const LLAMA3_LOW: f64 = 1.0;
const LLAMA3_HIGH: f64 = 4.0;
const LLAMA3_POSITIONS: f64 = 8192.0;

/// Files have the factors in f32, computed in f32.
const TOLERANCE: f64 = 1e-4;

/// The base and what scales it.
#[derive(Debug)]
pub(super) struct Rope {
    pub theta: f64,
    /// Of gemma3's layers that slide.
    pub local_theta: f64,
    /// `rope_type` and its numbers, if there is a scaling.
    pub scaling: Option<Map<String, Value>>,
    /// The part of a head's channels that is rotated.
    pub partial_rotary_factor: f64,
}

impl Rope {
    /// Reads keys and, for some scalings, tensors.
    pub fn read(file: &GgufFile, model: &Model) -> Result<Self, GgufError> {
        let tensor = |name: &str| match file.tensors().contains_key(name) {
            true => file.numbers(name).map(Some),
            false => Ok(None),
        };
        let frequencies = tensor(ROPE_FREQUENCIES)?;
        let (long, short) = (tensor(ROPE_LONG)?, tensor(ROPE_SHORT)?);
        let keys = Keys::of(file, model.architecture.name);
        let base = |key| match keys.number(key)?.unwrap_or(DEFAULT_THETA) {
            theta if theta > 0.0 => Ok(theta),
            _ => Err(keys.wrong(key, "a number above 0")),
        };
        let (theta, local_theta) = (base(".rope.freq_base")?, base(".rope.freq_base_swa")?);
        let rotated = keys
            .count(".rope.dimension_count")?
            .unwrap_or(model.head_dim);
        let whole = rotated == model.head_dim || model.family == Family::Phi3;
        if !whole || rotated == 0 || rotated % 2 != 0 || rotated > model.head_dim {
            return Err(keys.wrong(".rope.dimension_count", model.head_dim.to_string()));
        }
        let scaling = match (frequencies, long.zip(short)) {
            (Some(factors), _) => Some(llama3(&keys, theta, rotated, &factors)?),
            (None, Some((long, short))) => Some(longrope(&keys, rotated, &long, &short)?),
            (None, None) => scaling(&keys)?,
        };
        Ok(Self {
            theta,
            local_theta,
            scaling,
            partial_rotary_factor: rotated as f64 / model.head_dim as f64,
        })
    }

    /// The object `rope_parameters` of layers whose base is `theta`.
    pub fn parameters(&self, theta: f64, scaled: bool) -> Map<String, Value> {
        let mut parameters = match &self.scaling {
            Some(scaling) if scaled => scaling.clone(),
            _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
        };
        parameters.insert("rope_theta".to_owned(), json!(theta));
        if self.partial_rotary_factor != 1.0 {
            let factor = json!(self.partial_rotary_factor);
            parameters.insert("partial_rotary_factor".to_owned(), factor);
        }
        parameters
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// A scaling that keys alone describe.
fn scaling(keys: &Keys) -> Result<Option<Map<String, Value>>, GgufError> {
    let key = match (keys.get(FACTOR), keys.get(OLDER_FACTOR)) {
        (None, Some(_)) => OLDER_FACTOR,
        _ => FACTOR,
    };
    let factor = || match keys.number(key)? {
        Some(factor) if factor > 0.0 => Ok(factor),
        _ => Err(keys.wrong(key, "a number above 0")),
    };
    let kind = ".rope.scaling.type";
    match keys.text(kind)? {
        // A longrope without factors rotates as none does.
        Some("none" | "longrope") => Ok(None),
        // As in llama.cpp a factor without a type is linear's, and 0 is no factor.
        None if keys.get(key).is_none() => Ok(None),
        None | Some("linear") => match keys.number(key)? {
            Some(0.0 | 1.0) => Ok(None),
            _ => Ok(Some(object(
                json!({ "rope_type": "linear", "factor": factor()? }),
            ))),
        },
        Some("yarn") => {
            for key in [
                ".rope.scaling.yarn_ext_factor",
                ".rope.scaling.yarn_log_multiplier",
            ] {
                if keys.get(key).is_some() {
                    return Err(keys.wrong(key, "none"));
                }
            }
            let positions = keys.needed_count(".rope.scaling.original_context_length")?;
            let mut yarn = object(json!({
                "rope_type": "yarn",
                "factor": factor()?,
                "original_max_position_embeddings": positions,
            }));
            for (key, name) in [
                (".rope.scaling.yarn_attn_factor", "attention_factor"),
                (".rope.scaling.yarn_beta_fast", "beta_fast"),
                (".rope.scaling.yarn_beta_slow", "beta_slow"),
            ] {
                if let Some(number) = keys.number(key)? {
                    yarn.insert(name.to_owned(), json!(number));
                }
            }
            Ok(Some(yarn))
        }
        Some(_) => Err(keys.wrong(kind, "none, linear, yarn or longrope")),
    }
}

/// Factors for long and short texts.
fn longrope(
    keys: &Keys,
    rotated: usize,
    long: &[f32],
    short: &[f32],
) -> Result<Map<String, Value>, GgufError> {
    for (tensor, factors) in [(ROPE_LONG, long), (ROPE_SHORT, short)] {
        if factors.len() != rotated / 2 {
            return Err(shape(keys, tensor, factors.len(), rotated / 2));
        }
    }
    let mut longrope = object(json!({
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
    }));
    // Hugging Face's own unless told otherwise.
    let positions = keys.needed_count(".context_length")? as f64;
    let original = keys.needed_count(".rope.scaling.original_context_length")? as f64;
    let factor = positions / original;
    let usual = match factor > 1.0 {
        true => (1.0 + factor.ln() / original.ln()).sqrt(),
        false => 1.0,
    };
    if let Some(found) = keys.number(".rope.scaling.attn_factor")?
        && (found - usual).abs() > TOLERANCE
    {
        longrope.insert("attention_factor".to_owned(), json!(found));
    }
    Ok(longrope)
}

fn shape(keys: &Keys, tensor: &str, found: usize, expected: usize) -> GgufError {
    GgufError::Shape {
        path: keys.file.path().to_owned(),
        tensor: tensor.to_owned(),
        found: vec![found],
        expected: vec![expected],
    }
}

/// Llama 3's scaling: the file has the factor of each frequency, Hugging Face the four numbers these
/// come from. Of `low`, `high` and the positions only ratios show: Llama 3's own are taken if they
/// give the file's factors, else those with its `low`.
fn llama3(
    keys: &Keys,
    theta: f64,
    rotated: usize,
    factors: &[f32],
) -> Result<Map<String, Value>, GgufError> {
    if factors.len() != rotated / 2 {
        return Err(shape(keys, ROPE_FREQUENCIES, factors.len(), rotated / 2));
    }
    let factors: Vec<f64> = factors.iter().map(|&factor| factor.into()).collect();
    let wavelengths: Vec<f64> = (0..factors.len())
        .map(|i| TAU * theta.powf(2.0 * i as f64 / rotated as f64))
        .collect();
    let factor = factors.iter().copied().fold(1.0, f64::max);
    let fits = |low: f64, high: f64, positions: f64| {
        let expected = wavelengths.iter().map(|&wavelength| {
            let smooth = ((positions / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            1.0 / ((1.0 - smooth) / factor + smooth)
        });
        let mut pairs = expected.zip(&factors);
        pairs.all(|(expected, found)| (expected / found - 1.0).abs() < TOLERANCE)
    };
    let mut candidates = vec![(LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_POSITIONS)];
    if let Some(positions) = keys.count(".rope.scaling.original_context_length")? {
        candidates.insert(0, (LLAMA3_LOW, LLAMA3_HIGH, positions as f64));
    }
    candidates.extend(fitted(&wavelengths, &factors, factor));
    let found = candidates
        .into_iter()
        .find(|&(low, high, positions)| fits(low, high, positions));
    let Some((low, high, positions)) = found else {
        return Err(GgufError::Entry {
            path: keys.file.path().to_owned(),
            at: format!("the tensor `{ROPE_FREQUENCIES}`"),
            reason: "its factors are not those of a scaling as Llama 3's".to_owned(),
        });
    };
    Ok(object(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": positions as u64,
    })))
}

/// Between the frequencies that are kept and those divided by `factor`, how much of a frequency is
/// kept is a line in the inverse of its wavelength; two points give it.
fn fitted(wavelengths: &[f64], factors: &[f64], factor: f64) -> Option<(f64, f64, f64)> {
    let between: Vec<(f64, f64)> = wavelengths
        .iter()
        .zip(factors)
        .filter(|&(_, &found)| found > 1.0 + TOLERANCE && found < factor * (1.0 - TOLERANCE))
        .map(|(wavelength, found)| {
            let kept = (1.0 / found - 1.0 / factor) / (1.0 - 1.0 / factor);
            (1.0 / wavelength, kept)
        })
        .collect();
    let (&(x0, y0), &(x1, y1)) = (between.first()?, between.last()?);
    // kept = (positions · x − low) / (high − low)
    let slope = (y1 - y0) / (x1 - x0);
    let low_share = slope * x0 - y0;
    let high = LLAMA3_LOW * (1.0 + 1.0 / low_share);
    let positions = LLAMA3_LOW * slope / low_share;
    let sound = high.is_finite() && positions.is_finite() && high > LLAMA3_LOW && positions >= 1.0;
    sound.then(|| (LLAMA3_LOW, (high * 1e3).round() / 1e3, positions.round()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scaling_is_found_from_its_factors() {
        for (factor, high, positions) in [(8.0, 4.0, 8192.0), (4.0, 8.0, 64.0), (2.5, 2.5, 1000.0)]
        {
            let wavelengths: Vec<f64> = (0..32)
                .map(|i| TAU * 1e4_f64.powf(i as f64 / 32.0))
                .collect();
            let factors: Vec<f64> = wavelengths
                .iter()
                .map(|wavelength| {
                    let kept = ((positions / wavelength - 1.0) / (high - 1.0)).clamp(0.0, 1.0);
                    // As files have it.
                    f64::from((1.0 / ((1.0 - kept) / factor + kept)) as f32)
                })
                .collect();
            let found = fitted(&wavelengths, &factors, factor);
            assert_eq!(found, Some((LLAMA3_LOW, high, positions)));
        }
        assert_eq!(fitted(&[1.0, 10.0], &[1.0, 4.0], 4.0), None);
    }
}
