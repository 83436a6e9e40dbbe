//! AdamW of one parameter, and what it keeps of it.

use burn::optim::{AdamW, AdamWConfig, AdaptiveMomentumState, SimpleOptimizer};
use burn::record::{PrecisionSettings, Record};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

use super::precision::at_least_f32;
use crate::kernels::{self, AdamWRates};

const EPSILON: f32 = 1e-8;

/// AdamW (arXiv 1711.05101) of parameters that are treated alike.
///
/// A parameter of less precision than f32 is the rounded one of f32 that is updated in its place:
/// most updates are smaller than what half the bits resolve.
#[derive(Clone, Copy, Debug)]
pub(super) struct DecoderAdamW {
    pub betas: [f32; 2],
    /// Per unit of learning rate.
    pub weight_decay: f32,
    /// What the learning rate is multiplied by.
    pub learning_rate_ratio: f64,
}

/// What AdamW keeps of a parameter.
#[derive(Record, Clone)]
pub(super) struct DecoderAdamWState<B: Backend, const D: usize> {
    momentum: Moments<B, D>,
    /// The parameter before it is rounded; none if it is not.
    master: Option<Unrounded<B, D>>,
}

/// Both moments after a number of steps. Files have them as Burn's AdamW does.
#[derive(Record, Clone)]
struct Moments<B: Backend, const D: usize> {
    time: usize,
    moment_1: Unrounded<B, D>,
    moment_2: Unrounded<B, D>,
}

/// A tensor that is read back in f32 whatever the backend's own floats are.
#[derive(Clone, Debug)]
pub(super) struct Unrounded<B: Backend, const D: usize>(Tensor<B, D>);

impl<B: Backend, const D: usize> Record<B> for Unrounded<B, D> {
    type Item<S: PrecisionSettings> = TensorData;

    fn into_item<S: PrecisionSettings>(self) -> TensorData {
        self.0.into_data().convert::<S::FloatElem>()
    }

    fn from_item<S: PrecisionSettings>(item: TensorData, device: &B::Device) -> Self {
        let data = item.convert::<f32>();
        Self(Tensor::from_data(data, (device, DType::F32)))
    }
}

impl<B: Backend, const D: usize> Moments<B, D> {
    fn after(state: AdaptiveMomentumState<B, D>) -> Self {
        Self {
            time: state.time,
            moment_1: Unrounded(state.moment_1),
            moment_2: Unrounded(state.moment_2),
        }
    }
}

impl DecoderAdamW {
    /// Burn's own.
    fn adam_w(&self) -> AdamW {
        AdamWConfig::new()
            .with_beta_1(self.betas[0])
            .with_beta_2(self.betas[1])
            .with_epsilon(EPSILON)
            .with_weight_decay(self.weight_decay)
            .build()
    }

    /// Burn's step, after moments that are there or not.
    fn burns_step<B: Backend, const D: usize>(
        &self,
        lr: f64,
        [tensor, grad]: [Tensor<B, D>; 2],
        momentum: Option<AdaptiveMomentumState<B, D>>,
    ) -> (Tensor<B, D>, Option<Moments<B, D>>) {
        let state = momentum.map(|momentum| burn::optim::AdamWState { momentum });
        let (tensor, state) = self.adam_w().step(lr, tensor, grad, state);
        (tensor, state.map(|state| Moments::after(state.momentum)))
    }

    /// The parameter and moments after a step, all of one type.
    fn update<B: Backend, const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<B, D>,
        grad: Tensor<B, D>,
        momentum: Option<Moments<B, D>>,
    ) -> (Tensor<B, D>, Option<Moments<B, D>>) {
        let Some(Moments {
            time,
            moment_1: Unrounded(moment_1),
            moment_2: Unrounded(moment_2),
        }) = momentum
        else {
            return self.burns_step(lr, [tensor, grad], None);
        };
        let rates = AdamWRates::new(lr, self.betas, EPSILON, self.weight_decay, time);
        // Read back in f32, where the parameter may be f64.
        let dtype = tensor.dtype();
        let tensors = [tensor, grad, moment_1.cast(dtype), moment_2.cast(dtype)];
        match kernels::adam_w(&rates, tensors) {
            Ok([tensor, moment_1, moment_2]) => {
                let state = AdaptiveMomentumState::new(time + 1, moment_1, moment_2);
                (tensor, Some(Moments::after(state)))
            }
            Err([tensor, grad, moment_1, moment_2]) => {
                let state = AdaptiveMomentumState::new(time, moment_1, moment_2);
                self.burns_step(lr, [tensor, grad], Some(state))
            }
        }
    }
}

impl<B: Backend> SimpleOptimizer<B> for DecoderAdamW {
    type State<const D: usize> = DecoderAdamWState<B, D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<B, D>,
        grad: Tensor<B, D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<B, D>, Option<Self::State<D>>) {
        let dtype = tensor.dtype();
        let precise = at_least_f32(dtype);
        let (momentum, master) = state.map(|state| (state.momentum, state.master)).unzip();
        let tensor = match master.flatten() {
            Some(Unrounded(master)) => master.cast(precise),
            None => tensor.cast(precise),
        };
        let lr = lr * self.learning_rate_ratio;
        let (tensor, momentum) = self.update(lr, tensor, grad.cast(precise), momentum);
        let master = (precise != dtype).then(|| Unrounded(tensor.clone()));
        let state = momentum.map(|momentum| DecoderAdamWState { momentum, master });
        (tensor.cast(dtype), state)
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &B::Device) -> Self::State<D> {
        let moved = |Unrounded(tensor)| Unrounded(Tensor::to_device(tensor, device));
        DecoderAdamWState {
            momentum: Moments {
                time: state.momentum.time,
                moment_1: moved(state.momentum.moment_1),
                moment_2: moved(state.momentum.moment_2),
            },
            master: state.master.map(moved),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};
    use burn_flex::{Flex, FlexDevice};

    use super::*;

    /// Three steps of the kernel, and of Burn's AdamW.
    fn after_three_steps<const D: usize>(shape: [usize; D]) {
        let random = || {
            let spread = Distribution::Normal(0.0, 1.0);
            Tensor::<Flex, D>::random(shape, spread, &FlexDevice)
        };
        let rule = DecoderAdamW {
            betas: [0.9, 0.95],
            weight_decay: 0.3,
            learning_rate_ratio: 0.5,
        };
        let adam_w = rule.adam_w();
        let start = random();
        let (mut found, mut expected) = ((start.clone(), None), (start, None));
        for _ in 0..3 {
            let grad = random();
            found = rule.step(0.01, found.0, grad.clone(), found.1);
            expected = adam_w.step(0.005, expected.0, grad, expected.1);
        }
        let (found, momentum) = (found.0, found.1.unwrap().momentum);
        let (expected, burns) = (expected.0, expected.1.unwrap().momentum);
        assert_eq!(momentum.time, 3);
        for (found, expected) in [
            (found, expected),
            (momentum.moment_1.0, burns.moment_1),
            (momentum.moment_2.0, burns.moment_2),
        ] {
            let (found, expected) = (found.into_data(), expected.into_data());
            found.assert_approx_eq::<f32>(&expected, Tolerance::rel_abs(1e-5, 1e-6));
        }
    }

    #[test]
    fn the_kernel_steps_as_adam_w_does() {
        after_three_steps([70, 301]);
        after_three_steps([301]);
        after_three_steps([2, 3, 5]);
    }

    #[test]
    fn updates_below_the_resolution_of_bf16_add_up() {
        let rule = DecoderAdamW {
            betas: [0.9, 0.95],
            weight_decay: 0.0,
            learning_rate_ratio: 1.0,
        };
        // Near 1, numbers of bf16 are 1/256 apart; an update is as large as the learning rate.
        let mut parameter = Tensor::<Flex, 1>::ones([3], &FlexDevice).cast(DType::BF16);
        let grad = Tensor::<Flex, 1>::from_data([1.0, -1.0, 0.0], &FlexDevice);
        let mut state = None;
        for _ in 0..400 {
            let grad = grad.clone().cast(DType::BF16);
            (parameter, state) = rule.step(1e-4, parameter, grad, state);
            assert_eq!(parameter.dtype(), DType::BF16);
        }
        let found: Vec<f64> = parameter.into_data().iter().collect();
        for (found, expected) in found.iter().zip([0.96, 1.04, 1.0]) {
            assert!(
                (found - expected).abs() <= 1.0 / 256.0,
                "{found} {expected}"
            );
        }
        let DecoderAdamWState { momentum, master } = state.unwrap();
        for kept in [momentum.moment_1, momentum.moment_2, master.unwrap()] {
            assert_eq!(kept.0.dtype(), DType::F32);
        }
    }
}
