//! AdamW as language models are trained with it: matrices alone decay, and the norm of all
//! gradients together is clipped.

use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{
    AdamW, AdamWConfig, AdamWState, GradientsParams, MultiGradientsParams, Optimizer,
    SimpleOptimizer,
};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

use super::config::TrainingConfig;

/// The optimizer of a training.
pub(super) fn optimizer<B: AutodiffBackend, M: AutodiffModule<B>>(
    config: &TrainingConfig,
    devices: usize,
) -> ClippedToNorm<OptimizerAdaptor<MatrixDecay, M, B>> {
    let adam_w = AdamWConfig::new()
        .with_beta_1(config.beta_1)
        .with_beta_2(config.beta_2)
        .with_epsilon(1e-8);
    let decaying = adam_w.clone().with_weight_decay(config.weight_decay);
    ClippedToNorm {
        inner: OptimizerAdaptor::from(MatrixDecay {
            matrices: decaying.build(),
            others: adam_w.with_weight_decay(0.0).build(),
        }),
        max_norm: config.grad_clip,
        summed: config.accumulation * devices,
    }
}

/// AdamW that decays matrices only: pulling a norm's gain or a fusion weight towards zero
/// regularises nothing.
#[derive(Clone)]
pub(super) struct MatrixDecay {
    matrices: AdamW,
    others: AdamW,
}

impl<B: Backend> SimpleOptimizer<B> for MatrixDecay {
    type State<const D: usize> = AdamWState<B, D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<B, D>,
        grad: Tensor<B, D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<B, D>, Option<Self::State<D>>) {
        let adam_w = if D == 2 { &self.matrices } else { &self.others };
        adam_w.step(lr, tensor, grad, state)
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &B::Device) -> Self::State<D> {
        <AdamW as SimpleOptimizer<B>>::to_device(state, device)
    }
}

/// Scales all gradients by one factor where their norm exceeds the largest allowed (arXiv
/// 1211.5063). Burn's own clipping takes the norm of each tensor alone.
#[derive(Clone)]
pub(super) struct ClippedToNorm<O> {
    inner: O,
    max_norm: f64,
    /// Burn sums the gradients of this many equal parts of a batch; the update takes their mean.
    summed: usize,
}

impl<B, M, O> Optimizer<M, B> for ClippedToNorm<O>
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
            let factor = Tensor::from_data([factor], &device);
            let grads = &mut grads;
            module.visit(&mut Scale::<B> { grads, factor });
        }
        clip_to_norm(&module, &mut grads, self.max_norm);
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

fn clip_to_norm<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    grads: &mut GradientsParams,
    max_norm: f64,
) {
    let mut squares = SumOfSquares::<B> { grads, sum: None };
    module.visit(&mut squares);
    let Some(sum) = squares.sum else { return };
    // A tensor, not a number: nobody waits for the device.
    let factor = (sum.sqrt() + 1e-6)
        .recip()
        .mul_scalar(max_norm)
        .clamp_max(1.0);
    module.visit(&mut Scale::<B> { grads, factor });
}

struct SumOfSquares<'g, B: AutodiffBackend> {
    grads: &'g GradientsParams,
    sum: Option<Tensor<B::InnerBackend, 1>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for SumOfSquares<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Some(grad) = self.grads.get::<B::InnerBackend, D>(param.id) else {
            return;
        };
        let square = grad.square().sum();
        self.sum = Some(match self.sum.take() {
            Some(sum) => sum + square,
            None => square,
        });
    }
}

struct Scale<'g, B: AutodiffBackend> {
    grads: &'g mut GradientsParams,
    factor: Tensor<B::InnerBackend, 1>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Scale<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) {
            let scaled = grad * self.factor.clone().unsqueeze();
            self.grads.register(param.id, scaled);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::nn::{Linear, LinearConfig};
    use burn_flex::{Flex, FlexDevice};

    use super::*;

    type Train = Autodiff<Flex>;

    fn norm(max_norm: f64) -> f32 {
        let device = FlexDevice;
        let layer: Linear<Train> = LinearConfig::new(3, 2).init(&device);
        let input = Tensor::<Train, 2>::ones([4, 3], &device);
        let loss = layer.forward(input).sum();
        let mut grads = GradientsParams::from_grads(loss.backward(), &layer);
        clip_to_norm::<Train, _>(&layer, &mut grads, max_norm);
        let mut squares = SumOfSquares::<Train> {
            grads: &grads,
            sum: None,
        };
        burn::module::Module::visit(&layer, &mut squares);
        squares.sum.unwrap().sqrt().into_scalar()
    }

    #[test]
    fn all_gradients_share_one_norm() {
        // Weight gradients are 4 each, 6 of them; bias gradients 4 each, 2 of them.
        assert!((norm(1e9) - 128f32.sqrt()).abs() < 1e-4);
        assert!((norm(2.0) - 2.0).abs() < 1e-4);
    }
}
