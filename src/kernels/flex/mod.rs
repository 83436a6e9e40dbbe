//! Kernels for Burn's Flex backend, which runs on the CPU: f32, SIMD chosen at run time by the
//! processor, threads of rayon's global pool, which is also Flex's, or of the [`team`] that a cached
//! pass has.
//!
//! What they have over Flex's own operations: threads for matrices with few rows, several steps in
//! one pass over memory, and caches read where they lie.

mod assign;
mod attention;
#[cfg(feature = "train")]
mod autodiff;
mod few_rows;
mod heads;
mod linear;
#[cfg(feature = "train")]
mod loss;
mod many_rows;
mod narrow;
mod pointwise;
mod rows;
mod simd;
mod team;
#[cfg(test)]
mod tests;
#[cfg(feature = "train")]
mod update;
mod widen;

use std::any::{Any, TypeId};
use std::sync::LazyLock;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData, TensorPrimitive};
use burn_flex::{Flex, FlexTensor};
use pulp::Arch;
use rayon::prelude::*;

pub(super) use assign::assign_rows;
use attention::attention;
use heads::{rope, swap_heads};
use linear::{linear, linear_each, linear_packed, matmul};
#[cfg(feature = "train")]
pub(super) use loss::{cross_entropy, lost};
use pointwise::{rms_norm, swiglu};
#[cfg(feature = "train")]
pub(super) use update::{adam_w, scaled, sum_of_squares};

use super::operands::{Factor, Term, Visibility};
use super::packed::Packed;
use super::table::Kernels;

/// The instruction set of this processor.
static ARCH: LazyLock<Arch> = LazyLock::new(|| {
    #[cfg(test)]
    if let Some(lesser) = tests::lesser_arch() {
        return lesser;
    }
    Arch::new()
});

/// Below this many numbers, waking a thread takes longer than the work.
const PARALLEL: usize = 1 << 15;

/// Measured on prompts of 8192 tokens: 512 to 1024 are a third faster than all at once.
const TOKENS_PER_PASS: usize = 1024;

/// What the kernel has for Flex, or else the one with a gradient for autodiff on Flex.
macro_rules! plain_or_tracked {
    ($operation:ident($($argument:expr),*)) => {{
        let output = $operation($($argument),*);
        #[cfg(feature = "train")]
        let output = output.or_else(|| autodiff::$operation($($argument),*));
        output
    }};
}

/// The kernels for Flex, and for autodiff on it.
pub(super) struct FlexKernels;

impl Kernels for FlexKernels {
    fn tokens_per_pass<B: Backend>() -> Option<usize> {
        (TypeId::of::<B>() == TypeId::of::<Flex>()).then_some(TOKENS_PER_PASS)
    }

    fn among_threads<B: Backend, R: Send, W: FnOnce() -> R + Send>(work: W) -> Result<R, W> {
        // What tests count is counted by thread.
        match TypeId::of::<B>() == TypeId::of::<Flex>() && !cfg!(test) {
            true => Ok(team::among_threads(work)),
            false => Err(work),
        }
    }

    fn linear<B: Backend>(x: &Tensor<B, 3>, weight: &Tensor<B, 2>) -> Option<Tensor<B, 3>> {
        plain_or_tracked!(linear(x, weight))
    }

    fn matmul<B: Backend, const D: usize>(
        lhs: &Tensor<B, D>,
        rhs: &Tensor<B, D>,
    ) -> Option<Tensor<B, D>> {
        matmul(lhs, rhs)
    }

    fn linear_packed<B: Backend>(x: &Tensor<B, 3>, weight: &Packed<B>) -> Option<Tensor<B, 3>> {
        plain_or_tracked!(linear_packed(x, weight))
    }

    fn linear_each<B: Backend>(
        x: &Tensor<B, 3>,
        weights: &[Factor<B>],
    ) -> Option<Vec<Tensor<B, 3>>> {
        linear_each(x, weights)
    }

    fn attention<B: Backend>(
        query: &Tensor<B, 4>,
        keys: &[Term<B>],
        values: &[Term<B>],
        visibility: &Visibility<B>,
    ) -> Option<Tensor<B, 4>> {
        plain_or_tracked!(attention(query, keys, values, visibility))
    }

    fn rms_norm<B: Backend, const D: usize>(
        x: &Tensor<B, D>,
        gamma: &Tensor<B, 1>,
        epsilon: f64,
    ) -> Option<Tensor<B, D>> {
        plain_or_tracked!(rms_norm(x, gamma, epsilon))
    }

    fn rope<B: Backend>(
        x: &Tensor<B, 4>,
        cos: &Tensor<B, 4>,
        sin: &Tensor<B, 4>,
    ) -> Option<Tensor<B, 4>> {
        plain_or_tracked!(rope(x, cos, sin))
    }

    fn swap_heads<B: Backend>(x: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
        plain_or_tracked!(swap_heads(x))
    }

    fn swiglu<B: Backend>(gate: &Tensor<B, 3>, up: &Tensor<B, 3>) -> Option<Tensor<B, 3>> {
        plain_or_tracked!(swiglu(gate, up))
    }
}

/// Flex's tensor of floats, if that is what `tensor` is.
fn float_tensor<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Option<FlexTensor> {
    let tensor = (tensor as &dyn Any).downcast_ref::<Tensor<Flex, D>>()?;
    match tensor.clone().into_primitive() {
        TensorPrimitive::Float(tensor) => Some(tensor),
        TensorPrimitive::QFloat(_) => None,
    }
}

/// Flex's f32 tensor, if that is what `tensor` is.
fn f32_tensor<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Option<FlexTensor> {
    float_tensor(tensor).filter(|tensor| tensor.dtype() == DType::F32)
}

/// Flex's tensor of integers, if that is what `tensor` is.
fn int_tensor<B: Backend, const D: usize>(tensor: &Tensor<B, D, Int>) -> Option<FlexTensor> {
    let tensor = (tensor as &dyn Any).downcast_ref::<Tensor<Flex, D, Int>>()?;
    Some(tensor.clone().into_primitive())
}

/// A new tensor; `B` is Flex.
fn tensor<B: Backend, const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Option<Tensor<B, D>> {
    typed(FlexTensor::from_data(TensorData::new(values, shape)))
}

/// The tensor itself; `B` is Flex.
fn typed<B: Backend, const D: usize>(tensor: FlexTensor) -> Option<Tensor<B, D>> {
    downcast(Tensor::<Flex, D>::from_primitive(TensorPrimitive::Float(
        tensor,
    )))
    .ok()
}

/// The value itself if it is a `U`, which only its type's parameters hide.
fn downcast<T: 'static, U: 'static>(value: T) -> Result<U, T> {
    let mut value = Some(value);
    let found = (&mut value as &mut dyn Any).downcast_mut::<Option<U>>();
    match (found.and_then(Option::take), value) {
        (Some(found), _) => Ok(found),
        (None, Some(value)) => Err(value),
        (None, None) => unreachable!("it was there"),
    }
}

/// Calls `work` with the number and the slice of every block of `output`, on all threads where
/// there is enough to do.
fn for_each_block(output: &mut [f32], block: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if output.len() < PARALLEL {
        let blocks = output.chunks_mut(block).enumerate();
        blocks.for_each(|(i, output)| work(i, output));
    } else {
        let blocks = output.par_chunks_mut(block).enumerate();
        blocks.for_each(|(i, output)| work(i, output));
    }
}
