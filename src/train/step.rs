//! One step of training or validation: logits, cross-entropy, gradients.

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor};
use burn_train::metric::{Adaptor, ItemLazy, LossInput};
use burn_train::{InferenceStep, TrainOutput, TrainStep};

use super::data::LanguageBatch;
use super::metrics::TokenLosses;
use crate::decoder::FusedKvDecoder;
use crate::kernels::cross_entropy;

/// What metrics are told of a step. Losses alone: logits are as large as the vocabulary.
#[derive(Clone, Debug)]
pub struct LanguageOutput<B: Backend> {
    /// Mean negative log-likelihood of each window's targets in nats, `[batch]`.
    pub losses: Tensor<B, 1>,
    /// Targets per window that count.
    pub targets: usize,
}

/// Mean negative log-likelihood, in nats, of each window's targets that count, `[batch]`, and how
/// many of a window's do.
///
/// # Panics
/// Of what [`FusedKvDecoder::forward`] returns an error for: windows longer than the decoder's
/// `max_positions`, or none.
fn window_losses<B: Backend>(
    model: &FusedKvDecoder<B>,
    batch: LanguageBatch<B>,
) -> (Tensor<B, 1>, usize) {
    let logits = model
        .forward(batch.tokens)
        .expect("training checks the windows' length, and batches are never empty");
    losses_of(logits, batch.targets, batch.answers)
}

/// [`window_losses`] of logits `[batch, context, vocab_size]`, targets `[batch, context]` and the
/// positions that count, `[batch, answers]`.
pub(super) fn losses_of<B: Backend>(
    logits: Tensor<B, 3>,
    targets: Tensor<B, 2, Int>,
    answers: Option<Tensor<B, 2, Int>>,
) -> (Tensor<B, 1>, usize) {
    let [rows, context, vocab_size] = logits.dims();
    let logits = logits.reshape([rows * context, vocab_size]);
    let targets = targets.reshape([rows * context, 1]);
    let mut losses = cross_entropy(logits, targets).reshape([rows, context]);
    if let Some(answers) = answers {
        losses = losses.gather(1, answers);
    }
    let [_, counted] = losses.dims();
    (losses.mean_dim(1).reshape([rows]), counted)
}

impl<B: AutodiffBackend> TrainStep for FusedKvDecoder<B> {
    type Input = LanguageBatch<B>;
    type Output = LanguageOutput<B::InnerBackend>;

    fn step(&self, batch: Self::Input) -> TrainOutput<Self::Output> {
        let (losses, targets) = window_losses(self, batch);
        let output = LanguageOutput {
            losses: losses.clone().inner(),
            targets,
        };
        TrainOutput::new(self, losses.mean().backward(), output)
    }
}

impl<B: Backend> InferenceStep for FusedKvDecoder<B> {
    type Input = LanguageBatch<B>;
    type Output = LanguageOutput<B>;

    fn step(&self, batch: Self::Input) -> Self::Output {
        let (losses, targets) = window_losses(self, batch);
        LanguageOutput { losses, targets }
    }
}

impl<B: Backend> ItemLazy for LanguageOutput<B> {
    type ItemSync = Self;

    fn sync(self) -> Self {
        self
    }
}

impl<B: Backend> Adaptor<LossInput<B>> for LanguageOutput<B> {
    fn adapt(&self) -> LossInput<B> {
        LossInput::new(self.losses.clone())
    }
}

impl<B: Backend> Adaptor<TokenLosses> for LanguageOutput<B> {
    fn adapt(&self) -> TokenLosses {
        let losses: Vec<f64> = self.losses.to_data().iter().collect();
        TokenLosses {
            mean: losses.iter().sum::<f64>() / losses.len() as f64,
            tokens: losses.len() * self.targets,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::{Flex, FlexDevice};

    use super::*;

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
}
