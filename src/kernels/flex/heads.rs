//! What happens to heads between projections and attention: RoPE, and the exchange of the sequence
//! and head dimensions.

use burn::tensor::{Tensor, backend::Backend};
use burn_flex::FlexTensor;

use super::{f32_tensor, for_each_block, tensor};

/// `[batch, seq, heads, head_dim]` to `[batch, heads, seq, head_dim]`, or back, in memory.
pub(crate) fn swap_heads<B: Backend>(x: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    let shape @ [batch, outer, inner, width] = x.dims();
    let x = f32_tensor(x)?.to_contiguous();
    tensor(swapped(x.storage(), shape), [batch, inner, outer, width])
}

/// `[batch, outer, inner, width]` with `outer` and `inner` exchanged.
pub(super) fn swapped(x: &[f32], [_, outer, inner, width]: [usize; 4]) -> Vec<f32> {
    let mut output = vec![0.0; x.len()];
    for_each_block(&mut output, outer * width, |block, output| {
        let (batch, j) = (block / inner, block % inner);
        for (i, output) in output.chunks_exact_mut(width).enumerate() {
            let start = ((batch * outer + i) * inner + j) * width;
            output.copy_from_slice(&x[start..][..width]);
        }
    });
    output
}

/// RoPE on `x` `[batch, heads, seq, head_dim]` by tables `[1 or batch, 1, seq, head_dim / 2]`; `x`
/// may be the view of another order of dimensions.
pub(crate) fn rope<B: Backend>(
    x: &Tensor<B, 4>,
    cos: &Tensor<B, 4>,
    sin: &Tensor<B, 4>,
) -> Option<Tensor<B, 4>> {
    let shape = x.dims();
    let [rows, _, _, _] = cos.dims();
    let (x, cos, sin) = (f32_tensor(x)?, table(cos)?, table(sin)?);
    let angles = Angles {
        rows,
        cos: cos.storage(),
        sin: sin.storage(),
    };
    tensor(rotated(x, &angles), shape)
}

/// Tables of cos and sin, `[rows, seq, pairs]` with one row for all or one per row of the batch.
pub(super) struct Angles<'a> {
    pub rows: usize,
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

impl Angles<'_> {
    /// Cos and sin of one token.
    pub fn of(&self, batch: usize, token: usize, seq: usize, pairs: usize) -> (&[f32], &[f32]) {
        let row = if self.rows == 1 { 0 } else { batch };
        let start = (row * seq + token) * pairs;
        (&self.cos[start..][..pairs], &self.sin[start..][..pairs])
    }
}

/// RoPE on f32 `[batch, heads, seq, head_dim]`, in memory in that order.
pub(super) fn rotated(x: FlexTensor, angles: &Angles) -> Vec<f32> {
    let [batch, heads, seq, width] = x.layout().shape().dims();
    let pairs = width / 2;
    let x = match x.layout().strides() {
        [b, h, s, 1] if [*b, *h, *s].iter().all(|stride| *stride >= 0) => x,
        _ => x.to_contiguous(),
    };
    let strides: Vec<usize> = x
        .layout()
        .strides()
        .iter()
        .map(|s| s.unsigned_abs())
        .collect();
    let numbers = &x.storage::<f32>()[x.layout().start_offset()..];
    let mut output = vec![0.0; batch * heads * seq * width];
    for_each_block(&mut output, seq * width, |block, output| {
        let (batch, head) = (block / heads, block % heads);
        let first = batch * strides[0] + head * strides[1];
        for (i, output) in output.chunks_exact_mut(width).enumerate() {
            let (low, high) = numbers[first + i * strides[2]..][..width].split_at(pairs);
            let (cos, sin) = angles.of(batch, i, seq, pairs);
            let (low_output, high_output) = output.split_at_mut(pairs);
            for j in 0..pairs {
                low_output[j] = low[j] * cos[j] - high[j] * sin[j];
                high_output[j] = high[j] * cos[j] + low[j] * sin[j];
            }
        }
    });
    output
}

fn table<B: Backend>(table: &Tensor<B, 4>) -> Option<FlexTensor> {
    Some(f32_tensor(table)?.to_contiguous())
}
