//! Windows as tensors.

use burn::data::dataloader::batcher::Batcher;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor, TensorData};

use super::data::TokenWindow;

/// Windows as tensors.
#[derive(Clone, Debug)]
pub struct LanguageBatch<B: Backend> {
    /// `[batch, context]`.
    pub tokens: Tensor<B, 2, Int>,
    /// The token after each, `[batch, context]`.
    pub targets: Tensor<B, 2, Int>,
    /// Which targets count; none: all do.
    pub mask: Option<TargetMask<B>>,
}

/// The targets of a batch that count.
#[derive(Clone, Debug)]
pub struct TargetMask<B: Backend> {
    /// 1 where a target counts and 0 where it does not, `[batch, context]`.
    pub weights: Tensor<B, 2>,
    /// How many count.
    pub targets: usize,
    /// What the sum of their losses is divided by in training. For a batch by itself the number of
    /// targets that count, at least 1; for one of several that a step's windows are read in, that
    /// number's mean over them, so that every target of the step weighs the same.
    pub divisor: f64,
}

impl<B: AutodiffBackend> TargetMask<B> {
    pub(super) fn inner(self) -> TargetMask<B::InnerBackend> {
        TargetMask {
            weights: self.weights.inner(),
            targets: self.targets,
            divisor: self.divisor,
        }
    }
}

/// Stacks windows of equal length.
///
/// # Panics
/// If they are of unequal length, or have an answer beyond their targets.
#[derive(Clone, Copy, Debug, Default)]
pub struct LanguageBatcher;

impl<B: Backend> Batcher<B, TokenWindow, LanguageBatch<B>> for LanguageBatcher {
    fn batch(&self, items: Vec<TokenWindow>, device: &B::Device) -> LanguageBatch<B> {
        let masked = items.iter().any(|item| item.answers.is_some());
        LanguageBatch::stack(&items, masked, device)
    }
}

impl<B: Backend> LanguageBatch<B> {
    /// Stacks windows of equal length, with a mask or without.
    pub(super) fn stack(items: &[TokenWindow], masked: bool, device: &B::Device) -> Self {
        let context = items.first().map_or(0, |item| item.inputs.len());
        let shape = [items.len(), context];
        let ids = |row: fn(&TokenWindow) -> &[u32]| {
            let ids: Vec<i64> = items.iter().flat_map(row).map(|&id| id.into()).collect();
            Tensor::from_data(TensorData::new(ids, shape), device)
        };
        Self {
            tokens: ids(|item| &item.inputs),
            targets: ids(|item| &item.targets),
            mask: masked.then(|| {
                let counts: Vec<bool> = items.iter().flat_map(TokenWindow::counts).collect();
                let targets = counts.iter().filter(|&&counts| counts).count();
                let weights: Vec<f32> = counts.into_iter().map(f32::from).collect();
                TargetMask {
                    weights: Tensor::from_data(TensorData::new(weights, shape), device),
                    targets,
                    divisor: targets.max(1) as f64,
                }
            }),
        }
    }
}
