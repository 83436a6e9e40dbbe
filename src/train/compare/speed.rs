//! How fast a decoder reads a prompt and writes.

use std::time::Instant;

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::method::Method;
use crate::config::ConfigError;
use crate::decoder::{ForwardError, FusedKvDecoder, Logits};
use crate::tokens::TokenBatch;

/// Medians of timed generations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// The method's name.
    pub method: String,
    /// Time to the first token: prefill of the prompt, in seconds.
    pub ttft: f64,
    /// Time per output token after it, in seconds.
    pub tpot: f64,
}

/// Times prefill of `prompt` tokens and decoding of `decode` more, one row, `repeats` times each.
///
/// The methods take turns, so that what else the machine does falls on all alike. Weights are
/// random: they do not matter to the time. `prompt + decode` may exceed the `max_positions`
/// that were trained.
///
/// # Errors
/// [`ForwardError`] if there is no prompt; [`ConfigError`], wrapped, for a method without decoder.
pub fn measure_speed<B: Backend>(
    methods: &[Method],
    prompt: usize,
    decode: usize,
    repeats: usize,
    device: &B::Device,
) -> Result<Vec<Speed>, SpeedError> {
    let models = methods
        .iter()
        .map(|method| {
            let config = method.model.clone().with_max_positions(prompt + decode);
            config.init::<B>(device)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut times = vec![(Vec::new(), Vec::new()); methods.len()];
    // One turn more than is counted, to warm up.
    for turn in 0..=repeats {
        for (model, (first, next)) in models.iter().zip(&mut times) {
            let (ttft, tpot) = time_one(model, prompt, decode, device)?;
            if turn > 0 {
                first.push(ttft);
                next.extend(tpot);
            }
        }
    }
    Ok(methods
        .iter()
        .zip(times)
        .map(|(method, (mut first, mut next))| Speed {
            method: method.name.clone(),
            ttft: median(&mut first),
            tpot: median(&mut next),
        })
        .collect())
}

/// A speed that cannot be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpeedError {
    /// No decoder can be built.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The decoder cannot read the prompt.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

fn time_one<B: Backend>(
    model: &FusedKvDecoder<B>,
    prompt: usize,
    decode: usize,
    device: &B::Device,
) -> Result<(f64, Vec<f64>), SpeedError> {
    let vocab_size = model.config().vocab_size;
    let tokens = |len: usize, seed: usize| {
        let row: Vec<u32> = (0..len)
            .map(|i| ((i * 7919 + seed) % vocab_size) as u32)
            .collect();
        TokenBatch::<B>::from_rows(&[row], vocab_size, device).map_err(ForwardError::from)
    };
    let mut cache = model
        .new_cache(1, prompt + decode)
        .map_err(ForwardError::from)?;
    let mut time = |tokens| -> Result<f64, SpeedError> {
        let start = Instant::now();
        let logits = model.forward_cached(tokens, &mut cache, Logits::Last)?;
        // Reading a number waits for all of them.
        logits.max().into_scalar();
        Ok(start.elapsed().as_secs_f64())
    };
    let ttft = time(tokens(prompt, 0)?)?;
    let tpot = (0..decode)
        .map(|step| time(tokens(1, step + 1)?))
        .collect::<Result<_, _>>()?;
    Ok((ttft, tpot))
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
