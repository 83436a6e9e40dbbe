//! Numbers in JSON, which has none that are infinite or not a number: those are written as text,
//! `"inf"`, `"-inf"` and `"NaN"`.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};

pub(super) fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match number.is_finite() {
        true => serializer.serialize_f64(*number),
        false => serializer.collect_str(number),
    }
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(f64),
        Text(String),
        /// What serde_json makes of all three by itself, and older versions of this crate did.
        Null(()),
    }
    match Written::deserialize(deserializer)? {
        Written::Number(number) => Ok(number),
        Written::Null(()) => Ok(f64::NAN),
        Written::Text(text) => match &*text {
            "inf" => Ok(f64::INFINITY),
            "-inf" => Ok(f64::NEG_INFINITY),
            "NaN" => Ok(f64::NAN),
            text => Err(D::Error::custom(format_args!(
                "`{text}`, expected a number, inf, -inf or NaN"
            ))),
        },
    }
}

/// Lists of such numbers.
pub(super) mod list {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize, Serialize)]
    struct Number(#[serde(with = "super")] f64);

    pub fn serialize<S: Serializer>(numbers: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(numbers.iter().copied().map(Number))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let numbers = Vec::<Number>::deserialize(deserializer)?;
        Ok(numbers.into_iter().map(|Number(number)| number).collect())
    }
}

#[cfg(test)]
mod tests {
    use crate::train::GradientNorms;

    #[test]
    fn every_number_comes_back_as_it_was() {
        let numbers = [1.0, -0.0, 0.1 + 0.2, f64::MAX, f64::INFINITY];
        let numbers = [&numbers[..], &[f64::NEG_INFINITY, f64::NAN]].concat();
        for &all in &numbers {
            let layers = numbers.clone();
            let json = serde_json::to_string(&GradientNorms { all, layers }).unwrap();
            let read: GradientNorms = serde_json::from_str(&json).unwrap();
            let bits = |numbers: &[f64]| numbers.iter().map(|n| n.to_bits()).collect::<Vec<_>>();
            assert_eq!(read.all.to_bits(), all.to_bits());
            assert_eq!(bits(&read.layers), bits(&numbers));
        }
        let read: GradientNorms = serde_json::from_str(r#"{"all": null, "layers": [1]}"#).unwrap();
        assert!(read.all.is_nan());
        assert_eq!(read.layers, [1.0]);
        let other = r#"{"all": "1.5", "layers": []}"#;
        assert!(serde_json::from_str::<GradientNorms>(other).is_err());
    }
}
