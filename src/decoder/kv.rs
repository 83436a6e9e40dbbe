//! Keys and values on their way from the layers that store them to the layers that read them.

use burn::tensor::{Tensor, backend::Backend};

/// Post-RoPE keys and values of one layer, each `[batch, n_kv_heads, seq, head_dim]`.
#[derive(Clone, Debug)]
pub struct KeyValue<B: Backend> {
    /// The keys.
    pub key: Tensor<B, 4>,
    /// The values.
    pub value: Tensor<B, 4>,
}

impl<B: Backend> KeyValue<B> {
    /// The last `seq` positions.
    pub(crate) fn tail(self, seq: usize) -> Self {
        let tail = |x: Tensor<B, 4>| {
            let [_, _, len, _] = x.dims();
            x.narrow(2, len - seq, seq)
        };
        Self {
            key: tail(self.key),
            value: tail(self.value),
        }
    }
}

/// Where one forward pass puts the keys and values of storing layers, and finds them again.
///
/// `slot` counts the storing layers from the bottom. A slot is read only after it was put.
pub(crate) trait KvStore<B: Backend> {
    /// Takes the new positions' keys and values.
    fn put(&mut self, slot: usize, kv: KeyValue<B>);

    /// All positions' keys and values, the new ones last.
    fn get(&self, slot: usize) -> KeyValue<B>;
}

/// Keys and values of a pass without a cache: the new positions are all there is.
#[derive(Debug)]
pub(crate) struct Uncached<B: Backend>(Vec<KeyValue<B>>);

impl<B: Backend> Uncached<B> {
    pub fn new() -> Self {
        Self(Vec::new())
    }
}

impl<B: Backend> KvStore<B> for Uncached<B> {
    fn put(&mut self, slot: usize, kv: KeyValue<B>) {
        debug_assert_eq!(slot, self.0.len(), "slots fill bottom up");
        self.0.push(kv);
    }

    fn get(&self, slot: usize) -> KeyValue<B> {
        self.0[slot].clone()
    }
}
