//! Matrix products as one product of two matrices, forward and backward, whatever the number of
//! windows: Burn's own take one product per window, sum the weight's gradient over windows, and
//! copy the transposed weight.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{Shape, Tensor};
use burn_flex::{Flex, FlexTensor};

use super::{Operation, record, tracked, untyped};

pub(crate) fn linear<B: Backend>(x: &Tensor<B, 3>, weight: &Tensor<B, 2>) -> Option<Tensor<B, 3>> {
    let [batch, seq, _] = x.dims();
    let operation = Linear { batch, seq };
    untyped(record(operation, [tracked(x)?, tracked(weight)?])?)
}

/// `x · w` for x `[batch, seq, input]` and w `[input, output]` in any layout.
#[derive(Debug)]
struct Linear {
    batch: usize,
    seq: usize,
}

impl Linear {
    /// `[batch, seq, n]` as `[batch · seq, n]`.
    fn rows(&self, x: &FlexTensor) -> FlexTensor {
        let width = x.layout().shape()[2];
        x.reshape(Shape::new([self.batch * self.seq, width]))
    }

    /// The other way.
    fn windows(&self, x: &FlexTensor) -> FlexTensor {
        let width = x.layout().shape()[1];
        x.reshape(Shape::new([self.batch, self.seq, width]))
    }
}

impl Operation<2> for Linear {
    type State = (FlexTensor, FlexTensor);

    fn forward(&self, [x, weight]: [FlexTensor; 2]) -> Option<(FlexTensor, Self::State)> {
        let x = self.rows(&x);
        let output = Flex::float_matmul(x.clone(), weight.clone());
        Some((self.windows(&output), (x, weight)))
    }

    fn backward(
        &self,
        (x, weight): Self::State,
        gradient: FlexTensor,
        [d_x, d_weight]: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let gradient = self.rows(&gradient);
        let x_gradient = d_x.then(|| {
            let gradient = Flex::float_matmul(gradient.clone(), weight.transpose(0, 1));
            self.windows(&gradient)
        });
        let weight_gradient = d_weight.then(|| {
            // In the weight's own layout: a transposed embedding's gradient is transposed back.
            if weight.is_contiguous() {
                Flex::float_matmul(x.transpose(0, 1), gradient)
            } else {
                Flex::float_matmul(gradient.transpose(0, 1), x).transpose(0, 1)
            }
        });
        [x_gradient, weight_gradient]
    }
}
