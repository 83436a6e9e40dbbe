//! RMSNorm and SwiGLU's gate, each in one pass over memory.

use burn::tensor::{Tensor, backend::Backend};
use pulp::bytemuck::cast_slice;
use pulp::{Simd, WithSimd};

use super::widen::Number as _;
use super::{ARCH, f32_tensor, for_each_block, simd, tensor};

/// Rows that a thread takes at a time hold about this many numbers.
pub(super) const CHUNK: usize = 1 << 14;

pub(crate) fn rms_norm<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    gamma: &Tensor<B, 1>,
    epsilon: f64,
) -> Option<Tensor<B, D>> {
    let (shape, x, gamma) = (x.dims(), f32_tensor(x)?, f32_tensor(gamma)?);
    let (x, gamma) = (x.to_contiguous(), gamma.to_contiguous());
    let output = normed(x.storage(), gamma.storage(), epsilon as f32);
    tensor(output, shape)
}

/// Rows of x / √(mean(x²) + ε) ⊙ γ.
pub(super) fn normed(x: &[f32], gamma: &[f32], epsilon: f32) -> Vec<f32> {
    let mut output = vec![0.0; x.len()];
    let width = gamma.len();
    let chunk = width * (CHUNK / width).max(1);
    for_each_block(&mut output, chunk, |block, output| {
        let start = block * chunk;
        ARCH.dispatch(Norm {
            x: &x[start..][..output.len()],
            gamma,
            epsilon,
            output,
        });
    });
    output
}

pub(crate) fn swiglu<B: Backend>(gate: &Tensor<B, 3>, up: &Tensor<B, 3>) -> Option<Tensor<B, 3>> {
    let (shape, gate, up) = (gate.dims(), f32_tensor(gate)?, f32_tensor(up)?);
    let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
    tensor(gated(gate.storage(), up.storage()), shape)
}

/// g / (1 + e^−g) ⊙ u.
pub(super) fn gated(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut output = vec![0.0; gate.len()];
    for_each_block(&mut output, CHUNK, |block, output| {
        let start = block * CHUNK;
        ARCH.dispatch(Gate {
            gate: &gate[start..][..output.len()],
            up: &up[start..][..output.len()],
            output,
        });
    });
    output
}

/// A thread's part of [`normed`].
struct Norm<'a> {
    x: &'a [f32],
    gamma: &'a [f32],
    epsilon: f32,
    output: &'a mut [f32],
}

impl WithSimd for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.gamma.len();
        for (x, output) in self.x.chunks(width).zip(self.output.chunks_mut(width)) {
            let mean = simd::dot(simd, x, x) / width as f32;
            let scale = (mean + self.epsilon).sqrt().recip();
            for ((output, x), gamma) in output.iter_mut().zip(x).zip(self.gamma) {
                *output = x * scale * gamma;
            }
        }
    }
}

/// A thread's part of [`gated`].
struct Gate<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    output: &'a mut [f32],
}

impl WithSimd for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (gates, gate_tail) = S::as_simd_f32s(self.gate);
        let (ups, up_tail) = S::as_simd_f32s(self.up);
        let (outputs, output_tail) = S::as_mut_simd_f32s(self.output);
        for ((output, &gate), &up) in outputs.iter_mut().zip(gates).zip(ups) {
            *output = gated_vector(simd, gate, up);
        }
        // By the same operations, so that a number's place makes no difference to it.
        let last = gated_vector(
            simd,
            f32::padded(simd, gate_tail),
            f32::padded(simd, up_tail),
        );
        output_tail.copy_from_slice(&cast_slice(&[last])[..output_tail.len()]);
    }
}

#[inline(always)]
fn gated_vector<S: Simd>(simd: S, gate: S::f32s, up: S::f32s) -> S::f32s {
    let minus_log2_e = simd.splat_f32s(-std::f32::consts::LOG2_E);
    let power = simd::exp2(simd, simd.mul_f32s(gate, minus_log2_e));
    let denominator = simd.add_f32s(simd.splat_f32s(1.0), power);
    simd.mul_f32s(simd.div_f32s(gate, denominator), up)
}
