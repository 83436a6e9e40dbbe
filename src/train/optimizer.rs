//! AdamW as language models are trained with it: matrices decay, fusion weights have a learning rate
//! and a decay of their own, and the norm of all gradients together is clipped.

use std::sync::mpsc::Sender;

use burn::module::AutodiffModule;
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{
    AdamW, AdamWConfig, AdamWState, GradientsParams, MultiGradientsParams, Optimizer,
    SimpleOptimizer,
};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

use super::config::TrainingConfig;
use super::gradients::{Squares, clip_to_norm, scale};
use crate::kernels::{self, AdamWRates};

const EPSILON: f32 = 1e-8;

/// The optimizer of a training, which sends the gradients' squares of every step to `report`.
pub(super) fn optimizer<B: AutodiffBackend, M: AutodiffModule<B>>(
    config: &TrainingConfig,
    devices: usize,
    report: Sender<Squares<B::InnerBackend>>,
) -> ClippedToNorm<B::InnerBackend, OptimizerAdaptor<DecoderAdamW, M, B>> {
    ClippedToNorm {
        inner: OptimizerAdaptor::from(DecoderAdamW {
            betas: [config.beta_1, config.beta_2],
            weight_decay: config.weight_decay,
            fusion_weight_decay: config.fusion_weight_decay,
            fusion_learning_rate_ratio: config.fusion_learning_rate_ratio,
        }),
        max_norm: config.grad_clip,
        summed: config.accumulation * devices,
        report,
    }
}

/// AdamW whose rates depend on what a parameter is. An optimizer of Burn's sees a tensor alone; in a
/// decoder its dimensions tell: norms have one, matrices two, and fusion weights three.
#[derive(Clone)]
pub(super) struct DecoderAdamW {
    betas: [f32; 2],
    weight_decay: f32,
    fusion_weight_decay: f32,
    fusion_learning_rate_ratio: f64,
}

impl DecoderAdamW {
    /// Learning rate of a parameter of `rank` dimensions.
    fn learning_rate(&self, lr: f64, rank: usize) -> f64 {
        if rank == 3 {
            lr * self.fusion_learning_rate_ratio
        } else {
            lr
        }
    }

    /// Decay of a parameter of `rank` dimensions: pulling a norm's gain towards zero regularises
    /// nothing.
    fn decay(&self, rank: usize) -> f32 {
        match rank {
            2 => self.weight_decay,
            3 => self.fusion_weight_decay,
            _ => 0.0,
        }
    }

    /// Burn's own.
    fn adam_w(&self, rank: usize) -> AdamW {
        AdamWConfig::new()
            .with_beta_1(self.betas[0])
            .with_beta_2(self.betas[1])
            .with_epsilon(EPSILON)
            .with_weight_decay(self.decay(rank))
            .build()
    }
}

impl<B: Backend> SimpleOptimizer<B> for DecoderAdamW {
    type State<const D: usize> = AdamWState<B, D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<B, D>,
        grad: Tensor<B, D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<B, D>, Option<Self::State<D>>) {
        let lr = self.learning_rate(lr, D);
        let Some(AdamWState { mut momentum }) = state else {
            return self.adam_w(D).step(lr, tensor, grad, None);
        };
        let rates = AdamWRates::new(lr, self.betas, EPSILON, self.decay(D), momentum.time);
        let tensors = [tensor, grad, momentum.moment_1, momentum.moment_2];
        match kernels::adam_w(&rates, tensors) {
            Ok([tensor, moment_1, moment_2]) => {
                momentum.moment_1 = moment_1;
                momentum.moment_2 = moment_2;
                momentum.time += 1;
                (tensor, Some(AdamWState { momentum }))
            }
            Err([tensor, grad, moment_1, moment_2]) => {
                momentum.moment_1 = moment_1;
                momentum.moment_2 = moment_2;
                let state = Some(AdamWState { momentum });
                self.adam_w(D).step(lr, tensor, grad, state)
            }
        }
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &B::Device) -> Self::State<D> {
        <AdamW as SimpleOptimizer<B>>::to_device(state, device)
    }
}

/// Clips the norm of all gradients together, and reports the norms.
#[derive(Clone)]
pub(super) struct ClippedToNorm<B: Backend, O> {
    inner: O,
    max_norm: f64,
    /// Burn sums the gradients of this many equal parts of a batch; the update takes their mean.
    summed: usize,
    report: Sender<Squares<B>>,
}

impl<B, M, O> Optimizer<M, B> for ClippedToNorm<B::InnerBackend, O>
where
    B: AutodiffBackend,
    M: AutodiffModule<B>,
    O: Optimizer<M, B>,
{
    type Record = O::Record;

    fn step(&mut self, lr: f64, module: M, mut grads: GradientsParams) -> M {
        if self.summed > 1 {
            let factor = 1.0 / self.summed as f32;
            let device = module.devices().into_iter().next().unwrap_or_default();
            scale(&module, &mut grads, Tensor::from_data([factor], &device));
        }
        if let Some(squares) = Squares::of(&module, &grads) {
            clip_to_norm(&module, &mut grads, &squares, self.max_norm);
            // Nobody listens where nothing is measured.
            let _ = self.report.send(squares);
        }
        self.inner.step(lr, module, grads)
    }

    /// Gradients of several devices are not clipped: their sum is only formed by the optimizer.
    fn step_multi(&mut self, lr: f64, module: M, grads: MultiGradientsParams) -> M {
        self.inner.step_multi(lr, module, grads)
    }

    fn to_record(&self) -> Self::Record {
        self.inner.to_record()
    }

    fn load_record(self, record: Self::Record) -> Self {
        Self {
            inner: self.inner.load_record(record),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::{Flex, FlexDevice};

    use super::*;

    /// Three steps of the kernel, and of Burn's AdamW.
    fn after_three_steps<const D: usize>(shape: [usize; D]) {
        let random = || {
            let spread = burn::tensor::Distribution::Normal(0.0, 1.0);
            Tensor::<Flex, D>::random(shape, spread, &FlexDevice)
        };
        let optimizer = DecoderAdamW {
            betas: [0.9, 0.95],
            weight_decay: 0.1,
            fusion_weight_decay: 0.3,
            fusion_learning_rate_ratio: 0.5,
        };
        let (lr, decay) = match D {
            1 => (0.01, 0.0),
            2 => (0.01, 0.1),
            _ => (0.005, 0.3),
        };
        let adam_w = AdamWConfig::new()
            .with_beta_2(0.95)
            .with_epsilon(EPSILON)
            .with_weight_decay(decay)
            .build();
        let start = random();
        let (mut found, mut expected) = ((start.clone(), None), (start.clone(), None));
        for _ in 0..3 {
            let grad = random();
            let (tensor, state) = found;
            found = optimizer.step(0.01, tensor, grad.clone(), state);
            let (tensor, state) = expected;
            expected = adam_w.step(lr, tensor, grad, state);
        }
        let [found, expected] = [found, expected].map(|(tensor, state)| {
            let AdamWState { momentum } = state.unwrap();
            assert_eq!(momentum.time, 3);
            [tensor, momentum.moment_1, momentum.moment_2]
        });
        for (found, expected) in found.into_iter().zip(expected) {
            let (found, expected) = (found.into_data(), expected.into_data());
            found.assert_approx_eq::<f32>(&expected, burn::tensor::Tolerance::rel_abs(1e-5, 1e-6));
        }
    }

    #[test]
    fn the_kernel_steps_as_adam_w_does() {
        after_three_steps([70, 301]);
        after_three_steps([301]);
        after_three_steps([2, 3, 5]);
    }
}
