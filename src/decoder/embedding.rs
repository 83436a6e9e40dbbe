//! Vectors of tokens.

use burn::module::{Initializer, Module};
use burn::tensor::{DType, Int, Tensor, backend::Backend};

use super::listed::listed;
use super::weight::Weight;

/// A vector for every token.
#[derive(Module, Debug)]
pub struct Embedding<B: Backend> {
    /// `[vocab_size, hidden_size]`.
    pub(crate) weight: Weight<B>,
}

listed!(EmbeddingRecord: weight);

impl<B: Backend> Embedding<B> {
    pub(super) fn new(shape: [usize; 2], initializer: &Initializer, device: &B::Device) -> Self {
        Self {
            weight: Weight::new(shape, initializer, device),
        }
    }

    /// Vectors of type `dtype`.
    ///
    /// # Shapes
    /// - tokens: `[batch, seq]`
    /// - output: `[batch, seq, hidden_size]`
    pub fn forward(&self, tokens: Tensor<B, 2, Int>, dtype: DType) -> Tensor<B, 3> {
        let vectors = match &self.weight {
            Weight::Float(param) => burn::tensor::module::embedding(param.val(), tokens),
            Weight::Packed(packed) => {
                let [batch, seq] = tokens.dims();
                let [_, width] = packed.matrix.dims();
                let rows = packed.matrix.clone().select(tokens.reshape([batch * seq]));
                rows.widen(dtype).reshape([batch, seq, width])
            }
        };
        vectors.cast(dtype)
    }
}
