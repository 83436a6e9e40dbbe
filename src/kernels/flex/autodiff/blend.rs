//! Blends of stored keys or values, formed once per layer in one pass.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{Operation, Tracked, flex, record, shaped_as};

/// Σ x ⊙ w of pairs x `[batch, heads, seq, width]` and w `[1, heads or 1, 1, width or 1]`.
pub(super) fn blend(terms: Vec<(Tracked, Tracked)>) -> Option<Tracked> {
    let mut terms = terms.into_iter();
    let (x, w) = terms.next()?;
    let mut sum = match terms.next() {
        None => record(Blend, [x, w])?,
        Some((y, v)) => record(Blend, [x, w, y, v])?,
    };
    while let Some((x, w)) = terms.next() {
        sum = match terms.next() {
            None => record(Blend, [x, w, sum])?,
            Some((y, v)) => record(Blend, [x, w, y, v, sum])?,
        };
    }
    Some(sum)
}

/// The sum of N/2 pairs and, if N is odd, of what comes last.
#[derive(Debug)]
struct Blend;

/// A weight for every head and channel.
fn spread(weight: &FlexTensor, heads: usize, width: usize) -> Vec<f32> {
    let (shape, weight) = (weight.layout().shape().clone(), weight.to_contiguous());
    let numbers = weight.storage::<f32>();
    let place = |head, channel| (head % shape[1]) * shape[3] + channel % shape[3];
    (0..heads)
        .flat_map(|head| (0..width).map(move |channel| numbers[place(head, channel)]))
        .collect()
}

/// The gradient of a weight from that of every row of `width` channels, head by head.
fn gathered(rows: &[Vec<f32>], heads: usize, weight: &FlexTensor) -> FlexTensor {
    let shape = weight.layout().shape();
    let mut sums = vec![0.0; shape.num_elements()];
    for (row, channels) in rows.iter().enumerate() {
        let start = (row % heads % shape[1]) * shape[3];
        for (channel, x) in channels.iter().enumerate() {
            sums[start + channel % shape[3]] += x;
        }
    }
    shaped_as(sums, weight)
}

impl<const N: usize> Operation<N> for Blend {
    type State = [FlexTensor; N];

    fn forward(&self, inputs: [FlexTensor; N]) -> Option<(FlexTensor, Self::State)> {
        let [batch, heads, seq, width] = inputs[0].layout().shape().dims();
        let mut state = inputs;
        let (pairs, rest) = state.as_chunks_mut::<2>();
        let mut terms = Vec::with_capacity(pairs.len());
        for [x, w] in pairs {
            *x = x.to_contiguous();
            terms.push((x.storage::<f32>(), spread(w, heads, width)));
        }
        let mut output = match rest {
            [sum] => sum.to_contiguous().storage().to_vec(),
            _ => vec![0.0; batch * heads * seq * width],
        };
        let rows = output.par_chunks_mut(seq * width).enumerate();
        rows.for_each(|(row, output)| {
            let (start, head) = (row * seq * width, row % heads);
            let terms: Vec<_> = terms
                .iter()
                .map(|(x, w)| (&x[start..][..seq * width], &w[head * width..][..width]))
                .collect();
            for (i, output) in output.chunks_exact_mut(width).enumerate() {
                for (x, w) in &terms {
                    let x = &x[i * width..][..width];
                    for ((sum, x), w) in output.iter_mut().zip(x).zip(*w) {
                        *sum += x * w;
                    }
                }
            }
        });
        Some((flex(output, [batch, heads, seq, width]), state))
    }

    fn backward(
        &self,
        state: Self::State,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N] {
        let gradient = gradient.to_contiguous();
        let [batch, heads, seq, width] = gradient.layout().shape().dims();
        let numbers = gradient.storage::<f32>();
        let mut gradients = std::array::from_fn(|_| None);
        for (i, [x, w]) in state.as_chunks::<2>().0.iter().enumerate() {
            let weights = spread(w, heads, width);
            let rows = numbers.par_chunks(seq * width).enumerate();
            if wanted[2 * i] {
                let mut output = vec![0.0; numbers.len()];
                let pairs = rows.clone().zip(output.par_chunks_mut(seq * width));
                pairs.for_each(|((row, gradient), output)| {
                    let weights = &weights[row % heads * width..][..width];
                    let pairs = output.chunks_exact_mut(width);
                    for (output, gradient) in pairs.zip(gradient.chunks_exact(width)) {
                        let terms = output.iter_mut().zip(gradient).zip(weights);
                        terms.for_each(|((to, g), w)| *to = g * w);
                    }
                });
                gradients[2 * i] = Some(flex(output, [batch, heads, seq, width]));
            }
            if wanted[2 * i + 1] {
                let pairs = rows.zip(x.storage::<f32>().par_chunks(seq * width));
                let sums: Vec<Vec<f32>> = pairs
                    .map(|((_, gradient), x)| {
                        let mut sums = vec![0.0; width];
                        let pairs = gradient.chunks_exact(width).zip(x.chunks_exact(width));
                        for (gradient, x) in pairs {
                            let terms = sums.iter_mut().zip(gradient).zip(x);
                            terms.for_each(|((sum, g), x)| *sum += g * x);
                        }
                        sums
                    })
                    .collect();
                gradients[2 * i + 1] = Some(gathered(&sums, heads, w));
            }
        }
        if N % 2 == 1 {
            gradients[N - 1] = Some(gradient.clone());
        }
        gradients
    }
}
