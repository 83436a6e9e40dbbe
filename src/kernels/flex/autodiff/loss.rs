//! Cross-entropy.

use std::f32::consts::{LN_2, LOG2_E};

use burn::tensor::{Int, Tensor, backend::Backend};
use burn_flex::FlexTensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::{ARCH, downcast, simd};
use super::{Operation, flex, record, shaped_as, tracked, untyped};

pub(crate) fn cross_entropy<B: Backend>(
    logits: &Tensor<B, 2>,
    targets: &Tensor<B, 2, Int>,
) -> Option<Tensor<B, 2>> {
    let logits = tracked(logits)?;
    let targets: FlexTensor = downcast(targets.clone().into_primitive()).ok()?;
    let targets = targets.into_data();
    let operation = CrossEntropy {
        targets: targets.iter::<u64>().map(|id| id as usize).collect(),
    };
    untyped(record(operation, [logits])?)
}

/// `logsumexp(logits) − logits[target]`, row by row.
#[derive(Debug)]
struct CrossEntropy {
    targets: Vec<usize>,
}

impl Operation<1> for CrossEntropy {
    /// The logits, and what [`LogSum`] returns for every row.
    type State = (FlexTensor, Vec<(f32, f32)>);

    fn forward(&self, [logits]: [FlexTensor; 1]) -> Option<(FlexTensor, Self::State)> {
        let rows = self.targets.len();
        let width = logits.layout().shape()[1];
        let logits = logits.to_contiguous();
        let numbers = logits.storage::<f32>();
        let sums: Vec<_> = numbers
            .par_chunks(width)
            .map(|logits| ARCH.dispatch(LogSum { logits }))
            .collect();
        let losses = numbers
            .chunks(width)
            .zip(&self.targets)
            .zip(&sums)
            .map(|((logits, target), (max, log_sum))| log_sum * LN_2 - (logits[*target] - max))
            .collect();
        Some((flex(losses, [rows, 1]), (logits, sums)))
    }

    /// (softmax − one-hot) · g, in place of the logits if nobody else holds them.
    fn backward(
        &self,
        (mut logits, sums): Self::State,
        gradient: FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let width = logits.layout().shape()[1];
        let gradient = gradient.to_contiguous();
        if logits.try_storage_mut::<f32>().is_none() {
            logits = shaped_as(logits.storage::<f32>().to_vec(), &logits);
        }
        logits
            .storage_mut::<f32>()
            .par_chunks_mut(width)
            .zip(&self.targets)
            .zip(&sums)
            .zip(gradient.storage::<f32>())
            .for_each(|(((logits, target), (max, log_sum)), gradient)| {
                ARCH.dispatch(Probabilities {
                    logits,
                    max: *max,
                    log_sum: *log_sum,
                    factor: *gradient,
                });
                logits[*target] -= gradient;
            });
        [Some(logits)]
    }
}

/// The largest logit, and log2 Σ e^(logit − largest): apart, for their sum would round off what
/// small losses are.
struct LogSum<'a> {
    logits: &'a [f32],
}

impl WithSimd for LogSum<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (f32, f32) {
        let (logits, tail) = S::as_simd_f32s(self.logits);
        let mut largest = [simd.splat_f32s(f32::NEG_INFINITY); 4];
        for logits in logits.chunks(4) {
            for (largest, &x) in largest.iter_mut().zip(logits) {
                *largest = simd.max_f32s(x, *largest);
            }
        }
        let [a, b, c, d] = largest;
        let all = simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d));
        let all = simd.reduce_max_f32s(all);
        let max = tail.iter().copied().fold(all, f32::max);
        let (shift, log2_e) = (simd.splat_f32s(max), simd.splat_f32s(LOG2_E));
        let mut sums = [simd.splat_f32s(0.0); 4];
        for logits in logits.chunks(4) {
            for (sum, &x) in sums.iter_mut().zip(logits) {
                let x = simd.mul_f32s(simd.sub_f32s(x, shift), log2_e);
                *sum = simd.add_f32s(*sum, simd::exp2(simd, x));
            }
        }
        let [a, b, c, d] = sums;
        let all = simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d));
        let tail: f32 = tail.iter().map(|x| (x - max).exp()).sum();
        (max, (simd.reduce_sum_f32s(all) + tail).log2())
    }
}

/// Turns logits into `factor · e^logit / Σ e^logit`.
struct Probabilities<'a> {
    logits: &'a mut [f32],
    max: f32,
    log_sum: f32,
    factor: f32,
}

impl WithSimd for Probabilities<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (logits, tail) = S::as_mut_simd_f32s(self.logits);
        let (shift, log2_e) = (simd.splat_f32s(self.max), simd.splat_f32s(LOG2_E));
        let minus_log_sum = simd.splat_f32s(-self.log_sum);
        let factor = simd.splat_f32s(self.factor);
        for x in logits {
            let power = simd.mul_add_f32s(simd.sub_f32s(*x, shift), log2_e, minus_log_sum);
            *x = simd.mul_f32s(simd::exp2(simd, power), factor);
        }
        for x in tail {
            *x = self.factor * ((*x - self.max) * LOG2_E - self.log_sum).exp2();
        }
    }
}
