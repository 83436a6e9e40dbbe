//! A linear layer.

use std::ops::Range;

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::lora::Lora;
use super::weight::Weight;

/// `x · weight + bias`, and what an adapter adds.
#[derive(Module, Debug)]
pub struct Projection<B: Backend> {
    /// `[input, output]`.
    pub weight: Weight<B>,
    /// `[output]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// What is added beside the weight, in decoders [with adapters](super::FusedKvDecoder::with_lora).
    pub lora: Option<Lora<B>>,
}

impl<B: Backend> Projection<B> {
    /// A bias starts at 0.
    pub(super) fn new(
        shape: [usize; 2],
        bias: bool,
        initializer: &Initializer,
        device: &B::Device,
    ) -> Self {
        let [_, output] = shape;
        Self {
            weight: Weight::new(shape, initializer, device),
            bias: bias.then(|| Initializer::Zeros.init([output], device)),
            lora: None,
        }
    }

    /// # Shapes
    /// - x: `[batch, seq, input]`
    /// - output: `[batch, seq, output]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let added = self.lora.as_ref().map(|lora| lora.forward(x.clone()));
        let product = self.weight.product(x);
        let output = match &self.bias {
            Some(bias) => product + bias.val().unsqueeze(),
            None => product,
        };
        match added {
            Some(added) => output + added,
            None => output,
        }
    }

    /// Some columns of what [`forward`](Self::forward) gives, and the product of no others.
    pub(super) fn forward_to(&self, columns: Range<usize>, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [_, output] = self.weight.dims();
        if columns == (0..output) {
            return self.forward(x);
        }
        let added = (self.lora.as_ref()).map(|lora| lora.forward_to(columns.clone(), x.clone()));
        let product = self.weight.product_to(columns.clone(), x);
        let output = match &self.bias {
            Some(bias) => {
                let bias = bias.val().narrow(0, columns.start, columns.len());
                product + bias.unsqueeze()
            }
            None => product,
        };
        match added {
            Some(added) => output + added,
            None => output,
        }
    }
}

/// The projections that a module has, by the names of its fields; the ones after the semicolon are
/// optional.
macro_rules! projections {
    ($module:ident: $($field:ident),* $(; $($optional:ident),+)?) => {
        impl<B: Backend> $module<B> {
            pub(super) fn projections(&self) -> Vec<(&'static str, &Projection<B>)> {
                #[allow(unused_mut)]
                let mut all = vec![$((stringify!($field), &self.$field)),*];
                $($(all.extend(self.$optional.as_ref().map(|p| (stringify!($optional), p)));)+)?
                all
            }

            pub(super) fn projections_mut(&mut self) -> Vec<(&'static str, &mut Projection<B>)> {
                #[allow(unused_mut)]
                let mut all = vec![$((stringify!($field), &mut self.$field)),*];
                $($(all.extend(self.$optional.as_mut().map(|p| (stringify!($optional), p)));)+)?
                all
            }
        }
    };
}
pub(super) use projections;
