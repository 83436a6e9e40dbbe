//! What drawing adds to a decoded token: `generate` against `forward_cached` alone, taking turns
//! token by token.

use std::error::Error;
use std::time::Instant;

use burn::tensor::backend::Backend;
use fusedkv::{CacheDtype, FusedKvDecoder, GenerationConfig, Logits, TokenBatch, generate};
use serde::Serialize;

use crate::figures::median;

/// Tokens before the first that is drawn.
pub const PROMPT: usize = 64;

pub const HEADING: &str = "\
    | vocabulary | tokens are drawn by | forward ms | generate ms | sampler |\n\
    |---|---|---|---|---|";

/// Medians of one way to draw at one vocabulary.
#[derive(Serialize)]
pub struct Draws {
    vocab: usize,
    by: &'static str,
    /// Of a token's forward pass.
    forward_s: f64,
    /// Of a token of `generate`.
    generate_s: f64,
    /// What of that is not the forward pass.
    sampler_share: f64,
}

/// Decodes `tokens` in every way, one row, after a short prompt.
pub fn measure<B: Backend>(
    model: &FusedKvDecoder<B>,
    cache: CacheDtype,
    tokens: usize,
    device: &B::Device,
) -> Result<Vec<Draws>, Box<dyn Error>> {
    let vocab = model.config().vocab_size;
    let prompt = [(0..PROMPT as u32).collect::<Vec<_>>()];
    let batch = |rows: &[Vec<u32>]| TokenBatch::<B>::from_rows(rows, vocab, device);
    let greedy = GenerationConfig::new()
        .with_max_new_tokens(tokens + 1)
        .with_cache_dtype(cache);
    let warm = greedy.clone().with_temperature(0.8);
    let few = warm.clone().with_top_k(Some(50)).with_top_p(Some(0.95));
    let mut ways = Vec::new();
    for (by, config) in [
        ("largest logit", greedy),
        ("top-k 50, top-p 0.95, temperature 0.8", few),
        ("temperature 0.8", warm),
    ] {
        let mut generation = generate(model, &prompt, &config)?;
        next(&mut generation)?;
        ways.push((by, generation, Vec::new()));
    }
    let mut cache = model.new_cache_of(cache, 1, PROMPT + tokens)?;
    model.forward_cached(batch(&prompt)?, &mut cache, Logits::Last)?;
    let mut forward = Vec::new();
    for token in 0..tokens {
        let token = batch(&[vec![(token % PROMPT) as u32]])?;
        let start = Instant::now();
        let logits = model.forward_cached(token, &mut cache, Logits::Last)?;
        B::sync(device)?;
        forward.push(start.elapsed().as_secs_f64());
        drop(logits);
        for (_, generation, times) in &mut ways {
            let start = Instant::now();
            next(generation)?;
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let forward_s = median(&mut forward);
    let draws = ways.into_iter().map(|(by, _, mut times)| {
        let generate_s = median(&mut times);
        Draws {
            vocab,
            by,
            forward_s,
            generate_s,
            sampler_share: (generate_s - forward_s) / generate_s,
        }
    });
    Ok(draws.collect())
}

fn next<T, E>(generation: &mut impl Iterator<Item = Result<T, E>>) -> Result<T, Box<dyn Error>>
where
    E: Error + 'static,
{
    Ok(generation.next().ok_or("no token was drawn")??)
}

impl Draws {
    pub fn row(&self) -> String {
        format!(
            "| {} | {} | {:.2} | {:.2} | {:.1} % |",
            self.vocab,
            self.by,
            self.forward_s * 1e3,
            self.generate_s * 1e3,
            self.sampler_share * 100.0,
        )
    }
}
