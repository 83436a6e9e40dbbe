//! What a training lowers: the cross-entropy of the next token, or the distance to a teacher.

mod head;
mod teacher;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use burn::config::Config;
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

pub(super) use head::{HeadLosses, head_losses, token_losses};
pub(super) use teacher::Teacher;

use super::batch::LanguageBatch;
use super::precision::at_least_f32;

/// How a student is taught by a teacher's distributions of the next token (arXiv 1503.02531).
///
/// The loss of a target is `c · CE + (1 − c) · T² · KL(teacher ‖ student) + h · E`: the cross-entropy of
/// the token itself, the divergence of both distributions at the temperature T, and the relative
/// squared error of hidden states.
///
/// ```
/// use fusedkv::train::Distillation;
///
/// let config = Distillation::new().with_temperature(2.0).with_target_share(0.1);
/// assert_eq!(config.hidden_weight, 0.0);
/// ```
#[derive(Config, Debug, Copy, PartialEq)]
pub struct Distillation {
    /// T, what the logits of both are divided by.
    #[config(default = 1.0)]
    pub temperature: f64,
    /// c, the share of the next token's cross-entropy; the divergence has the rest.
    #[config(default = 0.0)]
    pub target_share: f64,
    /// h, the weight of E: `‖s − t‖² / ‖t‖²` of student's and teacher's residual streams above every
    /// layer from the lowest that trains, the mean over these layers.
    #[config(default = 0.0)]
    pub hidden_weight: f64,
}

/// A batch, and what is to be learned of it.
#[derive(Clone, Debug)]
pub struct Lesson<B: AutodiffBackend> {
    /// What is read.
    pub batch: LanguageBatch<B>,
    /// None: to predict the next token.
    pub(super) teacher: Option<Arc<Teacher<B::InnerBackend>>>,
    /// Under which of a routing's plans, by its place; none in a training without.
    pub(super) plan: Option<usize>,
}

impl<B: AutodiffBackend> From<LanguageBatch<B>> for Lesson<B> {
    /// A lesson in predicting the next token.
    fn from(batch: LanguageBatch<B>) -> Self {
        Self {
            batch,
            teacher: None,
            plan: None,
        }
    }
}

/// Σ weight · ‖s − t‖² / ‖t‖² over tokens: s and t are `[batch, seq, width]`, weights `[batch, seq]`.
pub(super) fn relative_error<B: Backend>(
    s: Tensor<B, 3>,
    t: Tensor<B, 3>,
    weights: Tensor<B, 2>,
) -> Tensor<B, 1> {
    let precise = at_least_f32(s.dtype());
    let (s, t) = (s.cast(precise), t.cast(precise));
    let error = (s - t.clone()).square().sum_dim(2) / t.square().sum_dim(2);
    (error * weights.unsqueeze_dim(2)).sum()
}
