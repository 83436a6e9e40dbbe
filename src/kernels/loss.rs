//! Losses at a decoder's head, and the gradients by which they go down.

use burn::tensor::activation::log_softmax;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, backend::Backend};

use super::flex;

/// `logsumexp(logits) − logits[target]` row by row: `[n, vocab_size]` and `[n, 1]` to `[n, 1]`.
///
/// Unlike log-softmax and gather it needs no normalised copy of the logits.
pub(crate) fn cross_entropy<B: Backend>(
    logits: Tensor<B, 2>,
    targets: Tensor<B, 2, Int>,
) -> Tensor<B, 2> {
    if let Some(output) = flex::cross_entropy(&logits, &targets) {
        return output;
    }
    // The shift cancels, so that no gradient flows through the maximum.
    let largest = logits.clone().detach().max_dim(1);
    let shifted = logits - largest;
    let target = shifted.clone().gather(1, targets);
    shifted.exp().sum_dim(1).log() - target
}

/// Logits of some tokens, and what they are to become.
pub(crate) struct Taught<B: Backend> {
    /// `[n, vocab_size]`.
    pub logits: Tensor<B, 2>,
    /// `[n, 1]`.
    pub targets: Tensor<B, 2, Int>,
    /// What each token's loss is multiplied with, `[n, 1]`.
    pub weights: Tensor<B, 2>,
    pub teacher: Option<Soft<B>>,
}

/// A teacher's logits of the same tokens.
pub(crate) struct Soft<B: Backend> {
    /// `[n, vocab_size]`.
    pub logits: Tensor<B, 2>,
    /// What both sides' logits are divided by.
    pub temperature: f32,
    /// Share of the cross-entropy in the loss, the divergence having the rest.
    pub target_share: f32,
}

/// What was lost token by token, and how to lose less.
pub(crate) struct Lost<B: Backend> {
    /// Cross-entropy, `[n, 1]`.
    pub nll: Tensor<B, 2>,
    /// KL(teacher ‖ student) at the temperature, `[n, 1]`.
    pub divergence: Option<Tensor<B, 2>>,
    /// Of the weighted sum of all losses by the logits, `[n, vocab_size]`.
    pub gradient: Tensor<B, 2>,
}

/// The losses `c · nll + (1 − c) · T² · KL` and the gradient of their weighted sum (arXiv 1503.02531),
/// c being the share of the cross-entropy: 1 without a teacher. T² makes up for the gradients'
/// shrinking by it.
pub(crate) fn lost<B: Backend>(taught: Taught<B>) -> Lost<B> {
    match flex::lost(taught) {
        Ok(lost) => lost,
        Err(taught) => generic(taught),
    }
}

fn generic<B: Backend>(taught: Taught<B>) -> Lost<B> {
    let Taught {
        logits,
        targets,
        weights,
        teacher,
    } = taught;
    let own = log_softmax(logits.clone(), 1);
    let nll = own.clone().gather(1, targets.clone()).neg();
    let share = teacher.as_ref().map_or(1.0, |teacher| teacher.target_share);
    let certain = Tensor::ones_like(&nll);
    let own = own.exp();
    let mut gradient = own.scatter(1, targets, -certain, IndexingUpdateOp::Add) * share;
    let divergence = teacher.map(|teacher| {
        let Soft {
            logits: soft,
            temperature,
            ..
        } = teacher;
        let [from, to] = [soft, logits].map(|logits| log_softmax(logits / temperature, 1));
        let (p, q) = (from.clone().exp(), to.clone().exp());
        let divergence = (p.clone() * (from - to)).sum_dim(1);
        gradient = gradient.clone() + (q - p) * ((1.0 - share) * temperature);
        divergence
    });
    Lost {
        nll,
        divergence,
        gradient: gradient * weights,
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, TensorData};
    use burn_flex::{Flex, FlexDevice};
    use proptest::prelude::*;

    use super::*;

    /// ln softmax(logits / temperature).
    fn log_softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| ((x - max) / temperature).exp()).sum();
        logits
            .iter()
            .map(|x| (x - max) / temperature - sum.ln())
            .collect()
    }

    fn values<const D: usize>(tensor: Tensor<Flex, D>) -> Vec<f64> {
        tensor.into_data().iter().collect()
    }

    fn near(found: &[f64], expected: &[f64], scale: f64) -> Result<(), TestCaseError> {
        prop_assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            let most = 1e-5 * (scale + expected.abs());
            prop_assert!((found - expected).abs() <= most, "{found} {expected}");
        }
        Ok(())
    }

    proptest! {
        /// Against loops in f64, by our kernel and by Burn's operations.
        #[test]
        fn losses_and_gradients_are_those_of_their_definition(
            targets in prop::collection::vec(0usize..1000, 1..8),
            vocab_size in 1usize..400,
            spread in 0.1f64..20.0,
            temperature in 0.3f32..5.0,
            target_share in prop_oneof![Just(0.0f32), Just(1.0), 0.0f32..1.0],
            taught in any::<bool>(),
            masked in any::<bool>(),
        ) {
            let rows = targets.len();
            let random = |shape: [usize; 2]| {
                Tensor::<Flex, 2>::random(shape, Distribution::Normal(0.0, spread), &FlexDevice)
            };
            let [own, soft] = [(); 2].map(|()| random([rows, vocab_size]));
            let targets: Vec<usize> = targets.iter().map(|target| target % vocab_size).collect();
            let weights: Vec<f32> = (0..rows)
                .map(|row| if masked && row % 2 == 0 { 0.0 } else { 0.1 + row as f32 })
                .collect();
            let operands = || Taught {
                logits: own.clone(),
                targets: Tensor::from_data(
                    TensorData::new(targets.iter().map(|&t| t as i64).collect(), [rows, 1]),
                    &FlexDevice,
                ),
                weights: Tensor::from_data(TensorData::new(weights.clone(), [rows, 1]), &FlexDevice),
                teacher: taught.then(|| Soft {
                    logits: soft.clone(),
                    temperature,
                    target_share,
                }),
            };

            let (mut nll, mut divergence, mut gradient) = (Vec::new(), Vec::new(), Vec::new());
            let (t, c) = (f64::from(temperature), f64::from(target_share));
            let c = if taught { c } else { 1.0 };
            let (numbers, soft_numbers) = (values(own.clone()), values(soft.clone()));
            for (row, &target) in targets.iter().enumerate() {
                let row_of = |numbers: &[f64]| numbers[row * vocab_size..][..vocab_size].to_vec();
                let (s, f) = (row_of(&numbers), row_of(&soft_numbers));
                let own = log_softmax(&s, 1.0);
                let (to, from) = (log_softmax(&s, t), log_softmax(&f, t));
                nll.push(-own[target]);
                divergence.push((0..vocab_size).map(|i| from[i].exp() * (from[i] - to[i])).sum());
                for i in 0..vocab_size {
                    let certain = f64::from(u8::from(i == target));
                    let of_target = c * (own[i].exp() - certain);
                    let of_teacher = (1.0 - c) * t * (to[i].exp() - from[i].exp());
                    gradient.push(f64::from(weights[row]) * (of_target + of_teacher));
                }
            }

            let Taught { logits, targets: ids, .. } = operands();
            near(&values(cross_entropy(logits, ids)), &nll, 1.0 + spread)?;
            let by_kernel = flex::lost(operands());
            prop_assert!(by_kernel.is_ok());
            for lost in [by_kernel.ok().unwrap(), generic(operands())] {
                near(&values(lost.nll), &nll, 1.0 + spread)?;
                near(&values(lost.gradient), &gradient, 10.0)?;
                prop_assert_eq!(lost.divergence.is_some(), taught);
                if let Some(found) = lost.divergence {
                    near(&values(found), &divergence, 1.0 + spread / t)?;
                }
            }
        }
    }

    #[test]
    fn logits_that_others_hold_stay_as_they_are() {
        let logits = Tensor::<Flex, 2>::random([3, 50], Distribution::Default, &FlexDevice);
        let before = values(logits.clone());
        let targets = Tensor::from_data([[1], [2], [3]], &FlexDevice);
        let weights = Tensor::ones([3, 1], &FlexDevice);
        lost(Taught {
            logits: logits.clone(),
            targets,
            weights,
            teacher: None,
        });
        assert_eq!(values(logits), before);
    }
}
