//! A tensor's numbers on the host.

use burn::tensor::{Tensor, backend::Backend};

/// All elements in order, as f32; not copied where they are that, and on the host, already.
pub(crate) fn numbers<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    data.into_vec().expect("converted to f32")
}
