//! RMSNorm and SwiGLU's gate.

use burn::tensor::{Tensor, backend::Backend};
use burn_flex::FlexTensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::pointwise::{CHUNK, gated, normed};
use super::super::{ARCH, simd};
use super::{Operation, flex, record, shaped_as, tracked, untyped};

pub(crate) fn rms_norm<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    gamma: &Tensor<B, 1>,
    epsilon: f64,
) -> Option<Tensor<B, D>> {
    let operation = RmsNorm {
        epsilon: epsilon as f32,
    };
    untyped(record(operation, [tracked(x)?, tracked(gamma)?])?)
}

pub(crate) fn swiglu<B: Backend>(gate: &Tensor<B, 3>, up: &Tensor<B, 3>) -> Option<Tensor<B, 3>> {
    untyped(record(SwiGlu, [tracked(gate)?, tracked(up)?])?)
}

/// `x / √(mean(x²) + ε) ⊙ γ` along the last dimension.
#[derive(Debug)]
struct RmsNorm {
    epsilon: f32,
}

impl Operation<2> for RmsNorm {
    type State = (FlexTensor, FlexTensor);

    fn forward(&self, [x, gamma]: [FlexTensor; 2]) -> Option<(FlexTensor, Self::State)> {
        let (x, gamma) = (x.to_contiguous(), gamma.to_contiguous());
        let output = normed(x.storage(), gamma.storage(), self.epsilon);
        Some((shaped_as(output, &x), (x, gamma)))
    }

    fn backward(
        &self,
        (x, gamma): Self::State,
        gradient: FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let gradient = gradient.to_contiguous();
        let (x_numbers, gradient) = (x.storage::<f32>(), gradient.storage::<f32>());
        let width = gamma.layout().num_elements();
        let chunk = width * (CHUNK / width).max(1);
        let mut x_gradient = vec![0.0; x_numbers.len()];
        let sums: Vec<Vec<f32>> = x_gradient
            .par_chunks_mut(chunk)
            .zip(x_numbers.par_chunks(chunk))
            .zip(gradient.par_chunks(chunk))
            .map(|((x_gradient, x), gradient)| {
                let mut gamma_gradient = vec![0.0; width];
                ARCH.dispatch(NormBackward {
                    x,
                    gamma: gamma.storage(),
                    gradient,
                    epsilon: self.epsilon,
                    x_gradient,
                    gamma_gradient: &mut gamma_gradient,
                });
                gamma_gradient
            })
            .collect();
        let gamma_gradient = sum_in_order(&sums, width);
        [
            Some(shaped_as(x_gradient, &x)),
            Some(flex(gamma_gradient, [width])),
        ]
    }
}

/// The sum of vectors of one width.
pub(super) fn sum_in_order(vectors: &[Vec<f32>], width: usize) -> Vec<f32> {
    let mut sum = vec![0.0; width];
    for vector in vectors {
        sum.iter_mut().zip(vector).for_each(|(sum, x)| *sum += x);
    }
    sum
}

/// With r = 1 / √(mean(x²) + ε) and h = g ⊙ γ, row by row: dx = r · (h − x · r² · mean(h ⊙ x)) and
/// dγ = Σ g ⊙ x · r.
struct NormBackward<'a> {
    x: &'a [f32],
    gamma: &'a [f32],
    gradient: &'a [f32],
    epsilon: f32,
    x_gradient: &'a mut [f32],
    gamma_gradient: &'a mut [f32],
}

impl WithSimd for NormBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.gamma.len();
        let rows = self
            .x
            .chunks_exact(width)
            .zip(self.gradient.chunks_exact(width));
        for ((x, gradient), output) in rows.zip(self.x_gradient.chunks_exact_mut(width)) {
            let mean = simd::dot(simd, x, x) / width as f32;
            let r = (mean + self.epsilon).sqrt().recip();
            for ((output, gradient), gamma) in output.iter_mut().zip(gradient).zip(self.gamma) {
                *output = gradient * gamma;
            }
            let factor = r * r * simd::dot(simd, output, x) / width as f32;
            for (output, x) in output.iter_mut().zip(x) {
                *output = r * (*output - x * factor);
            }
            for ((sum, gradient), x) in self.gamma_gradient.iter_mut().zip(gradient).zip(x) {
                *sum += gradient * x * r;
            }
        }
    }
}

/// `silu(gate) ⊙ up`.
#[derive(Debug)]
struct SwiGlu;

impl Operation<2> for SwiGlu {
    type State = (FlexTensor, FlexTensor);

    fn forward(&self, [gate, up]: [FlexTensor; 2]) -> Option<(FlexTensor, Self::State)> {
        let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
        let output = gated(gate.storage(), up.storage());
        Some((shaped_as(output, &gate), (gate, up)))
    }

    fn backward(
        &self,
        (gate, up): Self::State,
        gradient: FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let gradient = gradient.to_contiguous();
        let n = gate.layout().num_elements();
        let (mut gate_gradient, mut up_gradient) = (vec![0.0; n], vec![0.0; n]);
        gate_gradient
            .par_chunks_mut(CHUNK)
            .zip(up_gradient.par_chunks_mut(CHUNK))
            .zip(gate.storage::<f32>().par_chunks(CHUNK))
            .zip(up.storage::<f32>().par_chunks(CHUNK))
            .zip(gradient.storage::<f32>().par_chunks(CHUNK))
            .for_each(|((((gate_gradient, up_gradient), gate), up), gradient)| {
                ARCH.dispatch(GateBackward {
                    gate,
                    up,
                    gradient,
                    gate_gradient,
                    up_gradient,
                });
            });
        [
            Some(shaped_as(gate_gradient, &gate)),
            Some(shaped_as(up_gradient, &up)),
        ]
    }
}

/// With s = 1 / (1 + e^−gate): d gate = g · up · s · (1 + gate · (1 − s)) and d up = g · gate · s.
struct GateBackward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    gradient: &'a [f32],
    gate_gradient: &'a mut [f32],
    up_gradient: &'a mut [f32],
}

impl WithSimd for GateBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (gates, gate_tail) = S::as_simd_f32s(self.gate);
        let (ups, up_tail) = S::as_simd_f32s(self.up);
        let (gradients, gradient_tail) = S::as_simd_f32s(self.gradient);
        let (d_gates, d_gate_tail) = S::as_mut_simd_f32s(self.gate_gradient);
        let (d_ups, d_up_tail) = S::as_mut_simd_f32s(self.up_gradient);
        let one = simd.splat_f32s(1.0);
        let minus_log2_e = simd.splat_f32s(-std::f32::consts::LOG2_E);
        let inputs = gates.iter().zip(ups).zip(gradients);
        for (((&gate, &up), &gradient), (d_gate, d_up)) in inputs.zip(d_gates.iter_mut().zip(d_ups))
        {
            let power = simd::exp2(simd, simd.mul_f32s(gate, minus_log2_e));
            let s = simd.div_f32s(one, simd.add_f32s(one, power));
            let silu = simd.mul_f32s(gate, s);
            *d_up = simd.mul_f32s(gradient, silu);
            // s · (1 + gate · (1 − s)) = s + silu · (1 − s)
            let slope = simd.mul_add_f32s(silu, simd.sub_f32s(one, s), s);
            *d_gate = simd.mul_f32s(simd.mul_f32s(gradient, up), slope);
        }
        let inputs = gate_tail.iter().zip(up_tail).zip(gradient_tail);
        for (((gate, up), gradient), (d_gate, d_up)) in
            inputs.zip(d_gate_tail.iter_mut().zip(d_up_tail))
        {
            let s = 1.0 / (1.0 + (-gate).exp());
            *d_up = gradient * gate * s;
            *d_gate = gradient * up * s * (1.0 + gate * (1.0 - s));
        }
    }
}
