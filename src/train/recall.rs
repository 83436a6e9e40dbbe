//! Generated tasks that a model can only solve by recalling what it read: what sharing a cache
//! might cost.

use burn::config::Config;
use burn_dataset::Dataset;
use rand::rngs::ChaCha8Rng;
use rand::seq::index::sample;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::data::{Answer, TokenWindow, Windows};
use super::error::TrainError;

/// Multi-query associative recall: key-value pairs, then some of the keys again among random
/// tokens, each to be answered by its value (Zoology, arXiv 2312.04927, §4 and appendix E).
///
/// A window is `k₁ v₁ … k_D v_D` and then random tokens, where every key returns once, at gaps that
/// are drawn with probability ∝ g^(α − 1): near ones are more likely. Keys are of the lower half
/// of the vocabulary and values of the upper. The loss counts the D answers alone; values are not
/// shown again. Window i of a seed is always the same.
///
/// ```
/// use burn_dataset::Dataset;
/// use fusedkv::train::AssociativeRecall;
///
/// let task = AssociativeRecall::new(128, 64, 8, 1000);
/// let window = task.get(3).unwrap();
/// let answers = window.answers.unwrap();
/// assert_eq!(answers.len(), 8);
/// let answer = answers[0];
/// let asked = window.inputs[answer.position];
/// assert_eq!(window.inputs[answer.position - answer.distance], asked);
/// assert_eq!(
///     window.inputs[answer.position - answer.distance + 1],
///     window.targets[answer.position],
/// );
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct AssociativeRecall {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Tokens per window.
    pub context: usize,
    /// Key-value pairs per window, D.
    pub pairs: usize,
    /// Windows in all.
    pub windows: usize,
    /// Exponent of the gaps, α; Zoology's default.
    #[config(default = 0.01)]
    pub alpha: f64,
    /// Seeds the windows; another seed for validation keeps it apart from training.
    #[config(default = 0)]
    pub seed: u64,
}

/// One key-value pair at a random depth of random tokens, asked for at the end (passkey retrieval;
/// the needle-in-a-haystack test as RULER has it, arXiv 2404.06654).
///
/// The first token of the vocabulary marks the needle and the question: `… 0 k v … 0 k`, to be
/// answered by v. Haystack, key and value are drawn from the rest.
#[derive(Config, Debug, PartialEq)]
pub struct Needle {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Tokens per window.
    pub context: usize,
    /// Windows in all.
    pub windows: usize,
    /// Seeds the windows.
    #[config(default = 0)]
    pub seed: u64,
}

fn setting(field: &'static str, value: usize, expected: &'static str) -> TrainError {
    TrainError::Setting {
        field,
        value: value as f64,
        expected,
    }
}

impl AssociativeRecall {
    /// Checks that windows can be made.
    ///
    /// # Errors
    /// [`TrainError::Setting`] for the first setting that does not fit.
    pub fn validate(&self) -> Result<(), TrainError> {
        if self.pairs == 0 || 2 * self.pairs + 2 > self.vocab_size {
            let expected = "1 or more, and below half the vocabulary";
            return Err(setting("pairs", self.pairs, expected));
        }
        if self.context < 4 * self.pairs {
            let expected = "at least four times the pairs";
            return Err(setting("context", self.context, expected));
        }
        Ok(())
    }

    /// Where the keys return, in pairs of tokens after the last value: distinct, power-law.
    fn gaps(&self, rng: &mut ChaCha8Rng) -> Vec<usize> {
        let slots = (self.context - 2 * self.pairs) / 2;
        // Weighted sampling without replacement: the largest of u^(1/w) (Efraimidis and Spirakis), by
        // their logarithms, as small powers are 0. The first drawn is the first key's: rand's
        // `sample_weighted` returns them in no order, and promises no values for a seed.
        let mut keyed: Vec<(f64, usize)> = (0..slots)
            .map(|gap| {
                let weight = ((gap + 1) as f64).powf(self.alpha - 1.0);
                (rng.random::<f64>().ln() / weight, gap)
            })
            .collect();
        keyed.sort_by(|a, b| b.0.total_cmp(&a.0));
        keyed
            .into_iter()
            .map(|(_, gap)| gap)
            .take(self.pairs)
            .collect()
    }
}

impl Needle {
    /// Checks that windows can be made.
    ///
    /// # Errors
    /// [`TrainError::Setting`] for the first setting that does not fit.
    pub fn validate(&self) -> Result<(), TrainError> {
        if self.vocab_size < 4 {
            return Err(setting("vocab_size", self.vocab_size, "4 or more"));
        }
        if self.context < 5 {
            return Err(setting("context", self.context, "5 or more"));
        }
        Ok(())
    }
}

/// Window `index` of a seed has random numbers of its own.
fn window_rng(seed: u64, index: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index as u64);
    rng
}

/// A window whose targets are the next tokens but for the answers.
fn window(inputs: Vec<u32>, answers: Vec<(Answer, u32)>) -> TokenWindow {
    let mut targets = inputs[1..].to_vec();
    targets.push(0);
    for (answer, value) in &answers {
        targets[answer.position] = *value;
    }
    TokenWindow {
        inputs,
        targets,
        answers: Some(answers.into_iter().map(|(answer, _)| answer).collect()),
    }
}

impl Dataset<TokenWindow> for AssociativeRecall {
    fn get(&self, index: usize) -> Option<TokenWindow> {
        if index >= self.windows || self.validate().is_err() {
            return None;
        }
        let mut rng = window_rng(self.seed, index);
        let half = self.vocab_size / 2;
        let keys = sample(&mut rng, half, self.pairs).into_vec();
        let values = sample(&mut rng, self.vocab_size - half, self.pairs).into_vec();
        let mut inputs: Vec<u32> = (0..self.context)
            .map(|_| rng.random_range(0..self.vocab_size as u32))
            .collect();
        for (pair, (&key, &value)) in keys.iter().zip(&values).enumerate() {
            inputs[2 * pair] = key as u32;
            inputs[2 * pair + 1] = (half + value) as u32;
        }
        let gaps = self.gaps(&mut rng);
        let answers = gaps.iter().enumerate().map(|(pair, gap)| {
            let position = 2 * self.pairs + 2 * gap;
            inputs[position] = keys[pair] as u32;
            let distance = position - 2 * pair;
            (Answer { position, distance }, (half + values[pair]) as u32)
        });
        let answers = answers.collect();
        Some(window(inputs, answers))
    }

    fn len(&self) -> usize {
        self.windows
    }
}

impl Dataset<TokenWindow> for Needle {
    fn get(&self, index: usize) -> Option<TokenWindow> {
        if index >= self.windows || self.validate().is_err() {
            return None;
        }
        let mut rng = window_rng(self.seed, index);
        let mut inputs: Vec<u32> = (0..self.context)
            .map(|_| rng.random_range(1..self.vocab_size as u32))
            .collect();
        let position = self.context - 1;
        let depth = rng.random_range(0..=self.context - 5);
        let (key, value) = (inputs[depth + 1], inputs[depth + 2]);
        inputs[depth] = 0;
        inputs[position - 1] = 0;
        inputs[position] = key;
        let distance = position - (depth + 1);
        Some(window(inputs, vec![(Answer { position, distance }, value)]))
    }

    fn len(&self) -> usize {
        self.windows
    }
}

macro_rules! generated {
    ($task:ty) => {
        impl Windows for $task {
            fn context(&self) -> usize {
                self.context
            }

            fn check_vocabulary(&self, vocab_size: usize) -> Result<(), TrainError> {
                self.validate()?;
                if self.vocab_size > vocab_size {
                    let expected = "at most the decoder's";
                    return Err(setting("vocab_size", self.vocab_size, expected));
                }
                Ok(())
            }

            fn fingerprint(&self) -> u64 {
                xxh3_64(self.to_string().as_bytes())
            }
        }
    };
}

generated!(AssociativeRecall);
generated!(Needle);

/// How many answers at some distances were right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DistanceAccuracy {
    /// The longest distance counted here, a power of two; the shortest is more than half of it.
    pub up_to: usize,
    /// Answers that were the most likely token.
    pub correct: usize,
    /// All answers.
    pub total: usize,
}

impl DistanceAccuracy {
    /// Counts an answer among others, which are kept nearest first.
    pub(super) fn count(all: &mut Vec<Self>, distance: usize, right: bool) {
        let up_to = distance.next_power_of_two();
        let place = all
            .binary_search_by_key(&up_to, |bucket| bucket.up_to)
            .unwrap_or_else(|place| {
                let (correct, total) = (0, 0);
                all.insert(
                    place,
                    Self {
                        up_to,
                        correct,
                        total,
                    },
                );
                place
            });
        all[place].total += 1;
        all[place].correct += usize::from(right);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_gaps_of_a_long_window_are_drawn_as_well() {
        let task = AssociativeRecall::new(20_000, 20_000, 4_900, 1);
        let gaps = task.gaps(&mut window_rng(0, 0));
        let slots = 20_000 / 2 - 4_900;
        let mut drawn = vec![false; slots];
        for gap in gaps {
            drawn[gap] = true;
        }
        // Of the 200 that are not drawn, most are somewhere before the last 500.
        let left_out = drawn[..slots - 500].iter().filter(|&&drawn| !drawn);
        assert!(left_out.count() > 50);
    }
}
