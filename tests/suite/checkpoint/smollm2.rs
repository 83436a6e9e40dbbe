//! SmolLM2-135M-Instruct against transformers, where somebody has both:
//!
//! ```sh
//! python tests/reference/smollm2.py MODEL --out REFERENCE --text TEXT --tokens 8192
//! SMOLLM2=MODEL SMOLLM2_REFERENCE=REFERENCE \
//!     cargo test --release --test suite smollm2 -- --ignored --nocapture
//! ```

use std::path::PathBuf;
use std::{env, fs};

use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{WeightDtype, load_checkpoint};
use fusedkv::{CacheDtype, FusedKvDecoder, GenerationConfig, ScoreConfig, generate, score};
use serde_json::Value;

const CONTEXT: usize = 512;

fn directory(variable: &str) -> PathBuf {
    let path = env::var_os(variable).unwrap_or_else(|| panic!("{variable} names a directory"));
    path.into()
}

fn model() -> FusedKvDecoder<Flex> {
    let loaded = load_checkpoint(directory("SMOLLM2"), WeightDtype::F32, &FlexDevice);
    loaded.unwrap_or_else(|error| panic!("{error}")).model
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Token for token, up to where two logits of transformers' tie within 1e-4 of their scale.
#[test]
#[ignore = "needs a model that is not ours to ship"]
fn greedy_continuations_are_those_of_transformers() {
    let model = model();
    let text = fs::read_to_string(directory("SMOLLM2_REFERENCE").join("greedy.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    for case in &cases {
        let (prompt, expected) = (ids(&case["prompt"]), ids(&case["continuation"]));
        let settings = GenerationConfig::new().with_max_new_tokens(expected.len());
        let tokens = generate(&model, &[prompt], &settings).unwrap();
        let found: Vec<u32> = tokens.map(|token| token.unwrap().id).collect();
        let same = found
            .iter()
            .zip(&expected)
            .take_while(|(a, b)| a == b)
            .count();
        println!("{same} of {} tokens: {}", expected.len(), case["text"]);
        if same < expected.len() {
            let gap = case["gaps"][same].as_f64().unwrap();
            let scale = case["scale"].as_f64().unwrap();
            assert!(
                gap <= 1e-4 * scale,
                "token {same}, a gap of {gap} at a scale of {scale}"
            );
        }
    }
}

/// Mean negative log-likelihood of windows that do not overlap, each but its first token.
fn nll(model: &FusedKvDecoder<Flex>, tokens: &[u32], config: &ScoreConfig) -> f64 {
    let scores = tokens
        .chunks(CONTEXT)
        .map(|window| score(model, window, config).unwrap());
    let (nll, n) = scores.fold((0.0, 0), |(nll, n), score| {
        (nll + score.nll, n + score.tokens)
    });
    nll / n as f64
}

#[test]
#[ignore = "needs a model that is not ours to ship"]
fn perplexity_is_that_of_transformers() {
    let model = model();
    let bytes = fs::read(directory("SMOLLM2_REFERENCE").join("perplexity.safetensors")).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |name: &str| -> Vec<[u8; 8]> {
        let tensor = reference.tensor(name).unwrap();
        tensor
            .data()
            .chunks_exact(8)
            .map(|bytes| bytes.try_into().unwrap())
            .collect()
    };
    let most: usize = env::var("SMOLLM2_TOKENS").map_or(8192, |n| n.parse().unwrap());
    let tokens = numbers("tokens")
        .into_iter()
        .map(i64::from_le_bytes)
        .take(most);
    let tokens: Vec<u32> = tokens.map(|token| token as u32).collect();
    let sum: f64 = numbers("nll")
        .into_iter()
        .map(f64::from_le_bytes)
        .take(most)
        .sum();
    let scored = tokens.len() - tokens.len().div_ceil(CONTEXT);
    let expected = sum / scored as f64;
    let whole = ScoreConfig::new(CONTEXT);
    let found = nll(&model, &tokens, &whole);
    let apart = (found - expected).exp() - 1.0;
    println!(
        "perplexity {} of {scored} tokens, transformers' {}: {apart:.1e} apart",
        found.exp(),
        expected.exp()
    );
    assert!(apart.abs() < 1e-4);
    for (dtype, within) in [(CacheDtype::F16, 1e-3), (CacheDtype::Int8, 1e-3)] {
        let cached = whole.with_chunk(Some(128)).with_cache_dtype(dtype);
        let apart = (nll(&model, &tokens, &cached) - expected).exp() - 1.0;
        println!("through a cache of {dtype}: {apart:.1e} apart");
        assert!(apart.abs() < within);
    }
}
