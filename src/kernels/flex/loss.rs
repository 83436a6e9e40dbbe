//! Losses at the head: each row of logits is read while it is in the processor's caches, and becomes its
//! own gradient.

use std::any::TypeId;
use std::f32::consts::{LN_2, LOG2_E};

use burn::tensor::{DType, Int, Tensor, TensorPrimitive, backend::Backend};
use burn_flex::{Flex, FlexTensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{ARCH, downcast, f32_tensor, int_tensor, simd, tensor};
use crate::kernels::loss::{Lost, Soft, Taught};

pub(crate) fn cross_entropy<B: Backend>(
    logits: &Tensor<B, 2>,
    targets: &Tensor<B, 2, Int>,
) -> Option<Tensor<B, 2>> {
    let [rows, width] = logits.dims();
    let logits = f32_tensor(logits)?.to_contiguous();
    let targets = ids(int_tensor(targets)?);
    let rows_of = logits.storage::<f32>().par_chunks(width);
    let losses = rows_of
        .zip(&targets)
        .map(|(logits, &target)| {
            ARCH.dispatch(Normalise {
                logits,
                temperature: 1.0,
            })
            .nll(logits[target])
        })
        .collect();
    tensor(losses, [rows, 1])
}

/// [`lost`](crate::kernels::loss::lost), in place of the logits if nobody else holds them; what was
/// taught back if it is not of f32 on Flex.
pub(crate) fn lost<B: Backend>(taught: Taught<B>) -> Result<Lost<B>, Taught<B>> {
    let dtypes = [
        Some(&taught.logits),
        taught.teacher.as_ref().map(|t| &t.logits),
    ];
    let f32s = dtypes
        .iter()
        .flatten()
        .all(|logits| logits.dtype() == DType::F32);
    if TypeId::of::<B>() != TypeId::of::<Flex>() || !f32s {
        return Err(taught);
    }
    let lost = on_flex(downcast(taught)?);
    Ok(downcast(lost).unwrap_or_else(|_| unreachable!("B is Flex")))
}

fn on_flex(taught: Taught<Flex>) -> Lost<Flex> {
    let [rows, width] = taught.logits.dims();
    let mut logits = float(taught.logits).to_contiguous();
    if logits.try_storage_mut::<f32>().is_none() {
        let copy = burn::tensor::TensorData::new(logits.storage::<f32>().to_vec(), [rows, width]);
        logits = FlexTensor::from_data(copy);
    }
    let targets = ids(taught.targets.into_primitive());
    let weights: Vec<f32> = taught.weights.into_data().iter().collect();
    let teacher = taught.teacher.map(
        |Soft {
             logits,
             temperature,
             target_share,
         }| { (float(logits).to_contiguous(), temperature, target_share) },
    );
    let numbers = logits
        .storage_mut::<f32>()
        .par_chunks_mut(width)
        .enumerate();
    let losses: Vec<(f32, f32)> = numbers
        .map(|(row, logits)| {
            let (target, weight) = (targets[row], weights[row]);
            let own = ARCH.dispatch(Normalise {
                logits,
                temperature: 1.0,
            });
            let nll = own.nll(logits[target]);
            let Some((soft, temperature, share)) = &teacher else {
                ARCH.dispatch(Surprise {
                    logits,
                    own,
                    factor: weight,
                });
                logits[target] -= weight;
                return (nll, 0.0);
            };
            let soft = &soft.storage::<f32>()[row * width..][..width];
            let [teacher, student] = [soft, &*logits].map(|logits| {
                ARCH.dispatch(Normalise {
                    logits,
                    temperature: *temperature,
                })
            });
            let divergence = ARCH.dispatch(Diverge {
                logits,
                soft,
                own,
                student,
                teacher,
                own_factor: share * weight,
                soft_factor: (1.0 - share) * temperature * weight,
            });
            logits[target] -= share * weight;
            (nll, divergence)
        })
        .collect();
    let column = |of: fn(&(f32, f32)) -> f32| {
        let losses: Vec<f32> = losses.iter().map(of).collect();
        Tensor::from_data(
            burn::tensor::TensorData::new(losses, [rows, 1]),
            &Default::default(),
        )
    };
    Lost {
        nll: column(|losses| losses.0),
        divergence: teacher.is_some().then(|| column(|losses| losses.1)),
        gradient: Tensor::from_primitive(TensorPrimitive::Float(logits)),
    }
}

/// The numbers of floats that are not quantised.
fn float(tensor: Tensor<Flex, 2>) -> FlexTensor {
    tensor.into_primitive().tensor()
}

fn ids(targets: FlexTensor) -> Vec<usize> {
    targets
        .into_data()
        .iter::<u64>()
        .map(|id| id as usize)
        .collect()
}

/// log2 softmax(x / temperature) = (x − max) · scale − log_sum. The largest is apart from the sum, for
/// both together would round off what small losses are.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    scale: f32,
    log_sum: f32,
}

impl Softmax {
    /// Of the target's logit, at temperature 1.
    fn nll(&self, target: f32) -> f32 {
        self.log_sum * LN_2 - (target - self.max)
    }

    fn log2(&self, x: f32) -> f32 {
        (x - self.max) * self.scale - self.log_sum
    }

    #[inline(always)]
    fn log2s<S: Simd>(&self, simd: S, x: S::f32s) -> S::f32s {
        let shifted = simd.sub_f32s(x, simd.splat_f32s(self.max));
        let minus_log_sum = simd.splat_f32s(-self.log_sum);
        simd.mul_add_f32s(shifted, simd.splat_f32s(self.scale), minus_log_sum)
    }
}

/// The [`Softmax`] of a row.
struct Normalise<'a> {
    logits: &'a [f32],
    temperature: f32,
}

impl WithSimd for Normalise<'_> {
    type Output = Softmax;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Softmax {
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
        let unnormalised = Softmax {
            max: tail.iter().copied().fold(all, f32::max),
            scale: LOG2_E / self.temperature,
            log_sum: 0.0,
        };
        let mut sums = [simd.splat_f32s(0.0); 4];
        for logits in logits.chunks(4) {
            for (sum, &x) in sums.iter_mut().zip(logits) {
                let power = unnormalised.log2s(simd, x);
                *sum = simd.add_f32s(*sum, simd::exp2(simd, power));
            }
        }
        let [a, b, c, d] = sums;
        let all = simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d));
        let tail: f32 = tail.iter().map(|&x| unnormalised.log2(x).exp2()).sum();
        Softmax {
            log_sum: (simd.reduce_sum_f32s(all) + tail).log2(),
            ..unnormalised
        }
    }
}

/// Turns logits into `factor · softmax`.
struct Surprise<'a> {
    logits: &'a mut [f32],
    own: Softmax,
    factor: f32,
}

impl WithSimd for Surprise<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (logits, tail) = S::as_mut_simd_f32s(self.logits);
        let factor = simd.splat_f32s(self.factor);
        for x in logits {
            let p = simd::exp2(simd, self.own.log2s(simd, *x));
            *x = simd.mul_f32s(p, factor);
        }
        for x in tail {
            *x = self.factor * self.own.log2(*x).exp2();
        }
    }
}

/// Turns logits into `own_factor · own + soft_factor · (student − teacher)` of the three distributions,
/// and returns Σ teacher · ln(teacher / student).
struct Diverge<'a> {
    logits: &'a mut [f32],
    soft: &'a [f32],
    own: Softmax,
    /// At the temperature, as the teacher.
    student: Softmax,
    teacher: Softmax,
    own_factor: f32,
    soft_factor: f32,
}

impl WithSimd for Diverge<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let Self {
            own,
            student,
            teacher,
            own_factor,
            soft_factor,
            ..
        } = self;
        let (logits, logits_tail) = S::as_mut_simd_f32s(self.logits);
        let (soft, soft_tail) = S::as_simd_f32s(self.soft);
        let [own_factors, soft_factors] = [own_factor, soft_factor].map(|f| simd.splat_f32s(f));
        let mut sums = simd.splat_f32s(0.0);
        for (x, &t) in logits.iter_mut().zip(soft) {
            let (log_p, log_q) = (teacher.log2s(simd, t), student.log2s(simd, *x));
            let (p, q) = (simd::exp2(simd, log_p), simd::exp2(simd, log_q));
            sums = simd.mul_add_f32s(p, simd.sub_f32s(log_p, log_q), sums);
            let soft = simd.mul_f32s(simd.sub_f32s(q, p), soft_factors);
            let own = simd::exp2(simd, own.log2s(simd, *x));
            *x = simd.mul_add_f32s(own, own_factors, soft);
        }
        let mut sum = simd.reduce_sum_f32s(sums);
        for (x, &t) in logits_tail.iter_mut().zip(soft_tail) {
            let (log_p, log_q) = (teacher.log2(t), student.log2(*x));
            let (p, q) = (log_p.exp2(), log_q.exp2());
            sum += p * (log_p - log_q);
            *x = own_factor * own.log2(*x).exp2() + soft_factor * (q - p);
        }
        sum * LN_2
    }
}
