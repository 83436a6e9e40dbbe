//! What a backend may have kernels for.

use burn::tensor::{Tensor, backend::Backend};

use super::operands::{Factor, Term, Visibility};
use super::packed::Packed;

/// The kernels of one backend. Each function computes what the one of its name in
/// [`kernels`](super) documents, or returns none where the tensors are another backend's or of a
/// kind it has no kernel for; what a backend does not fill in, it leaves to Burn's operations.
pub(super) trait Kernels {
    fn tokens_per_pass<B: Backend>() -> Option<usize> {
        None
    }

    /// Does some work where the backend's threads are; the work back where it has none of its own.
    fn among_threads<B: Backend, R: Send, W: FnOnce() -> R + Send>(work: W) -> Result<R, W> {
        Err(work)
    }

    fn linear<B: Backend>(_x: &Tensor<B, 3>, _weight: &Tensor<B, 2>) -> Option<Tensor<B, 3>> {
        None
    }

    fn matmul<B: Backend, const D: usize>(
        _lhs: &Tensor<B, D>,
        _rhs: &Tensor<B, D>,
    ) -> Option<Tensor<B, D>> {
        None
    }

    fn linear_packed<B: Backend>(_x: &Tensor<B, 3>, _weight: &Packed<B>) -> Option<Tensor<B, 3>> {
        None
    }

    fn linear_each<B: Backend>(
        _x: &Tensor<B, 3>,
        _weights: &[Factor<B>],
    ) -> Option<Vec<Tensor<B, 3>>> {
        None
    }

    fn attention<B: Backend>(
        _query: &Tensor<B, 4>,
        _keys: &[Term<B>],
        _values: &[Term<B>],
        _visibility: &Visibility<B>,
    ) -> Option<Tensor<B, 4>> {
        None
    }

    fn rms_norm<B: Backend, const D: usize>(
        _x: &Tensor<B, D>,
        _gamma: &Tensor<B, 1>,
        _epsilon: f64,
    ) -> Option<Tensor<B, D>> {
        None
    }

    fn rope<B: Backend>(
        _x: &Tensor<B, 4>,
        _cos: &Tensor<B, 4>,
        _sin: &Tensor<B, 4>,
    ) -> Option<Tensor<B, 4>> {
        None
    }

    fn swap_heads<B: Backend>(_x: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
        None
    }

    fn swiglu<B: Backend>(_gate: &Tensor<B, 3>, _up: &Tensor<B, 3>) -> Option<Tensor<B, 3>> {
        None
    }
}
