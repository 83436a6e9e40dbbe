//! What layers are given of the tokens themselves (Gemma 3n and 4).

use burn::tensor::{Int, Tensor, backend::Backend};

use super::FusedKvDecoder;
use super::span::last;
use crate::plan::Reach;

impl<B: Backend> FusedKvDecoder<B> {
    /// What every layer that attends is given beside the residual stream, bottom first,
    /// `[batch, queries, layer_input_size]`: of a token's embedding for that layer, t, and of the scaled
    /// embedding x, `(norm(W x / √hidden_size) + √width · t) / √2`. Nothing in blocks without.
    ///
    /// # Shapes
    /// - tokens: `[batch, seq]`
    pub(super) fn layer_inputs(
        &self,
        tokens: Tensor<B, 2, Int>,
        reach: &[Reach],
    ) -> Vec<Tensor<B, 3>> {
        let (Some(embedding), Some(projection), Some(norm), Some(width)) = (
            &self.embed_tokens_per_layer,
            &self.per_layer_model_projection,
            &self.per_layer_projection_norm,
            self.config.block.layer_input_size,
        ) else {
            return Vec::new();
        };
        let x = self.embed(tokens.clone());
        let mut inputs = Vec::new();
        // Layers that attend from the same positions share a product.
        for alike in reach.chunk_by(|a, b| a.queries == b.queries) {
            let queries = alike[0].queries;
            if queries == 0 {
                break;
            }
            let from = inputs.len() * width;
            let columns = from..from + alike.len() * width;
            let [batch, seq] = tokens.dims();
            let tokens = tokens.clone().narrow(1, seq - queries, queries);
            let tokens = embedding.forward(tokens, x.dtype());
            let tokens = tokens.narrow(2, columns.start, columns.len());
            let context = projection.forward_to(columns, last(x.clone(), queries));
            let context = context / (self.config.hidden_size as f64).sqrt();
            let layers = [batch, queries, alike.len(), width];
            let context = norm.forward(context.reshape(layers));
            let tokens = tokens.reshape(layers) * (width as f64).sqrt();
            let sum = (context + tokens) * 0.5f64.sqrt();
            let of = |layer| sum.clone().narrow(2, layer, 1).squeeze_dim(2);
            inputs.extend((0..alike.len()).map(of));
        }
        inputs
    }
}
