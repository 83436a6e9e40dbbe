//! The memory of one layer's keys, or of its values.

use burn::tensor::{Int, Tensor, backend::Backend};

use crate::kernels::stored::Stored;

/// `[batch, n_kv_heads, capacity, head_dim]`; empty only while a write has it: the backend can then
/// write in place, because nobody else holds the tensor.
#[derive(Clone, Debug)]
pub(super) struct Slot<B: Backend>(Option<Stored<B>>);

const WRITTEN: &str = "no write is under way";

impl<B: Backend> Slot<B> {
    pub fn new(stored: Stored<B>) -> Self {
        Self(Some(stored))
    }

    /// The first `len` positions, sharing the memory.
    pub fn prefix(&self, len: usize) -> Stored<B> {
        self.0.clone().expect(WRITTEN).narrow(0, len)
    }

    /// Writes `rows` at positions from `start`, in place unless a fork shares the memory.
    pub fn assign(&mut self, start: usize, rows: Tensor<B, 4>) {
        self.replace(|stored| stored.assign(start, rows));
    }

    /// Makes row i of the batch what row `rows[i]` was.
    pub fn select(&mut self, rows: Tensor<B, 1, Int>) {
        self.replace(|stored| stored.select(rows));
    }

    fn replace(&mut self, change: impl FnOnce(Stored<B>) -> Stored<B>) {
        self.0 = Some(change(self.0.take().expect(WRITTEN)));
    }

    /// Bytes as allocated.
    pub fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, Stored::bytes)
    }
}
