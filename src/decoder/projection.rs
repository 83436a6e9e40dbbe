//! A linear layer.

use std::ops::Range;

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::kernels::linear;

/// `x · weight + bias`.
#[derive(Module, Debug)]
pub struct Projection<B: Backend> {
    /// `[input, output]`.
    pub weight: Param<Tensor<B, 2>>,
    /// `[output]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
}

impl<B: Backend> Projection<B> {
    /// A bias starts at 0.
    pub(super) fn new(
        [input, output]: [usize; 2],
        bias: bool,
        initializer: &Initializer,
        device: &B::Device,
    ) -> Self {
        let shape = [input, output];
        Self {
            weight: initializer.init_with(shape, Some(input), Some(output), device),
            bias: bias.then(|| Initializer::Zeros.init([output], device)),
        }
    }

    /// # Shapes
    /// - x: `[batch, seq, input]`
    /// - output: `[batch, seq, output]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let product = linear(x, self.weight.val());
        match &self.bias {
            Some(bias) => product + bias.val().unsqueeze(),
            None => product,
        }
    }

    /// Some columns of what [`forward`](Self::forward) gives, and the product of no others.
    pub(super) fn forward_to(&self, columns: Range<usize>, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [_, output] = self.weight.dims();
        if columns == (0..output) {
            return self.forward(x);
        }
        let weight = self.weight.val();
        let product = linear(x, weight.narrow(1, columns.start, columns.len()));
        match &self.bias {
            Some(bias) => {
                let bias = bias.val().narrow(0, columns.start, columns.len());
                product + bias.unsqueeze()
            }
            None => product,
        }
    }
}
