//! Keys and values on their way from the layers that store them to the layers that read them.

use std::collections::HashMap;

use burn::tensor::{Tensor, backend::Backend};

use crate::kernels::stored::Stored;
use crate::plan::KvPart;

/// Where one forward pass puts the keys and values of layers that store them, and finds them again.
pub(crate) trait KvStore<B: Backend> {
    /// Takes a layer's keys or values of the last new positions that anybody will read,
    /// `[batch, n_kv_heads, seq, head_dim]`.
    fn put(&mut self, part: KvPart, layer: usize, x: Tensor<B, 4>);

    /// Those that it keeps, the new ones last. Only what was put is asked for.
    fn get(&self, part: KvPart, layer: usize) -> Stored<B>;
}

/// Keys and values of a pass without a cache: the new positions are all there is.
#[derive(Clone, Debug)]
pub(crate) struct Uncached<B: Backend>(HashMap<(KvPart, usize), Tensor<B, 4>>);

impl<B: Backend> Uncached<B> {
    pub fn new() -> Self {
        Self(HashMap::new())
    }

    /// Drops the keys and values that `wanted` does not name by part and layer.
    #[cfg(feature = "convert")]
    pub fn retain(&mut self, wanted: impl Fn(KvPart, usize) -> bool) {
        self.0.retain(|&(part, layer), _| wanted(part, layer));
    }
}

impl<B: Backend> KvStore<B> for Uncached<B> {
    fn put(&mut self, part: KvPart, layer: usize, x: Tensor<B, 4>) {
        self.0.insert((part, layer), x);
    }

    fn get(&self, part: KvPart, layer: usize) -> Stored<B> {
        Stored::Float(self.0[&(part, layer)].clone())
    }
}
