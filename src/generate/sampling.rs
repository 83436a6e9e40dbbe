//! From logits to a token.
//!
//! A vocabulary is long and most of it never drawn: candidates are selected, not sorted, and what
//! cannot be one is passed over in blocks, which compile to vector instructions.

use std::cmp::Ordering;

use rand::RngExt;
use rand::rngs::ChaCha8Rng;

use super::GenerationConfig;

/// Logits that are looked at together, and weights that are summed together.
const BLOCK: usize = 512;
/// Ranges of logits that the mass of a nucleus is counted by.
const BINS: usize = 1024;
/// Numbers that are compared at once.
const LANES: usize = 16;

/// Draws tokens; keeps its buffers from one draw to the next.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    /// What top-k and top-p leave, by id.
    candidates: Vec<Candidate>,
    /// Some of them in the order of a selection.
    ranked: Vec<Candidate>,
    /// The sum of each block's, or bin's, weights.
    sums: Vec<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
    weight: f64,
}

/// The likeliest first; of equals the smaller id.
fn rank(a: &Candidate, b: &Candidate) -> Ordering {
    let by_logit = b.logit.partial_cmp(&a.logit);
    by_logit
        .expect("a candidate's logit is a number")
        .then(a.id.cmp(&b.id))
}

/// e^((logit − largest) / temperature), 0 for what is not a number. In single precision, as logits
/// are, which takes two thirds of the time of double.
#[derive(Clone, Copy)]
struct Weight {
    largest: f32,
    temperature: f64,
    inverse_temperature: f32,
}

impl Weight {
    fn new(largest: f32, temperature: f64) -> Self {
        Self {
            largest,
            temperature,
            // Finite, so that the largest logit's weight is 1 at any temperature.
            inverse_temperature: (1.0 / temperature).min(f64::from(f32::MAX)) as f32,
        }
    }

    fn of(self, logit: f32) -> f64 {
        let weight = ((logit - self.largest) * self.inverse_temperature).exp();
        // `max` takes twice as long.
        if weight > 0.0 { f64::from(weight) } else { 0.0 }
    }
}

impl Sampler {
    /// Draws a token from one row's logits, given the tokens it has so far; none if the largest
    /// logit is not finite. What is not a number is never drawn.
    ///
    /// Repetition penalty first, then temperature, top-k, top-p; at temperature 0 the largest logit,
    /// of equals the smaller id. Leaves the penalty in `logits`.
    pub fn sample<'s>(
        &mut self,
        logits: &mut [f32],
        seen: impl IntoIterator<Item = &'s u32>,
        config: &GenerationConfig,
        rng: &mut ChaCha8Rng,
    ) -> Option<u32> {
        penalise(logits, seen, config.repetition_penalty);
        let (first, largest) = largest(logits)?;
        if config.temperature == 0.0 {
            return Some(first);
        }
        let weight = Weight::new(largest, config.temperature);
        let top_k = config.top_k.filter(|&k| k < logits.len());
        let top_p = config.top_p.filter(|&p| p < 1.0);
        match (top_k, top_p) {
            (None, None) => return Some(self.draw_from_all(logits, weight, rng)),
            (None, Some(p)) => self.take_top_p(logits, p, weight),
            (Some(k), p) => {
                self.take_above(f32::NEG_INFINITY, k, logits, weight);
                if let Some(p) = p {
                    let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
                    self.keep_nucleus(p * total);
                }
            }
        }
        let weights = || self.candidates.iter().map(|c| c.weight);
        let mut share = rng.random::<f64>() * weights().sum::<f64>();
        Some(self.candidates[find(weights(), &mut share)].id)
    }

    /// A token by the weights of the whole vocabulary.
    fn draw_from_all(&mut self, logits: &[f32], weight: Weight, rng: &mut ChaCha8Rng) -> u32 {
        let mut share = rng.random::<f64>() * self.sum(logits, weight);
        let start = find(self.sums.iter().copied(), &mut share) * BLOCK;
        let block = &logits[start..logits.len().min(start + BLOCK)];
        let weights = block.iter().map(|&logit| weight.of(logit));
        (start + find(weights, &mut share)) as u32
    }

    /// All weights together.
    fn sum(&mut self, logits: &[f32], weight: Weight) -> f64 {
        let sum = |block: &[f32]| block.iter().map(|&logit| weight.of(logit)).sum::<f64>();
        self.sums.clear();
        self.sums.extend(logits.chunks(BLOCK).map(sum));
        self.sums.iter().sum()
    }

    /// The fewest tokens, likeliest first, that have the share `p` of all weights.
    ///
    /// Those likelier than one of these have less than `p`, so that it and those after it, V at most
    /// and none likelier, have more than 1 − p: whatever has less than (1 − p) / V is none of these.
    fn take_top_p(&mut self, logits: &[f32], p: f64, weight: Weight) {
        let total = self.sum(logits, weight);
        let share = (1.0 - p) * total / logits.len() as f64;
        let least = f64::from(weight.largest) + weight.temperature * share.ln();
        self.take_above((least as f32).next_down(), usize::MAX, logits, weight);
        self.keep_nucleus(p * total);
    }

    /// The tokens with logits above `least`, of which the `k` likeliest.
    fn take_above(&mut self, mut least: f32, k: usize, logits: &[f32], weight: Weight) {
        self.candidates.clear();
        for (i, block) in logits.chunks(LANES).enumerate() {
            if !block.iter().fold(false, |any, &l| any | (l > least)) {
                continue;
            }
            for (id, &logit) in (i * LANES..).zip(block) {
                if logit > least {
                    self.candidates.push(Candidate {
                        id: id as u32,
                        logit,
                        weight: weight.of(logit),
                    });
                }
            }
            // Equals of the last that is kept come after it, and are not above it.
            if self.candidates.len() / 2 >= k {
                least = self.keep(k);
            }
        }
        if self.candidates.len() > k {
            self.keep(k);
        }
    }

    /// Keeps the `k` likeliest candidates, of more; the logit of the last.
    fn keep(&mut self, k: usize) -> f32 {
        self.ranked.clone_from(&self.candidates);
        let last = *self.ranked.select_nth_unstable_by(k - 1, rank).1;
        self.keep_to(&last);
        last.logit
    }

    /// Keeps the fewest candidates, likeliest first, that have `mass` together. Only those about as
    /// likely as the last of them are put in order.
    fn keep_nucleus(&mut self, mass: f64) {
        let logits = self.candidates.iter().map(|c| c.logit);
        let largest = logits.clone().fold(f32::NEG_INFINITY, f32::max);
        let smallest = logits.fold(f32::INFINITY, f32::min);
        let bins_per_logit = (BINS - 1) as f32 / (largest - smallest);
        // Not a number where all are equal, which is bin 0; infinite where they nearly are.
        let bin = |c: &Candidate| {
            let bin = ((largest - c.logit) * bins_per_logit) as usize;
            bin.min(BINS - 1)
        };
        self.sums.clear();
        self.sums.resize(BINS, 0.0);
        for candidate in &self.candidates {
            self.sums[bin(candidate)] += candidate.weight;
        }
        let mut sum = 0.0;
        let mut reaches = |weight: f64| {
            sum += weight;
            sum >= mass
        };
        let Some(last) = self.sums.iter().position(|&weight| reaches(weight)) else {
            return; // all of them are less by rounding
        };
        reaches(-self.sums[last]);
        self.ranked.clear();
        let close = self.candidates.iter().filter(|&c| bin(c) == last);
        self.ranked.extend(close);
        self.ranked.sort_unstable_by(rank);
        let last = self.ranked.iter().find(|c| reaches(c.weight));
        if let Some(&last) = last.or(self.ranked.last()) {
            self.keep_to(&last);
        }
    }

    fn keep_to(&mut self, last: &Candidate) {
        self.candidates
            .retain(|candidate| rank(candidate, last) != Ordering::Greater);
    }
}

/// Divides the positive and multiplies the negative logits of tokens already there
/// (arXiv 1909.05858), each named once.
fn penalise<'s>(logits: &mut [f32], seen: impl IntoIterator<Item = &'s u32>, penalty: f64) {
    if penalty == 1.0 {
        return;
    }
    let penalty = penalty as f32;
    for &token in seen {
        let logit = &mut logits[token as usize];
        *logit = if *logit > 0.0 {
            *logit / penalty
        } else {
            *logit * penalty
        };
    }
}

/// The first of the largest logits, if that is finite.
fn largest(logits: &[f32]) -> Option<(u32, f32)> {
    let (mut start, mut largest) = (0, f32::NEG_INFINITY);
    for (i, block) in logits.chunks(BLOCK).enumerate() {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in block.chunks(LANES) {
            for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                *lane = if logit > *lane { logit } else { *lane };
            }
        }
        let of_block = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        if of_block > largest {
            (start, largest) = (i * BLOCK, of_block);
        }
    }
    if !largest.is_finite() {
        return None;
    }
    let offset = logits[start..].iter().position(|&l| l == largest)?;
    Some(((start + offset) as u32, largest))
}

/// The first index up to which `weights` sum to more than `share`; leaves the share in it.
fn find(weights: impl Iterator<Item = f64>, share: &mut f64) -> usize {
    let mut last = 0;
    for (i, weight) in weights.enumerate() {
        if *share < weight {
            return i;
        }
        *share -= weight;
        if weight > 0.0 {
            last = i;
        }
    }
    // Rounding left a trace: it belongs to the last that has a weight.
    last
}

#[cfg(test)]
mod tests;
