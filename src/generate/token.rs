//! What generation gives: a token, why it was the last, how likely it was.

use std::cmp::Ordering;

/// One token of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct GeneratedToken {
    /// The row it continues: its prompt's, or of several samples of each prompt `prompt * samples +
    /// sample`.
    pub row: usize,
    /// The token.
    pub id: u32,
    /// How likely it was, where [`log_probabilities`](super::GenerationConfig::log_probabilities)
    /// were asked for.
    pub likelihood: Option<Likelihood>,
    /// Set on the last token of a row.
    pub finish: Option<FinishReason>,
}

/// Why a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// A stop token was drawn.
    Stop,
    /// `max_new_tokens` were drawn.
    Length,
}

/// How likely a token was, by the decoder alone: before penalty, temperature, top-k and top-p.
#[derive(Clone, Debug, PartialEq)]
pub struct Likelihood {
    /// Its log-probability, in nats.
    pub log_probability: f64,
    /// The likeliest tokens with their log-probabilities, likeliest first, of equals the smaller id.
    pub top: Vec<(u32, f64)>,
}

impl Likelihood {
    /// log softmax(logits) of `id` and of the `top` largest; what is not a number has none.
    pub(super) fn of(logits: &[f32], id: u32, top: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let shifted = |logit: f32| f64::from(logit) - f64::from(largest);
        let weights = logits.iter().map(|&logit| shifted(logit).exp());
        let sum: f64 = weights.filter(|weight| !weight.is_nan()).sum();
        let log_probability = |id: u32| shifted(logits[id as usize]) - sum.ln();
        let rank = |a: &u32, b: &u32| -> Ordering {
            let [a_logit, b_logit] = [a, b].map(|&id| logits[id as usize]);
            b_logit.total_cmp(&a_logit).then(a.cmp(b))
        };
        let mut ids: Vec<u32> = (0..)
            .zip(logits)
            .filter(|(_, logit)| top > 0 && !logit.is_nan())
            .map(|(id, _)| id)
            .collect();
        if top < ids.len() {
            ids.select_nth_unstable_by(top, rank);
            ids.truncate(top);
        }
        ids.sort_unstable_by(rank);
        Self {
            log_probability: log_probability(id),
            top: ids
                .into_iter()
                .map(|id| (id, log_probability(id)))
                .collect(),
        }
    }
}
