//! Least squares of a projection's weights.

use burn::tensor::{Tensor, backend::Backend};
use nalgebra::DMatrix;

use crate::kernels::matmul;

/// The normal equations of y ≈ x W over tokens: G = Σ x xᵀ and M = Σ x yᵀ, products of a pass in f32
/// (on the backend), their sums in f64.
pub(super) struct NormalEquations {
    inputs: usize,
    outputs: usize,
    tokens: usize,
    /// `[inputs, inputs]`
    gram: Vec<f64>,
    /// `[inputs, outputs]`
    moment: Vec<f64>,
}

impl NormalEquations {
    pub fn new(inputs: usize, outputs: usize) -> Self {
        Self {
            inputs,
            outputs,
            tokens: 0,
            gram: vec![0.0; inputs * inputs],
            moment: vec![0.0; inputs * outputs],
        }
    }

    /// Adds tokens, `[tokens, inputs]` and `[tokens, outputs]`.
    pub fn add<B: Backend>(&mut self, x: Tensor<B, 2>, y: Tensor<B, 2>) {
        let [tokens, _] = x.dims();
        self.tokens += tokens;
        let transposed = x.clone().transpose();
        add(&mut self.gram, matmul(transposed.clone(), x));
        add(&mut self.moment, matmul(transposed, y));
    }

    /// W = argmin ‖y − x W‖² + λ ‖W‖², row by row, `[inputs, outputs]`. λ is what
    /// `ridge` tokens with inputs of mean size and nothing to explain would weigh. None where the
    /// numbers have no solution.
    pub fn solve(&self, ridge: f64) -> Option<Vec<f64>> {
        let gram = DMatrix::from_column_slice(self.inputs, self.inputs, &self.gram);
        let moment = DMatrix::from_row_slice(self.inputs, self.outputs, &self.moment);
        let lambda = ridge / self.tokens as f64 * gram.trace() / self.inputs as f64;
        let mut matrix = gram;
        for i in 0..self.inputs {
            matrix[(i, i)] += lambda;
        }
        let weights = matrix.cholesky()?.solve(&moment);
        Some(weights.transpose().as_slice().to_vec())
    }
}

fn add<B: Backend>(sum: &mut [f64], product: Tensor<B, 2>) {
    let product = product.into_data();
    for (sum, x) in sum.iter_mut().zip(product.iter::<f64>()) {
        *sum += x;
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tensor};
    use burn_ndarray::NdArray;

    use super::*;

    /// At the least of ‖y − x W‖² + λ ‖W‖², xᵀ (x W − y) + λ W is 0; tokens may come in any pieces.
    #[test]
    fn the_gradient_is_zero_at_the_solution() {
        for (inputs, outputs, tokens) in [(1, 1, 3), (4, 2, 50), (7, 3, 5)] {
            let random = |rows, columns| {
                let shape = [rows, columns];
                Tensor::<NdArray<f64>, 2>::random(shape, Distribution::Default, &Default::default())
            };
            let (x, y) = (random(tokens, inputs), random(tokens, outputs));
            let mut equations = NormalEquations::new(inputs, outputs);
            equations.add(x.clone().narrow(0, 0, 1), y.clone().narrow(0, 0, 1));
            let rest = |t: &Tensor<NdArray<f64>, 2>| t.clone().narrow(0, 1, tokens - 1);
            equations.add(rest(&x), rest(&y));
            let ridge = 0.7;
            let weights = equations.solve(ridge).unwrap();
            let weights = burn::tensor::TensorData::new(weights, [inputs, outputs]);
            let weights = Tensor::from_data(weights, &Default::default());
            let mean_square = x.clone().square().sum().into_scalar() / inputs as f64;
            let lambda = ridge / tokens as f64 * mean_square;
            let missing = x.clone().matmul(weights.clone()) - y;
            let gradient = x.transpose().matmul(missing) + weights * lambda;
            assert!(gradient.abs().max().into_scalar() < 1e-9);
        }
    }
}
