//! How good a model is on held-out windows: loss and recall, with a cache or without.

use burn::tensor::{ElementConversion, Int, Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use super::batch::LanguageBatch;
use super::data::{TokenWindow, Windows, read_window};
use super::error::TrainError;
use super::number;
use super::precision::at_least_f32;
use super::recall::DistanceAccuracy;
use super::repeats::{RepeatLoss, RepeatSums};
use crate::cache::CacheDtype;
use crate::decoder::{FusedKvDecoder, Logits};
use crate::kernels::cross_entropy;

/// What a model made of some windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean negative log-likelihood of the targets that count, in nats.
    #[serde(with = "number")]
    pub loss: f64,
    /// Answers that were the most likely token, by the distance they recall over, nearest first;
    /// empty if the windows have no answers.
    pub accuracy: Vec<DistanceAccuracy>,
    /// Loss by what the window held of a target before; empty if the windows have answers, whose
    /// tokens are random.
    #[serde(default)]
    pub repeats: Vec<RepeatLoss>,
}

/// Loss and recall of a model on windows, `batch_size` at a time.
///
/// With a `cache`, every position attends to keys and values as a cache of such numbers keeps them,
/// its own included, which is what decoding one token after the other gives.
///
/// # Errors
/// [`TrainError::Setting`] if `batch_size` is 0 or there are no windows,
/// [`TrainError::ContextTooLong`] or another of [`Windows::check_vocabulary`] if the model cannot
/// read them, [`TrainError::Cache`] if the backend has no such numbers,
/// [`TrainError::MissingWindow`] or [`TrainError::Window`] for windows that are not what they say,
/// [`TrainError::NoTargets`] if none of their targets counts.
pub fn evaluate<B: Backend>(
    model: &FusedKvDecoder<B>,
    windows: &impl Windows,
    batch_size: usize,
    cache: Option<CacheDtype>,
) -> Result<Evaluation, TrainError> {
    let config = model.config();
    for (field, value) in [("batch_size", batch_size), ("windows", windows.len())] {
        if value == 0 {
            let (value, expected) = (0.0, "1 or more");
            return Err(TrainError::Setting {
                field,
                value,
                expected,
            });
        }
    }
    if windows.context() > config.max_positions {
        return Err(TrainError::ContextTooLong {
            context: windows.context(),
            max_positions: config.max_positions,
        });
    }
    windows.check_vocabulary(config.vocab_size)?;
    let device = model.device();
    let has_answers = windows.has_answers();
    let (mut sum, mut targets) = (0.0, 0);
    let mut accuracy = Vec::new();
    let mut repeats = RepeatSums::default();
    for start in (0..windows.len()).step_by(batch_size) {
        let end = windows.len().min(start + batch_size);
        let items: Vec<_> = (start..end)
            .map(|index| read_window(windows, index, has_answers))
            .collect::<Result<_, _>>()?;
        let batch = LanguageBatch::stack(&items, false, &device);
        let logits = logits(model, batch.tokens, cache)?;
        if has_answers {
            let likeliest = likeliest(logits.clone());
            count_answers(&mut accuracy, &items, &likeliest);
        }
        // A sum over a vocabulary has no precision in half the bits.
        let precise = at_least_f32(logits.dtype());
        let [rows, context, vocab_size] = logits.dims();
        let logits = logits.reshape([rows * context, vocab_size]).cast(precise);
        let losses = cross_entropy(logits, batch.targets.reshape([rows * context, 1]));
        let losses: Vec<f64> = losses.into_data().iter::<f64>().collect();
        for (window, losses) in items.iter().zip(losses.chunks(windows.context())) {
            let counts = window.counts();
            let counted = losses.iter().zip(&counts).filter(|(_, counts)| **counts);
            sum += counted.map(|(loss, _)| loss).sum::<f64>();
            targets += window.counted();
            repeats.add(window, losses);
        }
    }
    if targets == 0 {
        return Err(TrainError::NoTargets { step: None });
    }
    Ok(Evaluation {
        loss: sum / targets as f64,
        accuracy,
        repeats: match has_answers {
            true => Vec::new(),
            false => repeats.means(),
        },
    })
}

/// Logits of all positions.
fn logits<B: Backend>(
    model: &FusedKvDecoder<B>,
    tokens: Tensor<B, 2, Int>,
    cache: Option<CacheDtype>,
) -> Result<Tensor<B, 3>, TrainError> {
    let logits = match cache {
        None => model.forward(tokens),
        Some(dtype) => {
            let [rows, context] = tokens.dims();
            let mut cache = model.new_cache_of(dtype, rows, context)?;
            model.forward_cached(tokens, &mut cache, Logits::All)
        }
    };
    Ok(logits?)
}

/// The most likely token at every position, row after row.
fn likeliest<B: Backend>(logits: Tensor<B, 3>) -> Vec<u32> {
    let ids = logits.argmax(2).into_data();
    ids.iter::<i64>().map(|id| id.elem()).collect()
}

fn count_answers(all: &mut Vec<DistanceAccuracy>, windows: &[TokenWindow], likeliest: &[u32]) {
    for (window, likeliest) in windows
        .iter()
        .zip(likeliest.chunks(windows[0].inputs.len()))
    {
        for answer in window.answers.iter().flatten() {
            let right = likeliest[answer.position] == window.targets[answer.position];
            DistanceAccuracy::count(all, answer.distance, right);
        }
    }
}
