//! One step of training or validation: logits, cross-entropy, gradients.

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor};
use burn_train::metric::{Adaptor, ItemLazy};
use burn_train::{InferenceStep, TrainOutput, TrainStep};

use super::batch::{LanguageBatch, TargetMask};
use super::gradients::widen;
use super::metrics::TokenLosses;
use super::precision::at_least_f32;
use crate::decoder::FusedKvDecoder;
use crate::kernels::cross_entropy;

/// What metrics are told of a step. Losses alone: logits are as large as the vocabulary.
#[derive(Clone, Debug)]
pub struct LanguageOutput<B: Backend> {
    /// Negative log-likelihood in nats of each window's targets that count, over the window's
    /// length, `[batch]`: their mean where all count.
    pub losses: Tensor<B, 1>,
    /// Targets of the batch that count.
    pub targets: usize,
    /// Tokens per window.
    pub context: usize,
}

/// The losses of a batch.
///
/// # Panics
/// Of what [`FusedKvDecoder::forward`] returns an error for: windows longer than the decoder's
/// `max_positions`, or none.
fn window_losses<B: Backend>(
    model: &FusedKvDecoder<B>,
    batch: LanguageBatch<B>,
) -> LanguageOutput<B> {
    let logits = model
        .forward(batch.tokens)
        .expect("training checks the windows' length, and batches are never empty");
    losses_of(logits, batch.targets, batch.mask)
}

/// Negative log-likelihood in nats of targets `[batch, context]` by logits
/// `[batch, context, vocab_size]`, each by itself, `[batch, context]`. In f32 at least: a sum over a
/// vocabulary has no precision in half the bits.
pub(super) fn token_losses<B: Backend>(
    logits: Tensor<B, 3>,
    targets: Tensor<B, 2, Int>,
) -> Tensor<B, 2> {
    let [rows, context, vocab_size] = logits.dims();
    let precise = at_least_f32(logits.dtype());
    let logits = logits.reshape([rows * context, vocab_size]).cast(precise);
    let targets = targets.reshape([rows * context, 1]);
    cross_entropy(logits, targets).reshape([rows, context])
}

/// [`window_losses`] of logits `[batch, context, vocab_size]`, targets `[batch, context]` and which
/// of them count.
fn losses_of<B: Backend>(
    logits: Tensor<B, 3>,
    targets: Tensor<B, 2, Int>,
    mask: Option<TargetMask<B>>,
) -> LanguageOutput<B> {
    let mut losses = token_losses(logits, targets);
    let [rows, context] = losses.dims();
    let mut counted = rows * context;
    if let Some(mask) = mask {
        let weights = mask.weights.cast(losses.dtype());
        losses = losses * weights;
        counted = mask.targets;
    }
    LanguageOutput {
        losses: losses.mean_dim(1).reshape([rows]),
        targets: counted,
        context,
    }
}

impl<B: AutodiffBackend> TrainStep for FusedKvDecoder<B> {
    type Input = LanguageBatch<B>;
    type Output = LanguageOutput<B::InnerBackend>;

    fn step(&self, batch: Self::Input) -> TrainOutput<Self::Output> {
        let divisor = batch.mask.as_ref().map(|mask| mask.divisor);
        let LanguageOutput {
            losses,
            targets,
            context,
        } = window_losses(self, batch);
        let output = LanguageOutput {
            losses: losses.clone().inner(),
            targets,
            context,
        };
        let loss = match divisor {
            None => losses.mean(),
            Some(divisor) => losses.sum() * (context as f64 / divisor),
        };
        let mut output = TrainOutput::new(self, loss.backward(), output);
        widen(self, &mut output.grads);
        output
    }
}

impl<B: Backend> InferenceStep for FusedKvDecoder<B> {
    type Input = LanguageBatch<B>;
    type Output = LanguageOutput<B>;

    fn step(&self, batch: Self::Input) -> Self::Output {
        window_losses(self, batch)
    }
}

impl<B: Backend> ItemLazy for LanguageOutput<B> {
    type ItemSync = Self;

    fn sync(self) -> Self {
        self
    }
}

impl<B: Backend> Adaptor<TokenLosses> for LanguageOutput<B> {
    fn adapt(&self) -> TokenLosses {
        let windows = self.targets as f64 / self.context as f64;
        TokenLosses {
            mean: self.losses.to_data().iter::<f64>().sum::<f64>() / windows,
            tokens: self.targets,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::module::{Module, ModuleMapper, Param};
    use burn::tensor::{DType, Distribution, Tolerance};
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::{FusedKvDecoderConfig, KvPlan};

    type Train = Autodiff<Flex>;

    #[test]
    fn cross_entropy_is_that_of_log_softmax() {
        let device = FlexDevice;
        let logits =
            Tensor::<Flex, 2>::from_data([[1.0, -2.0, 0.5], [300.0, 0.0, -300.0]], &device);
        let targets = Tensor::<Flex, 2, Int>::from_data([[2], [1]], &device);
        let expected = burn::tensor::activation::log_softmax(logits.clone(), 1)
            .gather(1, targets.clone())
            .neg();
        cross_entropy(logits, targets)
            .into_data()
            .assert_approx_eq::<f32>(&expected.into_data(), Default::default());
    }

    #[test]
    fn losses_of_bf16_logits_are_those_of_the_same_logits_in_f32() {
        let (rows, vocab_size) = (3, 50_000);
        let normal = Distribution::Normal(0.0, 2.0);
        let logits = Tensor::<Flex, 3>::random([rows, 2, vocab_size], normal, &FlexDevice);
        let logits = logits.cast(DType::BF16);
        let targets = Tensor::<Flex, 2, Int>::from_data([[5, 49_999], [0, 7], [1, 1]], &FlexDevice);
        let losses = |logits| losses_of(logits, targets.clone(), None).losses.into_data();
        let found = losses(logits.clone());
        let tolerance = Tolerance::rel_abs(0.0, 1e-5);
        found.assert_approx_eq::<f32>(&losses(logits.cast(DType::F32)), tolerance);
    }

    struct Half;

    impl ModuleMapper<Train> for Half {
        fn map_float<const D: usize>(
            &mut self,
            param: Param<Tensor<Train, D>>,
        ) -> Param<Tensor<Train, D>> {
            param.map(|tensor| tensor.cast(DType::BF16).detach().require_grad())
        }
    }

    #[test]
    fn gradients_of_bf16_parameters_are_added_up_in_f32() {
        let config = FusedKvDecoderConfig::tiny(16, KvPlan::Standard);
        let model = config.init::<Train>(&FlexDevice).unwrap().map(&mut Half);
        let batch = LanguageBatch {
            tokens: Tensor::from_data([[1, 2, 3]], &FlexDevice),
            targets: Tensor::from_data([[2, 3, 4]], &FlexDevice),
            mask: None,
        };
        let output = TrainStep::step(&model, batch);
        let embedding = &model.embed_tokens.weight;
        assert_eq!(embedding.val().dtype(), DType::BF16);
        let grad = output.grads.get::<Flex, 2>(embedding.id()).unwrap();
        assert_eq!(grad.dtype(), DType::F32);
    }

    #[test]
    fn the_mean_is_over_the_targets_that_count() {
        let logits = Tensor::<Flex, 3>::zeros([2, 4, 8], &FlexDevice);
        let logits = logits.slice_assign(
            [1..2, 2..3, 5..6],
            Tensor::from_data([[[3.0]]], &FlexDevice),
        );
        let targets = Tensor::<Flex, 2, Int>::full([2, 4], 5, &FlexDevice);
        let mask = |weights: [[f32; 4]; 2]| TargetMask {
            targets: weights.iter().flatten().filter(|&&w| w > 0.0).count(),
            weights: Tensor::from_data(weights, &FlexDevice),
            divisor: 1.0,
        };
        let certain = (3f64.exp() + 7.0).ln() - 3.0;
        for (weights, expected) in [
            (
                [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]],
                (8f64.ln() * 2.0 + certain) / 3.0,
            ),
            ([[0.0; 4], [0.0, 0.0, 1.0, 0.0]], certain),
        ] {
            let mask = mask(weights);
            let counted = mask.targets;
            let output = losses_of(logits.clone(), targets.clone(), Some(mask));
            let TokenLosses { mean, tokens } = output.adapt();
            assert_eq!(tokens, counted);
            assert!((mean - expected).abs() < 1e-6, "{mean} {expected}");
        }
        assert_eq!(
            losses_of(logits, targets, Some(mask([[0.0; 4]; 2]))).targets,
            0
        );
    }
}
