//! One step on a batch: forward, cross-entropy, backward, clipping.

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::{GradientsParams, Optimizer};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{ElementConversion, Tensor};
use burn_train::metric::{Adaptor, LossInput};
use burn_train::{InferenceStep, ItemLazy, TrainOutput, TrainStep};

use super::data::LanguageBatch;
use super::metric::NllInput;
use crate::FusedKvDecoder;
use crate::backend::Flex;

/// A decoder under training: what the `Learner` steps.
#[derive(Module, Debug)]
pub struct LanguageModel<B: Backend> {
    /// The decoder.
    pub decoder: FusedKvDecoder<B>,
    grad_clip: Option<f64>,
}

impl<B: Backend> LanguageModel<B> {
    /// Trains `decoder`; before an optimiser step all gradients are scaled so that their common
    /// norm is at most `grad_clip`.
    pub fn new(decoder: FusedKvDecoder<B>, grad_clip: Option<f64>) -> Self {
        Self { decoder, grad_clip }
    }

    /// Mean negative log-likelihood of the targets, in nats per token, `[1]`.
    ///
    /// # Panics
    /// If the windows are longer than the decoder's `max_positions`; [`train`](super::train)
    /// checks that before the first step.
    pub fn loss(&self, batch: LanguageBatch<B>) -> Tensor<B, 1> {
        let [rows, context] = batch.targets.dims();
        let logits = self
            .decoder
            .forward(batch.tokens)
            .expect("windows fit the decoder");
        let [_, _, vocab_size] = logits.dims();
        CrossEntropyLossConfig::new()
            .init(&logits.device())
            .forward(
                logits.reshape([rows * context, vocab_size]),
                batch.targets.reshape([rows * context]),
            )
    }
}

/// Mean negative log-likelihood of a batch and the number of tokens it is the mean of.
#[derive(Debug)]
pub struct StepOutput<B: Backend> {
    loss: Tensor<B, 1>,
    tokens: usize,
}

impl<B: Backend> ItemLazy for StepOutput<B> {
    type ItemSync = StepLoss;

    fn sync(self) -> Self::ItemSync {
        StepLoss {
            nll: self.loss.into_scalar().elem(),
            tokens: self.tokens,
        }
    }
}

/// A [`StepOutput`] as plain numbers.
#[derive(Clone, Copy, Debug)]
pub struct StepLoss {
    /// Nats per token.
    pub nll: f64,
    /// Tokens.
    pub tokens: usize,
}

impl Adaptor<LossInput<Flex>> for StepLoss {
    fn adapt(&self) -> LossInput<Flex> {
        LossInput::new(Tensor::from_floats([self.nll as f32], &Default::default()))
    }
}

impl Adaptor<NllInput> for StepLoss {
    fn adapt(&self) -> NllInput {
        NllInput {
            nll: self.nll,
            tokens: self.tokens,
        }
    }
}

impl<B: AutodiffBackend> TrainStep for LanguageModel<B> {
    type Input = LanguageBatch<B>;
    type Output = StepOutput<B::InnerBackend>;

    fn step(&self, batch: LanguageBatch<B>) -> TrainOutput<Self::Output> {
        let tokens = batch.targets.shape().num_elements();
        let loss = self.loss(batch);
        let output = StepOutput {
            loss: loss.clone().inner(),
            tokens,
        };
        TrainOutput::new(self, loss.backward(), output)
    }

    fn optimize<B2, O>(self, optim: &mut O, lr: f64, mut grads: GradientsParams) -> Self
    where
        B2: AutodiffBackend,
        O: Optimizer<Self, B2>,
        Self: AutodiffModule<B2>,
    {
        if let Some(max) = self.grad_clip {
            let norm = grad_norm::<B2, _>(&self, &grads);
            if norm > max {
                grads = scaled::<B2, _>(&self, grads, max / norm);
            }
        }
        optim.step(lr, self, grads)
    }
}

impl<B: Backend> InferenceStep for LanguageModel<B> {
    type Input = LanguageBatch<B>;
    type Output = StepOutput<B>;

    fn step(&self, batch: LanguageBatch<B>) -> StepOutput<B> {
        StepOutput {
            tokens: batch.targets.shape().num_elements(),
            loss: self.loss(batch),
        }
    }
}

/// Euclidean norm of all gradients taken together.
pub(crate) fn grad_norm<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    grads: &GradientsParams,
) -> f64 {
    struct Norm<'a, B: AutodiffBackend> {
        grads: &'a GradientsParams,
        square: Option<Tensor<B::InnerBackend, 1>>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Norm<'_, B> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let Some(grad) = self.grads.get::<B::InnerBackend, D>(param.id) else {
                return;
            };
            let square = (grad.clone() * grad).sum();
            self.square = Some(match self.square.take() {
                Some(sum) => sum + square,
                None => square,
            });
        }
    }
    let mut norm = Norm::<B> {
        grads,
        square: None,
    };
    module.visit(&mut norm);
    let square: f64 = norm.square.map_or(0.0, |sum| sum.into_scalar().elem());
    square.sqrt()
}

/// All gradients times `factor`.
fn scaled<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    grads: GradientsParams,
    factor: f64,
) -> GradientsParams {
    struct Scale {
        grads: GradientsParams,
        factor: f64,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Scale {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) {
                self.grads.register(param.id, grad * self.factor);
            }
        }
    }
    let mut scale = Scale { grads, factor };
    module.visit(&mut scale);
    scale.grads
}

/// Initialises every parameter now, in order: Burn does it on first use, and the order decides
/// which random numbers each gets.
pub(super) fn initialised<B: Backend, M: Module<B>>(module: M) -> M {
    struct Initialise;
    impl<B: Backend> ModuleMapper<B> for Initialise {}
    // The default mapper reads every parameter.
    module.map(&mut Initialise)
}
