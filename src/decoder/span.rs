//! Some tokens as layers see them.

use burn::tensor::{Tensor, backend::Backend};

use super::rope::RopeAngles;
use crate::kernels::operands::Visibility;

/// What all layers of one kind share of one chunk of tokens.
#[derive(Clone, Debug)]
pub(super) struct Span<B: Backend> {
    /// None where the kind does not rotate.
    pub angles: Option<RopeAngles<B>>,
    pub visibility: Visibility<B>,
}

/// The last `len` positions of `[batch, seq, width]`.
pub(super) fn last<B: Backend>(x: Tensor<B, 3>, len: usize) -> Tensor<B, 3> {
    let [_, seq, _] = x.dims();
    match seq == len {
        true => x,
        false => x.narrow(1, seq - len, len),
    }
}
