//! A linear layer.

use std::ops::Range;

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::listed::listed;
use super::weight::Weight;
use crate::kernels::linear_each;

/// `x · weight + bias`.
#[derive(Module, Debug)]
pub struct Projection<B: Backend> {
    /// `[input, output]`.
    pub(crate) weight: Weight<B>,
    /// `[output]`.
    pub(crate) bias: Option<Param<Tensor<B, 1>>>,
}

listed!(ProjectionRecord: weight, bias);

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
        }
    }

    /// # Shapes
    /// - x: `[batch, seq, input]`
    /// - output: `[batch, seq, output]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.biased(self.weight.product(x))
    }

    /// [`forward`](Self::forward) of several projections of the same x, as one step.
    pub(super) fn forward_each(projections: &[&Self], x: &Tensor<B, 3>) -> Vec<Tensor<B, 3>> {
        let factors: Vec<_> = projections.iter().map(|p| p.weight.factor()).collect();
        let products = linear_each(x, &factors).into_iter();
        let outputs = projections.iter().zip(products);
        outputs.map(|(p, product)| p.biased(product)).collect()
    }

    fn biased(&self, product: Tensor<B, 3>) -> Tensor<B, 3> {
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
        let product = self.weight.product_to(columns.clone(), x);
        match &self.bias {
            Some(bias) => {
                let bias = bias.val().narrow(0, columns.start, columns.len());
                product + bias.unsqueeze()
            }
            None => product,
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
