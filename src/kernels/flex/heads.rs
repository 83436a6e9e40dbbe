//! What happens to heads between projections and attention: RoPE, and the exchange of the sequence
//! and head dimensions.

use burn::tensor::{Tensor, backend::Backend};
use burn_flex::FlexTensor;

use super::{f32_tensor, for_each_block, tensor};

/// `[batch, seq, heads, head_dim]` to `[batch, heads, seq, head_dim]`, or back, in memory.
pub(crate) fn swap_heads<B: Backend>(x: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    let [batch, outer, inner, width] = x.dims();
    let x = f32_tensor(x)?.to_contiguous();
    let x = x.as_slice::<f32>()?;
    let mut output = vec![0.0; x.len()];
    for_each_block(&mut output, outer * width, |block, output| {
        let (batch, j) = (block / inner, block % inner);
        for (i, output) in output.chunks_exact_mut(width).enumerate() {
            let start = ((batch * outer + i) * inner + j) * width;
            output.copy_from_slice(&x[start..][..width]);
        }
    });
    tensor(output, [batch, inner, outer, width])
}

/// RoPE on `x` `[batch, heads, seq, head_dim]` by tables `[1 or batch, 1, seq, head_dim / 2]`; `x`
/// may be the view of another order of dimensions.
pub(crate) fn rope<B: Backend>(
    x: &Tensor<B, 4>,
    cos: &Tensor<B, 4>,
    sin: &Tensor<B, 4>,
) -> Option<Tensor<B, 4>> {
    let shape @ [batch, heads, seq, width] = x.dims();
    let [table_rows, _, _, pairs] = cos.dims();
    let (x, cos, sin) = (f32_tensor(x)?, table(cos)?, table(sin)?);
    let (cos, sin) = (cos.as_slice::<f32>()?, sin.as_slice::<f32>()?);
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
        let angles = if table_rows == 1 {
            0
        } else {
            batch * seq * pairs
        };
        for (i, output) in output.chunks_exact_mut(width).enumerate() {
            let (low, high) = numbers[first + i * strides[2]..][..width].split_at(pairs);
            let cos = &cos[angles + i * pairs..][..pairs];
            let sin = &sin[angles + i * pairs..][..pairs];
            let (low_output, high_output) = output.split_at_mut(pairs);
            for j in 0..pairs {
                low_output[j] = low[j] * cos[j] - high[j] * sin[j];
                high_output[j] = high[j] * cos[j] + low[j] * sin[j];
            }
        }
    });
    tensor(output, shape)
}

fn table<B: Backend>(table: &Tensor<B, 4>) -> Option<FlexTensor> {
    Some(f32_tensor(table)?.to_contiguous())
}
