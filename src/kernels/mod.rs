//! Operations of the decoder that have a kernel of our own on some backend.
//!
//! Each function here computes what its generic form does with Burn's operations, and takes that
//! form wherever there is no kernel: the backend is asked at run time, so that `B: Backend` stays
//! the only bound anyone sees. Under autodiff the backend is another type, with kernels that have
//! gradients of their own.

mod attention;
#[cfg(all(feature = "cubecl-attention", any(feature = "wgpu", feature = "cuda")))]
mod cubecl;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "train")]
mod loss;
pub(crate) mod operands;
pub(crate) mod packed;
pub(crate) mod stored;
#[cfg(any(
    feature = "flex",
    all(feature = "cubecl-attention", any(feature = "wgpu", feature = "cuda"))
))]
mod table;
#[cfg(test)]
pub(crate) mod work;

use burn::tensor::activation::silu;
use burn::tensor::{BasicOps, DType, Int, Numeric, Tensor, backend::Backend};

use attention::generic_attention;
pub(crate) use attention::{blended, same_for_all_tokens};
#[cfg(feature = "train")]
pub(crate) use loss::{Lost, Soft, Taught, cross_entropy, lost};
use operands::{Factor, FusionForm, Term, Visibility};
use packed::Packed;
#[cfg(any(
    feature = "flex",
    all(feature = "cubecl-attention", any(feature = "wgpu", feature = "cuda"))
))]
use table::Kernels;

/// What the first table of kernels has that knows the arguments, if any does: every backend's stands
/// here.
macro_rules! kernel {
    ($operation:ident $(::<$backend:ty>)? ($($argument:expr),*)) => {{
        let output = None;
        #[cfg(feature = "flex")]
        let output = output
            .or_else(|| flex::FlexKernels::$operation$(::<$backend>)?($($argument),*));
        #[cfg(all(feature = "cubecl-attention", any(feature = "wgpu", feature = "cuda")))]
        let output = output
            .or_else(|| cubecl::CubeclKernels::$operation$(::<$backend>)?($($argument),*));
        #[cfg(test)]
        if output.is_none() {
            work::is_done_by(concat!(stringify!($operation), ", Burn's"));
        }
        output
    }};
}

/// `x · weight` over the last dimension; `weight` is `[input, output]` in any layout, and is widened
/// to the float type of `x`.
pub(crate) fn linear<B: Backend>(x: Tensor<B, 3>, weight: Tensor<B, 2>) -> Tensor<B, 3> {
    if let Some(output) = own_linear(&x, &weight) {
        return output;
    }
    let weight = weight.cast(x.dtype());
    // The rows of the whole batch are those of one product.
    let [batch, seq, width] = x.dims();
    let [_, output] = weight.dims();
    let rows = x.reshape([1, batch * seq, width]);
    burn::tensor::module::linear(rows, weight, None).reshape([batch, seq, output])
}

/// [`linear`], or [`linear_packed`], by several matrices: one step among threads where they have few
/// rows to share.
pub(crate) fn linear_each<B: Backend>(
    x: &Tensor<B, 3>,
    weights: &[Factor<B>],
) -> Vec<Tensor<B, 3>> {
    if let Some(outputs) = kernel!(linear_each(x, weights)) {
        #[cfg(test)]
        weights
            .iter()
            .for_each(|weight| work::linear(x.dims(), weight.dims()));
        return outputs;
    }
    let product = |weight: &Factor<B>| match weight {
        Factor::Float(weight) => linear(x.clone(), weight.clone()),
        Factor::Packed(weight) => linear_packed(x.clone(), weight),
    };
    weights.iter().map(product).collect()
}

/// `x · embeddingᵀ` over the last dimension, `[batch, seq, width]` times `[vocab_size, width]`: the
/// logits of a decoder whose head is its embedding.
pub(crate) fn tied_head<B: Backend>(x: Tensor<B, 3>, embedding: Tensor<B, 2>) -> Tensor<B, 3> {
    let weight = embedding.transpose();
    if let Some(output) = own_linear(&x, &weight) {
        return output;
    }
    let weight = weight.cast(x.dtype());
    of_all_rows(x, weight)
}

/// [`linear`] by a matrix in fewer bits.
pub(crate) fn linear_packed<B: Backend>(x: Tensor<B, 3>, weight: &Packed<B>) -> Tensor<B, 3> {
    #[cfg(test)]
    work::linear(x.dims(), weight.dims());
    if let Some(output) = kernel!(linear_packed(&x, weight)) {
        return output;
    }
    let weight = weight.clone().widen(x.dtype());
    of_all_rows(x, weight)
}

/// [`matmul`] of all rows of a batch at once.
fn of_all_rows<B: Backend>(x: Tensor<B, 3>, weight: Tensor<B, 2>) -> Tensor<B, 3> {
    let [batch, seq, width] = x.dims();
    let [_, output] = weight.dims();
    matmul(x.reshape([batch * seq, width]), weight).reshape([batch, seq, output])
}

/// [`linear`] by a kernel of our own, where there is one.
#[cfg_attr(not(any(test, feature = "flex")), allow(unused_variables))]
fn own_linear<B: Backend>(x: &Tensor<B, 3>, weight: &Tensor<B, 2>) -> Option<Tensor<B, 3>> {
    #[cfg(test)]
    work::linear(x.dims(), weight.dims());
    kernel!(linear(x, weight))
}

/// `lhs · rhs`: `[…, rows, k]` times `[…, k, n]`; by Burn's operation, where it is that, computed as of
/// two equal rows where there is one.
///
/// Burn's fusion on CubeCL computes a product of one row and the element-wise operations after it
/// in one kernel, which then reads operands of several matrices, or transposed ones, in wrong
/// places: docs/decisions/cubecl-faults.md. A product of two rows takes another kernel. A linear
/// layer's is of one matrix that is not transposed, and needs none of this.
pub(crate) fn matmul<B: Backend, const D: usize>(
    lhs: Tensor<B, D>,
    rhs: Tensor<B, D>,
) -> Tensor<B, D> {
    if let Some(output) = kernel!(matmul(&lhs, &rhs)) {
        return output;
    }
    let rows = D - 2;
    if lhs.dims()[rows] > 1 {
        return lhs.matmul(rhs);
    }
    lhs.repeat_dim(rows, 2).matmul(rhs).narrow(rows, 0, 1)
}

/// Tokens of all rows that a pass does best to take at once, where it matters: what they turn into
/// then stays in the processor's caches.
#[cfg_attr(not(feature = "flex"), allow(clippy::extra_unused_type_parameters))]
pub(crate) fn tokens_per_pass<B: Backend>() -> Option<usize> {
    kernel!(tokens_per_pass::<B>())
}

/// Does some work that has many parts for threads to share where those threads are.
#[cfg_attr(not(feature = "flex"), allow(clippy::extra_unused_type_parameters))]
pub(crate) fn among_threads<B: Backend, R: Send>(work: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "flex")]
    let work = match flex::FlexKernels::among_threads::<B, R, _>(work) {
        Ok(result) => return result,
        Err(work) => work,
    };
    work()
}

/// Attention over terms that may still be blended or not; a `softcap` c makes scores
/// c · tanh(score / c).
pub(crate) fn attention<B: Backend>(
    form: Option<FusionForm>,
    query: Tensor<B, 4>,
    keys: Vec<Term<B>>,
    values: Vec<Term<B>>,
    visibility: &Visibility<B>,
    softcap: Option<f64>,
) -> Tensor<B, 4> {
    #[cfg(test)]
    work::attention(&query, &keys, &values, visibility);
    if softcap.is_none()
        && let Some(output) = kernel!(attention(&query, &keys, &values, visibility))
    {
        return output;
    }
    generic_attention(form, query, keys, values, visibility, softcap)
}

/// `x / √(mean(x²) + ε) ⊙ gamma` over the last dimension (arXiv 1910.07467), the mean in f32.
pub(crate) fn rms_norm<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    gamma: Tensor<B, 1>,
    epsilon: f64,
) -> Tensor<B, D> {
    if let Some(output) = kernel!(rms_norm(&x, &gamma, epsilon)) {
        return output;
    }
    let dtype = x.dtype();
    let squares = x.clone().cast(DType::F32).square();
    let rms = (squares.mean_dim(D - 1) + epsilon).sqrt();
    (x / rms.cast(dtype)) * gamma.unsqueeze()
}

/// RoPE of queries or keys `[batch, heads, seq, head_dim]` by the cos and sin of the angles
/// `[1 or batch, 1, seq, head_dim / 2]`: channel j is rotated with channel j + head_dim/2.
pub(crate) fn rope<B: Backend>(
    x: Tensor<B, 4>,
    cos: Tensor<B, 4>,
    sin: Tensor<B, 4>,
) -> Tensor<B, 4> {
    if let Some(output) = kernel!(rope(&x, &cos, &sin)) {
        return output;
    }
    let [_, _, _, pairs] = cos.dims();
    let low = x.clone().narrow(3, 0, pairs);
    let high = x.narrow(3, pairs, pairs);
    let rotated_low = low.clone() * cos.clone() - high.clone() * sin.clone();
    let rotated_high = high * cos + low * sin;
    Tensor::cat(vec![rotated_low, rotated_high], 3)
}

/// Exchanges the sequence and the head dimension, 1 and 2.
pub(crate) fn swap_heads<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    if let Some(output) = kernel!(swap_heads(&x)) {
        return output;
    }
    x.swap_dims(1, 2)
}

/// `target` with `rows` at positions from `start`, both `[batch, heads, seq, width]`: written in
/// place if nobody else holds the target.
pub(crate) fn assign_rows<B: Backend, K: BasicOps<B> + 'static>(
    target: Tensor<B, 4, K>,
    start: usize,
    rows: Tensor<B, 4, K>,
) -> Tensor<B, 4, K> {
    #[cfg(feature = "flex")]
    let (target, rows) = match flex::assign_rows((target, rows), start) {
        Ok(target) => return target,
        Err(pair) => pair,
    };
    #[cfg(test)]
    work::is_done_by("assign_rows, Burn's");
    let [batch, heads, len, width] = rows.dims();
    target.slice_assign([0..batch, 0..heads, start..start + len, 0..width], rows)
}

/// Rows of `x`, along its first dimension.
///
/// Burn's fusion on CubeCL reads rows of a tensor whose last dimension is 1 from wrong places where
/// wider ones are computed beside them (docs/decisions/cubecl-faults.md), so that theirs are made wider.
pub(crate) fn select_rows<B: Backend, const D: usize, K: Numeric<B> + 'static>(
    x: Tensor<B, D, K>,
    rows: Tensor<B, 1, Int>,
) -> Tensor<B, D, K> {
    let mut dims = x.dims();
    if dims[D - 1] != 1 {
        return x.select(0, rows);
    }
    let width = dims[1..].iter().product();
    let x = x.reshape([dims[0], width]);
    [dims[0]] = rows.dims();
    match width {
        1 => x.repeat_dim(1, 2).select(0, rows).narrow(1, 0, 1),
        _ => x.select(0, rows),
    }
    .reshape(dims)
}

/// `silu(gate) ⊙ up`.
pub(crate) fn swiglu<B: Backend>(gate: Tensor<B, 3>, up: Tensor<B, 3>) -> Tensor<B, 3> {
    if let Some(output) = kernel!(swiglu(&gate, &up)) {
        return output;
    }
    silu(gate) * up
}

/// Σ x², `[1]`.
#[cfg(feature = "train")]
pub(crate) fn sum_of_squares<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, 1> {
    flex::sum_of_squares(&x).unwrap_or_else(|| x.square().sum())
}

/// `x` times a factor, `[1]`, which no thread waits for.
#[cfg(feature = "train")]
pub(crate) fn scaled<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    factor: &Tensor<B, 1>,
) -> Tensor<B, D> {
    flex::scaled(x, factor).unwrap_or_else(|x| x * factor.clone().unsqueeze())
}

/// The numbers of one AdamW step (arXiv 1711.05101) after `time` steps before it.
#[cfg(feature = "train")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWRates {
    beta_1: f32,
    beta_2: f32,
    epsilon: f32,
    /// What remains of the parameter: 1 − lr · decay.
    keep: f32,
    /// lr over the first moment's correction.
    step: f32,
    /// 1 over the root of the second moment's correction.
    root: f32,
}

#[cfg(feature = "train")]
impl AdamWRates {
    pub fn new(lr: f64, [beta_1, beta_2]: [f32; 2], epsilon: f32, decay: f32, time: usize) -> Self {
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(time as f64 + 1.0);
        Self {
            beta_1,
            beta_2,
            epsilon,
            keep: (1.0 - lr * f64::from(decay)) as f32,
            step: (lr / correction(beta_1)) as f32,
            root: correction(beta_2).sqrt().recip() as f32,
        }
    }
}

/// AdamW's update of a parameter by its gradient and both moments, to the parameter and both moments;
/// the tensors back where no kernel takes them.
#[cfg(feature = "train")]
pub(crate) fn adam_w<B: Backend, const D: usize>(
    rates: &AdamWRates,
    tensors: [Tensor<B, D>; 4],
) -> Result<[Tensor<B, D>; 3], [Tensor<B, D>; 4]> {
    flex::adam_w(rates, tensors)
}
