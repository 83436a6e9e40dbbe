//! Rows written where they belong, without the copy of all else that Flex's `slice_assign` makes.

use burn::tensor::{BasicOps, DType, Element, Float, Int, Tensor, TensorPrimitive};
use burn::tensor::{backend::Backend, bf16, f16};
use burn_flex::{Flex, FlexTensor};
use pulp::bytemuck::Pod;

use super::downcast;

type Pair<B, K> = (Tensor<B, 4, K>, Tensor<B, 4, K>);

/// Writes `rows` over positions from `start` of `target`, both `[batch, heads, seq, width]`, in
/// place if nobody else holds the target; or hands both back.
pub(crate) fn assign_rows<B, K>(
    pair: Pair<B, K>,
    start: usize,
) -> Result<Tensor<B, 4, K>, Pair<B, K>>
where
    B: Backend,
    K: BasicOps<B> + 'static,
{
    let pair = match downcast::<_, Pair<Flex, Float>>(pair) {
        Ok((target, rows)) => {
            let (target, rows) = (target.into_primitive(), rows.into_primitive());
            let target = write(target.tensor(), start, &rows.tensor());
            let target = Tensor::<Flex, 4>::from_primitive(TensorPrimitive::Float(target));
            return Ok(downcast(target).unwrap_or_else(|_| unreachable!("B is Flex, K is Float")));
        }
        Err(pair) => pair,
    };
    let (target, rows) = downcast::<_, Pair<Flex, Int>>(pair)?;
    let target = write(target.into_primitive(), start, &rows.into_primitive());
    let target = Tensor::<Flex, 4, Int>::from_primitive(target);
    Ok(downcast(target).unwrap_or_else(|_| unreachable!("B is Flex, K is Int")))
}

fn write(target: FlexTensor, start: usize, rows: &FlexTensor) -> FlexTensor {
    match target.dtype() {
        DType::F64 => write_numbers::<f64>(target, start, rows),
        DType::F16 => write_numbers::<f16>(target, start, rows),
        DType::BF16 => write_numbers::<bf16>(target, start, rows),
        DType::I8 => write_numbers::<i8>(target, start, rows),
        _ => write_numbers::<f32>(target, start, rows),
    }
}

fn write_numbers<E: Element + Pod>(
    mut target: FlexTensor,
    start: usize,
    rows: &FlexTensor,
) -> FlexTensor {
    let [_, _, seq, width] = target.layout().shape()[..] else {
        unreachable!("targets have four dimensions")
    };
    let len = rows.layout().shape()[2] * width;
    let covers_its_memory = target.is_contiguous()
        && target.layout().start_offset() == 0
        && target.bytes().len() == target.layout().num_elements() * size_of::<E>();
    if !covers_its_memory {
        target = target.to_contiguous();
    }
    let rows = rows.to_contiguous();
    let heads = target.storage_mut::<E>().chunks_exact_mut(seq * width);
    for (head, rows) in heads.zip(rows.storage::<E>().chunks_exact(len)) {
        head[start * width..][..len].copy_from_slice(rows);
    }
    target
}
