//! What a window held before of each target: who gains where says more of a model than one mean.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::data::TokenWindow;
use super::number;

/// What the window held of a target before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Repeat {
    /// The same token after the same token: what an induction head would copy.
    Pair,
    /// The same token, after others only.
    Token,
    /// Nothing.
    None,
}

impl Repeat {
    /// All of them, those that say most first.
    pub const ALL: [Self; 3] = [Self::Pair, Self::Token, Self::None];

    /// Of every target of a window, in order.
    ///
    /// ```
    /// use fusedkv::train::{Repeat, TokenWindow};
    ///
    /// let tokens = [7, 8, 9, 7, 8, 7];
    /// let window = TokenWindow {
    ///     inputs: tokens[..5].to_vec(),
    ///     targets: tokens[1..].to_vec(),
    ///     answers: None,
    /// };
    /// let repeats = [Repeat::None, Repeat::None, Repeat::Token, Repeat::Pair, Repeat::Token];
    /// assert_eq!(Repeat::of(&window), repeats);
    /// ```
    pub fn of(window: &TokenWindow) -> Vec<Self> {
        let mut tokens = HashSet::new();
        let mut pairs = HashSet::new();
        let read = window.inputs.iter().zip(&window.targets);
        read.map(|(&input, &target)| {
            tokens.insert(input);
            match (!pairs.insert((input, target)), tokens.contains(&target)) {
                (true, _) => Self::Pair,
                (false, true) => Self::Token,
                (false, false) => Self::None,
            }
        })
        .collect()
    }
}

/// The loss of the targets of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RepeatLoss {
    /// Which targets.
    pub repeat: Repeat,
    /// How many there are.
    pub targets: usize,
    /// Their mean negative log-likelihood, in nats.
    #[serde(with = "number")]
    pub loss: f64,
}

/// Sums of losses by what came before.
#[derive(Default)]
pub(super) struct RepeatSums([(usize, f64); Repeat::ALL.len()]);

impl RepeatSums {
    /// Adds the losses of a window's targets, one for each.
    pub(super) fn add(&mut self, window: &TokenWindow, losses: &[f64]) {
        for (repeat, loss) in Repeat::of(window).into_iter().zip(losses) {
            let (targets, sum) = &mut self.0[repeat as usize];
            *targets += 1;
            *sum += loss;
        }
    }

    /// Of every kind that there was.
    pub(super) fn means(&self) -> Vec<RepeatLoss> {
        let sums = Repeat::ALL.into_iter().zip(self.0);
        sums.filter(|&(_, (targets, _))| targets > 0)
            .map(|(repeat, (targets, sum))| RepeatLoss {
                repeat,
                targets,
                loss: sum / targets as f64,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a search through all that was read, for every target.
        #[test]
        fn a_repeat_is_what_a_search_finds(tokens in prop::collection::vec(0u32..6, 2..40)) {
            let last = tokens.len() - 1;
            let window = TokenWindow {
                inputs: tokens[..last].to_vec(),
                targets: tokens[1..].to_vec(),
                answers: None,
            };
            let expected: Vec<_> = (0..last)
                .map(|at| {
                    let (pair, target) = (&tokens[at..at + 2], tokens[at + 1]);
                    if tokens[..=at].windows(2).any(|before| before == pair) {
                        Repeat::Pair
                    } else if tokens[..=at].contains(&target) {
                        Repeat::Token
                    } else {
                        Repeat::None
                    }
                })
                .collect();
            prop_assert_eq!(Repeat::of(&window), expected);
        }
    }

    #[test]
    fn sums_are_kept_apart() {
        let window = |tokens: &[u32]| TokenWindow {
            inputs: tokens[..tokens.len() - 1].to_vec(),
            targets: tokens[1..].to_vec(),
            answers: None,
        };
        let mut sums = RepeatSums::default();
        sums.add(&window(&[1, 1, 1]), &[2.0, 4.0]);
        sums.add(&window(&[1, 1, 2]), &[3.0, 1.0]);
        let means = sums.means();
        let found: Vec<_> = means
            .iter()
            .map(|m| (m.repeat, m.targets, m.loss))
            .collect();
        let expected = [
            (Repeat::Pair, 1, 4.0),
            (Repeat::Token, 2, 2.5),
            (Repeat::None, 1, 1.0),
        ];
        assert_eq!(found, expected);
        assert_eq!(RepeatSums::default().means(), []);
    }
}
