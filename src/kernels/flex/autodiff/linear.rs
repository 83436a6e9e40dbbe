//! Matrix products as one product of two matrices, forward and backward, whatever the number of
//! windows: Burn's own take one product per window, sum the weight's gradient over windows, and
//! copy the transposed weight.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Shape, Tensor};
use burn_flex::{Flex, FlexTensor};

use super::{Operation, record, tracked, untyped};
use crate::kernels::flex::linear::linear_packed as plain_linear_packed;
use crate::kernels::flex::many_rows::product;
use crate::kernels::flex::{downcast, float_tensor, typed};
use crate::kernels::packed::Packed;

pub(crate) fn linear<B: Backend>(x: &Tensor<B, 3>, weight: &Tensor<B, 2>) -> Option<Tensor<B, 3>> {
    let [batch, seq, _] = x.dims();
    let operation = Linear { batch, seq };
    untyped(record(operation, [tracked(x)?, tracked(weight)?])?)
}

/// By a matrix in fewer bits, which is a constant: it is widened a tile at a time forward, and at once
/// backward, and nothing but the matrix itself is kept in between.
pub(crate) fn linear_packed<B: Backend>(
    x: &Tensor<B, 3>,
    weight: &Packed<B>,
) -> Option<Tensor<B, 3>> {
    let x = tracked(x)?;
    let operation = LinearPacked(constants(weight)?);
    untyped(record(operation, [x])?)
}

/// The matrix without autodiff.
fn constants<B: Backend>(weight: &Packed<B>) -> Option<Packed<Flex>> {
    let floats = |x: &Tensor<B, 2>| typed::<Flex, 2>(tracked(x)?.primitive);
    let codes = downcast::<_, FlexTensor>(weight.codes.clone().into_primitive()).ok()?;
    Some(Packed {
        kind: weight.kind,
        columns: weight.columns,
        codes: Tensor::from_primitive(codes),
        scales: floats(&weight.scales)?,
        offsets: match &weight.offsets {
            Some(offsets) => Some(floats(offsets)?),
            None => None,
        },
        transposed: weight.transposed,
    })
}

#[derive(Debug)]
struct LinearPacked(Packed<Flex>);

impl Operation<1> for LinearPacked {
    type State = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> Option<(FlexTensor, ())> {
        let output = plain_linear_packed(&typed::<Flex, 3>(x)?, &self.0)?;
        Some((float_tensor(&output)?, ()))
    }

    fn backward(&self, (): (), gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let weight = self.0.clone().transpose().widen(DType::F32);
        let [batch, seq, output]: [usize; 3] = gradient.layout().shape().dims();
        let [_, input] = weight.dims();
        let rows = gradient.reshape(Shape::new([batch * seq, output]));
        let x_gradient = float_tensor(&weight)
            .map(|weight| product(&rows, &weight).reshape(Shape::new([batch, seq, input])));
        [x_gradient]
    }
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
        let output = product(&x, &weight);
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
            let gradient = product(&gradient, &weight.transpose(0, 1));
            self.windows(&gradient)
        });
        let weight_gradient = d_weight.then(|| {
            // In the weight's own layout: a transposed embedding's gradient is transposed back.
            if weight.is_contiguous() {
                product(&x.transpose(0, 1), &gradient)
            } else {
                product(&gradient.transpose(0, 1), &x).transpose(0, 1)
            }
        });
        [x_gradient, weight_gradient]
    }
}
