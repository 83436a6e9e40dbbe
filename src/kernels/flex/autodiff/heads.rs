//! RoPE and the exchange of the sequence and head dimensions.

use burn::tensor::{Tensor, backend::Backend};
use burn_flex::FlexTensor;

use super::super::for_each_block;
use super::super::heads::{Angles, rotated, swapped};
use super::{Operation, constant, flex, record, tracked, untyped};

pub(crate) fn swap_heads<B: Backend>(x: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    let operation = SwapHeads { shape: x.dims() };
    untyped(record(operation, [tracked(x)?])?)
}

pub(crate) fn rope<B: Backend>(
    x: &Tensor<B, 4>,
    cos: &Tensor<B, 4>,
    sin: &Tensor<B, 4>,
) -> Option<Tensor<B, 4>> {
    let operation = Rope {
        shape: x.dims(),
        cos: constant(cos)?,
        sin: constant(sin)?,
    };
    untyped(record(operation, [tracked(x)?])?)
}

/// `[batch, outer, inner, width]` to `[batch, inner, outer, width]`.
#[derive(Debug)]
struct SwapHeads {
    shape: [usize; 4],
}

impl Operation<1> for SwapHeads {
    type State = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> Option<(FlexTensor, ())> {
        let [batch, outer, inner, width] = self.shape;
        let output = swapped(x.to_contiguous().storage(), self.shape);
        Some((flex(output, [batch, inner, outer, width]), ()))
    }

    fn backward(&self, (): (), gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [batch, outer, inner, width] = self.shape;
        let gradient = gradient.to_contiguous();
        let gradient = swapped(gradient.storage(), [batch, inner, outer, width]);
        [Some(flex(gradient, self.shape))]
    }
}

/// Rotation of `[batch, heads, seq, head_dim]`.
#[derive(Debug)]
struct Rope {
    shape: [usize; 4],
    cos: FlexTensor,
    sin: FlexTensor,
}

impl Rope {
    fn angles(&self) -> Angles<'_> {
        Angles {
            rows: self.cos.layout().shape()[0],
            cos: self.cos.storage(),
            sin: self.sin.storage(),
        }
    }
}

impl Operation<1> for Rope {
    type State = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> Option<(FlexTensor, ())> {
        Some((flex(rotated(x, &self.angles()), self.shape), ()))
    }

    /// The gradient turned back, written as `[batch, seq, heads, head_dim]`: there the projection
    /// reads it.
    fn backward(&self, (): (), gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [batch, heads, seq, width] = self.shape;
        let gradient = gradient.to_contiguous();
        let numbers = gradient.storage::<f32>();
        let angles = self.angles();
        let mut output = vec![0.0; numbers.len()];
        let block = heads * width;
        for_each_block(&mut output, block, |token, output| {
            let (batch, token) = (token / seq, token % seq);
            let (cos, sin) = angles.of(batch, token, seq, width / 2);
            for (head, output) in output.chunks_exact_mut(width).enumerate() {
                let start = ((batch * heads + head) * seq + token) * width;
                let (low, high) = numbers[start..][..width].split_at(width / 2);
                let (low_output, high_output) = output.split_at_mut(width / 2);
                for j in 0..width / 2 {
                    low_output[j] = low[j] * cos[j] + high[j] * sin[j];
                    high_output[j] = high[j] * cos[j] - low[j] * sin[j];
                }
            }
        });
        [Some(
            flex(output, [batch, seq, heads, width]).transpose(1, 2),
        )]
    }
}
