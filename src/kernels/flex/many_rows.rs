//! Products of many rows, by the crate `rten-gemm`.
//!
//! Burn's own operation on Flex has one thread zero the memory of every product and copy it to another
//! place, before the product is computed: up to a third of its time (docs/decisions/products.md).

use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{DType, TensorData};
use burn_flex::{Flex, FlexTensor};
use pulp::Arch;
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB};
use rten_tensor::Matrix;

use super::ARCH;
#[cfg(test)]
use crate::kernels::work::is_done_by;

/// Below this many multiply-adds a product is a single thread's.
const SHARED: usize = 1 << 21;

/// `a · b` of two matrices in any layout, `[rows, depth]` and `[depth, columns]`.
pub(super) fn product(a: &FlexTensor, b: &FlexTensor) -> FlexTensor {
    among_threads(a, b).unwrap_or_else(|| Flex::float_matmul(a.clone(), b.clone()))
}

/// [`product`], shared among threads. None for small ones, and on processors other than those with AVX2 alone,
/// where this was measured.
pub(super) fn among_threads(a: &FlexTensor, b: &FlexTensor) -> Option<FlexTensor> {
    let [rows, depth]: [usize; 2] = a.layout().shape().dims();
    let [_, columns]: [usize; 2] = b.layout().shape().dims();
    if rows * depth * columns < SHARED || !has_avx2_alone() {
        return None;
    }
    let [a, b] = [matrix(a)?, matrix(b)?];
    let mut product = vec![0.0; rows * columns];
    let (a, b) = (GemmInputA::Unpacked(a), GemmInputB::Unpacked(b));
    #[cfg(test)]
    is_done_by("many_rows");
    let gemm = GemmExecutor::<f32>::new();
    gemm.gemm(&mut product, a, b, Default::default()).ok()?;
    Some(FlexTensor::from_data(TensorData::new(
        product,
        [rows, columns],
    )))
}

fn has_avx2_alone() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matches!(*ARCH, Arch::V3(_));
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The numbers of f32 where they lie. None of other types, or where several places are one number.
fn matrix(tensor: &FlexTensor) -> Option<Matrix<'_, f32>> {
    if tensor.dtype() != DType::F32 {
        return None;
    }
    let layout = tensor.layout();
    let numbers = tensor.storage::<f32>().get(layout.start_offset()..)?;
    let &[row, column] = layout.strides() else {
        return None;
    };
    let strides = [usize::try_from(row).ok()?, usize::try_from(column).ok()?];
    Matrix::from_data_with_strides(layout.shape().dims(), numbers, strides).ok()
}
