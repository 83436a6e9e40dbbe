//! From what the head reads to the loss and its gradient, some tokens at a time: the logits of a batch,
//! tokens times vocabulary, are never there at once.
//!
//! Logits are computed once. Their gradient replaces them at once, because what each loss is multiplied
//! with is known before the backward pass begins, and goes on to the head's input and weight.

use burn::tensor::{Int, Tensor, backend::Backend};

use super::Distillation;
use crate::decoder::FusedKvDecoder;
use crate::kernels::{self, Lost, Soft, Taught, cross_entropy, matmul};
use crate::train::precision::at_least_f32;

/// Logits that are there at once, 32 MiB of f32: few enough to stay near the processor, and enough to
/// use a weight that is read for them. In tests so few that even theirs are taken in parts.
const LOGITS: usize = if cfg!(test) { 1 << 8 } else { 1 << 23 };

/// Losses of a batch at the head, and their gradients.
pub(in crate::train) struct HeadLosses<B: Backend> {
    /// Cross-entropy of each target, `[batch, context]`.
    pub nll: Tensor<B, 2>,
    /// KL(teacher ‖ student) of each, `[batch, context]`.
    pub divergence: Option<Tensor<B, 2>>,
    /// Of the weighted sum of all losses by what the head reads, `[batch, context, hidden_size]`.
    pub d_hidden: Tensor<B, 3>,
    /// The same by the head's weight, as the parameter has its dimensions, in f32 at least.
    pub d_weight: Option<Tensor<B, 2>>,
}

/// The losses of `student` and their gradients, given what its head reads, `hidden`
/// `[batch, context, hidden_size]`, targets and what their losses are multiplied with, both
/// `[batch, context]`, and the teacher and what its head reads.
pub(in crate::train) fn head_losses<B: Backend>(
    student: &FusedKvDecoder<B>,
    hidden: Tensor<B, 3>,
    targets: Tensor<B, 2, Int>,
    weights: Tensor<B, 2>,
    teacher: Option<(&FusedKvDecoder<B>, Tensor<B, 3>, Distillation)>,
    trains_head: bool,
) -> HeadLosses<B> {
    let [rows, context, width] = hidden.dims();
    let tokens = rows * context;
    let vocab_size = student.config().vocab_size;
    let hidden = hidden.reshape([1, tokens, width]);
    let (targets, weights) = (targets.reshape([tokens, 1]), weights.reshape([tokens, 1]));
    let teacher = teacher.map(|(model, hidden, config)| {
        let [_, _, width] = hidden.dims();
        (model, hidden.reshape([1, tokens, width]), config)
    });
    // One of fewer bits is widened once. Products are in the type of their inputs.
    let head = match &student.lm_head {
        Some(head) => head.weight.val().transpose(),
        None => student.embed_tokens.weight.val(),
    };
    let head = head.cast(hidden.dtype());
    let (mut nll, mut divergence, mut d_hidden) = (Vec::new(), Vec::new(), Vec::new());
    let mut d_weight: Option<Tensor<B, 2>> = None;
    for (start, len) in chunks(tokens, vocab_size) {
        let x = hidden.clone().narrow(1, start, len);
        let logits = student.logits(x.clone()).reshape([len, vocab_size]);
        let dtype = logits.dtype();
        // A soft cap c · tanh(z / c) flattens the gradient by 1 − tanh².
        let slope = (student.config().block.logit_softcap)
            .map(|cap| (logits.clone() / cap).square().neg() + 1.0);
        let precise = at_least_f32(dtype);
        let lost = kernels::lost(Taught {
            logits: logits.cast(precise),
            targets: targets.clone().narrow(0, start, len),
            weights: weights.clone().narrow(0, start, len).cast(precise),
            teacher: teacher.as_ref().map(|(model, hidden, config)| Soft {
                logits: model
                    .logits(hidden.clone().narrow(1, start, len))
                    .reshape([len, vocab_size])
                    .cast(precise),
                temperature: config.temperature as f32,
                target_share: config.target_share as f32,
            }),
        });
        let Lost { gradient, .. } = lost;
        nll.push(lost.nll);
        divergence.extend(lost.divergence);
        let gradient = match slope {
            Some(slope) => gradient.cast(dtype) * slope,
            None => gradient.cast(dtype),
        };
        let x = x.reshape([len, width]);
        let d_x = matmul(gradient.clone(), head.clone());
        let d_w = trains_head.then(|| match &student.lm_head {
            Some(_) => matmul(x.transpose(), gradient),
            None => matmul(gradient.transpose(), x),
        });
        d_hidden.push(d_x);
        let d_w = d_w.map(|d_w| d_w.cast(precise));
        d_weight = match (d_weight, d_w) {
            (Some(sum), Some(d_w)) => Some(sum + d_w),
            (_, d_w) => d_w,
        };
    }
    let batch = |losses: Vec<Tensor<B, 2>>| Tensor::cat(losses, 0).reshape([rows, context]);
    HeadLosses {
        nll: batch(nll),
        divergence: (!divergence.is_empty()).then(|| batch(divergence)),
        d_hidden: Tensor::cat(d_hidden, 0).reshape([rows, context, width]),
        d_weight,
    }
}

/// Negative log-likelihood in nats of targets `[batch, context]`, each by itself, given what the head
/// reads, `[batch, context, hidden_size]`.
pub(in crate::train) fn token_losses<B: Backend>(
    model: &FusedKvDecoder<B>,
    hidden: Tensor<B, 3>,
    targets: Tensor<B, 2, Int>,
) -> Tensor<B, 2> {
    let [rows, context, width] = hidden.dims();
    let tokens = rows * context;
    let vocab_size = model.config().vocab_size;
    let (hidden, targets) = (
        hidden.reshape([1, tokens, width]),
        targets.reshape([tokens, 1]),
    );
    let losses = chunks(tokens, vocab_size).map(|(start, len)| {
        let logits = model.logits(hidden.clone().narrow(1, start, len));
        // A sum over a vocabulary has no precision in half the bits.
        let precise = at_least_f32(logits.dtype());
        let logits = logits.reshape([len, vocab_size]).cast(precise);
        cross_entropy(logits, targets.clone().narrow(0, start, len))
    });
    Tensor::cat(losses.collect(), 0).reshape([rows, context])
}

/// Where the tokens taken at once begin, and how many they are.
fn chunks(tokens: usize, vocab_size: usize) -> impl Iterator<Item = (usize, usize)> {
    let most = (LOGITS / vocab_size).max(1);
    let starts = (0..tokens).step_by(most);
    starts.map(move |start| (start, most.min(tokens - start)))
}
