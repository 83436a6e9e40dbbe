//! One step of training or validation: the walk through the decoder, losses, gradients.

use burn::module::{AutodiffModule, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn_train::metric::{Adaptor, ItemLazy};
use burn_train::{InferenceStep, TrainOutput, TrainStep};

use super::batch::{LanguageBatch, TargetMask};
use super::gradients::gradients;
use super::metrics::{Divergence, TokenLosses};
use super::objective::{HeadLosses, Lesson, head_losses, relative_error, token_losses};
use super::plan_losses::PlanLosses;
use crate::decoder::FusedKvDecoder;

/// What metrics are told of a step. Losses alone: logits are as large as the vocabulary.
#[derive(Clone, Debug)]
pub struct LanguageOutput<B: Backend> {
    /// Negative log-likelihood in nats of each window's targets that count, over the window's
    /// length, `[batch]`: their mean where all count.
    pub losses: Tensor<B, 1>,
    /// KL(teacher ‖ student) in nats at the temperature, of the same targets in the same way, where
    /// there is a teacher.
    pub divergence: Option<Tensor<B, 1>>,
    /// `losses` under each plan of a [routing](super::Routing), of which they are then the mean by the
    /// plans' weights; empty in a training without, and of a training step.
    pub by_plan: Vec<Tensor<B, 1>>,
    /// Targets of the batch that count.
    pub targets: usize,
    /// Tokens per window.
    pub context: usize,
}

impl<B: Backend> LanguageOutput<B> {
    /// Of the losses of all targets, `[batch, context]`.
    fn new(
        losses: Tensor<B, 2>,
        divergence: Option<Tensor<B, 2>>,
        mask: Option<TargetMask<B>>,
    ) -> Self {
        let [rows, context] = losses.dims();
        let of_windows = |losses: Tensor<B, 2>| {
            let counted = match &mask {
                Some(mask) => losses.clone() * mask.weights.clone().cast(losses.dtype()),
                None => losses,
            };
            counted.mean_dim(1).reshape([rows])
        };
        Self {
            losses: of_windows(losses),
            divergence: divergence.map(of_windows),
            by_plan: Vec::new(),
            targets: mask.as_ref().map_or(rows * context, |mask| mask.targets),
            context,
        }
    }

    /// Of what the same batch came to under several plans, one or more, each with its share of the mean.
    pub(super) fn of_plans(outputs: Vec<Self>, shares: &[f64]) -> Self {
        let by_plan: Vec<_> = outputs.iter().map(|of| of.losses.clone()).collect();
        let parts = by_plan.iter().zip(shares);
        let parts = parts.map(|(losses, share)| losses.clone() * *share);
        let first = outputs.into_iter().next().expect("a routing has plans");
        Self {
            losses: parts.reduce(|sum, part| sum + part).expect("as above"),
            by_plan,
            ..first
        }
    }

    /// What such losses, [`losses`](Self::losses) or [`divergence`](Self::divergence), come to.
    fn mean(&self, losses: &Tensor<B, 1>) -> TokenLosses {
        let windows = self.targets as f64 / self.context as f64;
        TokenLosses {
            mean: losses.to_data().iter::<f64>().sum::<f64>() / windows,
            tokens: self.targets,
        }
    }
}

impl<B: AutodiffBackend> TrainStep for FusedKvDecoder<B> {
    type Input = Lesson<B>;
    type Output = LanguageOutput<B::InnerBackend>;

    /// # Panics
    /// Of what [`FusedKvDecoder::forward`] returns an error for: windows longer than the decoder's
    /// `max_positions`, or none.
    fn step(&self, Lesson { batch, teacher, .. }: Lesson<B>) -> TrainOutput<Self::Output> {
        let teacher = teacher.as_deref();
        let (mut below, mut streams) = (None, Vec::new());
        let hidden = self.states(batch.tokens.clone(), None, &mut |layer, x| {
            if teacher.is_some_and(|teacher| teacher.goes_on_from(layer)) {
                below = Some(x.clone().inner());
            }
            if teacher.is_some_and(|teacher| teacher.matches(layer)) {
                streams.push(x.clone());
            }
        });
        let hidden = hidden.expect("windows have a length that was checked, and batches have rows");
        let reading = teacher.map(|teacher| teacher.read(batch.tokens.inner(), below));

        let mask = batch.mask.map(TargetMask::inner);
        let weights = match &mask {
            Some(mask) => mask.weights.clone() / mask.divisor,
            None => {
                let [rows, context] = batch.targets.dims();
                let share = 1.0 / (rows * context) as f64;
                Tensor::full([rows, context], share, &batch.targets.device())
            }
        };
        let head = match &self.lm_head {
            Some(head) => &head.weight,
            None => &self.embed_tokens.weight,
        };
        let HeadLosses {
            nll,
            divergence,
            d_hidden,
            d_weight,
        } = head_losses(
            &self.valid(),
            hidden.clone().inner(),
            batch.targets.inner(),
            weights.clone(),
            (teacher.zip(reading.as_ref()))
                .map(|(teacher, of)| (&of.model, of.hidden.clone(), teacher.config)),
            head.is_require_grad(),
        );
        // Its gradients are those of the losses: the head's are there already.
        let mut loss = (hidden * Tensor::from_inner(d_hidden)).sum();
        if let Some((teacher, reading)) = teacher.zip(reading) {
            let factor = teacher.config.hidden_weight / streams.len().max(1) as f64;
            for (own, taught) in streams.into_iter().zip(reading.streams) {
                let weights = Tensor::from_inner(weights.clone());
                let error = relative_error(own, Tensor::from_inner(taught), weights);
                let dtype = loss.dtype();
                loss = loss + (error * factor).cast(dtype);
            }
        }
        let mut grads = gradients(self, loss.backward());
        if let Some(gradient) = d_weight {
            add(&mut grads, head.id(), gradient);
        }
        TrainOutput {
            grads,
            item: LanguageOutput::new(nll, divergence, mask),
        }
    }
}

/// Adds to the gradient of a parameter.
fn add<B: Backend>(grads: &mut GradientsParams, id: ParamId, more: Tensor<B, 2>) {
    let gradient = match grads.remove::<B, 2>(id) {
        Some(gradient) => gradient + more,
        None => more,
    };
    grads.register(id, gradient);
}

impl<B: Backend> InferenceStep for FusedKvDecoder<B> {
    type Input = LanguageBatch<B>;
    type Output = LanguageOutput<B>;

    /// # Panics
    /// As a training step.
    fn step(&self, batch: Self::Input) -> Self::Output {
        let hidden = self.states(batch.tokens, None, &mut |_, _| {});
        let hidden = hidden.expect("windows have a length that was checked, and batches have rows");
        let losses = token_losses(self, hidden, batch.targets);
        LanguageOutput::new(losses, None, batch.mask)
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
        self.mean(&self.losses)
    }
}

impl<B: Backend> Adaptor<Divergence> for LanguageOutput<B> {
    fn adapt(&self) -> Divergence {
        let losses = self.divergence.as_ref().map(|losses| self.mean(losses));
        Divergence(losses.unwrap_or(TokenLosses::NONE))
    }
}

impl<B: Backend> Adaptor<PlanLosses> for LanguageOutput<B> {
    fn adapt(&self) -> PlanLosses {
        let of_plan = |losses| self.mean(losses);
        PlanLosses(self.by_plan.iter().map(of_plan).collect())
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::module::{Module, ModuleMapper, Param};
    use burn::tensor::DType;
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::{FusedKvDecoderConfig, KvPlan};

    type Train = Autodiff<Flex>;

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
        let output = TrainStep::step(&model, batch.into());
        let embedding = &model.embed_tokens.weight;
        assert_eq!(embedding.val().dtype(), DType::BF16);
        let grad = output.grads.get::<Flex, 2>(embedding.id()).unwrap();
        assert_eq!(grad.dtype(), DType::F32);
    }

    #[test]
    fn the_mean_is_over_the_targets_that_count() {
        let losses = Tensor::<Flex, 2>::from_data(
            [[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]],
            &FlexDevice,
        );
        let mask = |weights: [[f32; 4]; 2]| TargetMask {
            targets: weights.iter().flatten().filter(|&&w| w > 0.0).count(),
            weights: Tensor::from_data(weights, &FlexDevice),
            divisor: 1.0,
        };
        for (weights, expected) in [
            ([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]], 194.0 / 3.0),
            ([[0.0; 4], [0.0, 0.0, 1.0, 0.0]], 64.0),
        ] {
            let mask = mask(weights);
            let counted = mask.targets;
            let output = LanguageOutput::new(losses.clone(), Some(losses.clone()), Some(mask));
            let Divergence(divergence) = output.adapt();
            for TokenLosses { mean, tokens } in [output.adapt(), divergence] {
                assert_eq!(tokens, counted);
                assert!((mean - expected).abs() < 1e-6, "{mean} {expected}");
            }
        }
        let none = Some(mask([[0.0; 4]; 2]));
        assert_eq!(LanguageOutput::new(losses, None, none).targets, 0);
    }
}
