//! The KV cache: preallocated storage for the layers that store, and which slots hold a token.
//!
//! All rows of a batch grow together, one slot per column, so that an append is one write whatever
//! the rows' lengths. A slot that holds no token of a row (left padding, a rejected draft) is a
//! *hole* of that row: nothing attends to it and it takes no position.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::decoder::KeyValue;
use crate::decoder::kv::{KvStore, Stored};
use crate::error::CacheError;
use crate::plan::KvLayout;

/// What a cache must agree with its decoder about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CacheShape {
    pub layout: Arc<KvLayout>,
    pub n_kv_heads: usize,
    pub head_dim: usize,
}

impl CacheShape {
    /// Bytes of all keys and values, if one can address as many.
    fn bytes(&self, batch: usize, capacity: usize, numbers: DType) -> Option<usize> {
        // The scale that 8-bit integers come with.
        let scale = if numbers == DType::I8 {
            size_of::<f32>()
        } else {
            0
        };
        let head = self
            .head_dim
            .checked_mul(numbers.size())?
            .checked_add(scale)?;
        [2, self.layout.n_stores(), batch, self.n_kv_heads, capacity]
            .into_iter()
            .try_fold(head, usize::checked_mul)
            .filter(|&bytes| isize::try_from(bytes).is_ok())
    }
}

impl fmt::Display for CacheShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} kv heads of {} channels and layers {:?}",
            self.n_kv_heads,
            self.head_dim,
            self.layout.layers(),
        )
    }
}

/// What numbers a cache keeps; attention computes in the decoder's own float type whatever it is.
///
/// The errors are of one stored number x, whatever the plan; docs/benchmarks.md has what they do to
/// a trained model's perplexity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheDtype {
    /// The decoder's float type: exact.
    #[default]
    Model,
    /// 4 bytes.
    F32,
    /// 2 bytes; an error of at most |x| · 2⁻¹¹ for |x| from 6.1e-5 to 65504, the largest.
    F16,
    /// 2 bytes; an error of at most |x| · 2⁻⁸.
    Bf16,
    /// 1 byte, and an f32 scale per token and head: an error of at most 1/254 of the head's largest
    /// magnitude at that token.
    Int8,
}

impl CacheDtype {
    /// Every type with its name, as in JSON and on command lines.
    pub const NAMES: [(&str, Self); 5] = [
        ("model", Self::Model),
        ("f32", Self::F32),
        ("f16", Self::F16),
        ("bf16", Self::Bf16),
        ("int8", Self::Int8),
    ];

    /// The type of the numbers kept for a decoder of floats `model`.
    fn numbers(self, model: DType) -> DType {
        match self {
            Self::Model => model,
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Int8 => DType::I8,
        }
    }

    /// That a backend whose decoders are of floats `model` can keep such numbers.
    pub(crate) fn check<B: Backend>(
        self,
        model: DType,
        device: &B::Device,
    ) -> Result<DType, CacheError> {
        let numbers = self.numbers(model);
        if B::supports_dtype(device, numbers) {
            return Ok(numbers);
        }
        Err(CacheError::UnsupportedDtype {
            dtype: self,
            backend: B::name(device),
        })
    }
}

impl fmt::Display for CacheDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Self::NAMES.iter().find(|(_, dtype)| dtype == self);
        f.pad(known.map_or("unnamed", |(name, _)| name))
    }
}

impl FromStr for CacheDtype {
    type Err = CacheError;

    fn from_str(name: &str) -> Result<Self, CacheError> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, dtype)| *dtype)
            .ok_or_else(|| CacheError::UnknownDtype(name.to_owned()))
    }
}

/// Keys and values of the layers that store, for a batch of rows.
///
/// Should be created with [`FusedKvDecoder::new_cache`](crate::FusedKvDecoder::new_cache) and
/// filled by [`forward_cached`](crate::FusedKvDecoder::forward_cached). Memory for the whole
/// capacity is taken at once. A clone is a fork: it shares memory until either side is appended to,
/// and is then copied.
///
/// Every error leaves the cache as it was.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::{FusedKvDecoderConfig, KvPlan, Logits, TokenBatch};
///
/// let device = FlexDevice::default();
/// let config = FusedKvDecoderConfig::tiny(64, KvPlan::FusedKv { storage_layers: 3 });
/// let model = config.init::<Flex>(&device)?;
/// let mut cache = model.new_cache(2, 8)?;
/// let prompts = TokenBatch::from_rows(&[vec![1, 2, 3], vec![4]], 64, &device)?;
/// model.forward_cached(prompts, &mut cache, Logits::Last)?;
/// assert_eq!((cache.len(), cache.row_lens()), (3, vec![3, 1]));
///
/// cache.select_rows(&[1])?; // the first row is finished
/// assert_eq!((cache.batch(), cache.row_lens()), (1, vec![1]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct FusedKvCache<B: Backend> {
    shape: CacheShape,
    /// `[batch, n_kv_heads, capacity, head_dim]` each; the first `len` slots are in use.
    slots: Vec<Slot<B>>,
    /// Per row, the slots below `len` that hold no token: sorted, disjoint, not empty.
    holes: Vec<Vec<Range<usize>>>,
    len: usize,
    capacity: usize,
    dtype: CacheDtype,
    /// The decoder's float type.
    float: DType,
    device: B::Device,
}

/// One layer's storage. `None` only while a write has it: the backend can then write in place,
/// because nobody else holds the tensor.
#[derive(Clone, Debug)]
struct Slot<B: Backend> {
    key: Option<Stored<B>>,
    value: Option<Stored<B>>,
}

impl<B: Backend> FusedKvCache<B> {
    pub(crate) fn new(
        shape: CacheShape,
        batch: usize,
        capacity: usize,
        dtype: CacheDtype,
        float: DType,
        device: &B::Device,
    ) -> Result<Self, CacheError> {
        for (field, value) in [("batch", batch), ("capacity", capacity)] {
            if value == 0 {
                return Err(CacheError::Zero { field });
            }
        }
        let numbers = dtype.check::<B>(float, device)?;
        if shape.bytes(batch, capacity, numbers).is_none() {
            return Err(CacheError::TooLarge { batch, capacity });
        }
        let dims = [batch, shape.n_kv_heads, capacity, shape.head_dim];
        let zeros = || Some(Stored::zeros(dims, numbers, device));
        let slots = (0..shape.layout.n_stores())
            .map(|_| Slot {
                key: zeros(),
                value: zeros(),
            })
            .collect();
        Ok(Self {
            shape,
            slots,
            holes: vec![Vec::new(); batch],
            len: 0,
            capacity,
            dtype,
            float,
            device: device.clone(),
        })
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.holes.len()
    }

    /// Slots in use per row, padding and rejected drafts included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Slots allocated per row.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Slots left per row.
    pub fn remaining(&self) -> usize {
        self.capacity - self.len
    }

    /// What numbers it keeps.
    pub fn dtype(&self) -> CacheDtype {
        self.dtype
    }

    /// Tokens cached per row; the next token's position.
    pub fn row_lens(&self) -> Vec<usize> {
        self.holes
            .iter()
            .map(|holes| self.len - holes.iter().map(ExactSizeIterator::len).sum::<usize>())
            .collect()
    }

    /// Bytes of all key and value tensors as allocated, used or not.
    pub fn bytes_allocated(&self) -> usize {
        let stored = |slot: &'_ Slot<B>| {
            slot.key
                .iter()
                .chain(&slot.value)
                .map(Stored::bytes)
                .sum::<usize>()
        };
        self.slots.iter().map(stored).sum()
    }

    /// Keeps the first `len` slots of every row, e.g. to undo rejected drafts.
    ///
    /// # Errors
    /// [`CacheError::TruncateBeyondLength`] if fewer are in use.
    pub fn truncate(&mut self, len: usize) -> Result<(), CacheError> {
        if len > self.len {
            return Err(CacheError::TruncateBeyondLength {
                requested: len,
                len: self.len,
            });
        }
        self.len = len;
        for holes in &mut self.holes {
            clip(holes, len);
        }
        Ok(())
    }

    /// Keeps the first `lens[row]` tokens of each row, e.g. where rows rejected different numbers
    /// of drafts. Slots freed in all rows are free again; those still used by a longer row become
    /// holes.
    ///
    /// # Errors
    /// [`CacheError::BatchMismatch`] if there is not one length per row,
    /// [`CacheError::TruncateBeyondLength`] if a row has fewer tokens.
    pub fn truncate_rows(&mut self, lens: &[usize]) -> Result<(), CacheError> {
        self.check_batch(lens.len())?;
        for (&requested, len) in lens.iter().zip(self.row_lens()) {
            if requested > len {
                return Err(CacheError::TruncateBeyondLength { requested, len });
            }
        }
        let ends: Vec<usize> = lens
            .iter()
            .zip(&self.holes)
            .map(|(&len, holes)| end_of(len, holes))
            .collect();
        self.len = ends.iter().copied().max().unwrap_or(0);
        for (holes, end) in self.holes.iter_mut().zip(ends) {
            clip(holes, end);
            push_hole(holes, end..self.len);
        }
        Ok(())
    }

    /// Forgets all tokens; the memory stays.
    pub fn reset(&mut self) {
        self.len = 0;
        self.holes.iter_mut().for_each(Vec::clear);
    }

    /// Makes row `i` what row `rows[i]` was: reorders, repeats (beam search) or drops (finished)
    /// rows. The batch becomes `rows.len()`; memory is copied.
    ///
    /// # Errors
    /// [`CacheError::Zero`] if `rows` is empty, [`CacheError::NoSuchRow`] if one does not exist.
    pub fn select_rows(&mut self, rows: &[usize]) -> Result<(), CacheError> {
        if rows.is_empty() {
            return Err(CacheError::Zero { field: "batch" });
        }
        let batch = self.batch();
        if let Some(&row) = rows.iter().find(|&&row| row >= batch) {
            return Err(CacheError::NoSuchRow { row, batch });
        }
        let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let index = TensorData::new(index, [rows.len()]);
        let index = Tensor::<B, 1, Int>::from_data(index, &self.device);
        for slot in &mut self.slots {
            for stored in [&mut slot.key, &mut slot.value] {
                *stored = Some(take(stored).select(index.clone()));
            }
        }
        self.holes = rows.iter().map(|&row| self.holes[row].clone()).collect();
        Ok(())
    }

    /// Cached keys and values of a storing layer in the decoder's float type, holes included,
    /// `[batch, n_kv_heads, len, head_dim]` each; `slot` counts storing layers from the bottom.
    ///
    /// # Panics
    /// If `slot` is not below the number of storing layers.
    pub fn get(&self, slot: usize) -> KeyValue<B> {
        let Slot { key, value } = &self.slots[slot];
        KeyValue {
            key: prefix(key, self.len).float(self.float),
            value: prefix(value, self.len).float(self.float),
        }
    }

    /// Per row, the slots in use that hold no token.
    pub fn holes(&self) -> &[Vec<Range<usize>>] {
        &self.holes
    }

    /// Whether `[batch, seq]` tokens of a decoder that needs `shape` can be appended.
    pub(crate) fn check(
        &self,
        shape: &CacheShape,
        [batch, seq]: [usize; 2],
    ) -> Result<(), CacheError> {
        if *shape != self.shape {
            return Err(CacheError::PlanMismatch {
                cache: self.shape.to_string(),
                decoder: shape.to_string(),
            });
        }
        self.check_batch(batch)?;
        if seq > self.remaining() {
            return Err(CacheError::OverCapacity {
                requested: seq,
                len: self.len,
                capacity: self.capacity,
            });
        }
        Ok(())
    }

    /// Starts an append of `seq` checked slots; nothing counts until it is committed.
    pub(crate) fn append(&mut self, seq: usize) -> Append<'_, B> {
        Append { cache: self, seq }
    }

    fn check_batch(&self, found: usize) -> Result<(), CacheError> {
        let expected = self.batch();
        if found != expected {
            return Err(CacheError::BatchMismatch { found, expected });
        }
        Ok(())
    }
}

/// The first `len` positions, sharing the memory.
fn prefix<B: Backend>(stored: &Option<Stored<B>>, len: usize) -> Stored<B> {
    stored
        .clone()
        .expect("no write is under way")
        .narrow(0, len)
}

/// An append under way: one chunk's keys and values of every storing layer.
pub(crate) struct Append<'c, B: Backend> {
    cache: &'c mut FusedKvCache<B>,
    seq: usize,
}

impl<B: Backend> Append<'_, B> {
    fn prefix(&self, stored: &Option<Stored<B>>) -> Stored<B> {
        prefix(stored, self.cache.len + self.seq)
    }

    /// Makes the new slots count; the first `padding[row]` of them hold no token.
    pub fn commit(self, padding: &[usize]) {
        let start = self.cache.len;
        self.cache.len += self.seq;
        for (holes, &padding) in self.cache.holes.iter_mut().zip(padding) {
            push_hole(holes, start..start + padding);
        }
    }
}

impl<B: Backend> KvStore<B> for Append<'_, B> {
    fn put(&mut self, slot: usize, kv: KeyValue<B>) {
        let start = self.cache.len;
        let slot = &mut self.cache.slots[slot];
        for (stored, rows) in [(&mut slot.key, kv.key), (&mut slot.value, kv.value)] {
            *stored = Some(take(stored).assign(start, rows));
        }
    }

    fn key(&self, slot: usize) -> Stored<B> {
        self.prefix(&self.cache.slots[slot].key)
    }

    fn value(&self, slot: usize) -> Stored<B> {
        self.prefix(&self.cache.slots[slot].value)
    }
}

fn take<B: Backend>(stored: &mut Option<Stored<B>>) -> Stored<B> {
    stored.take().expect("no write is under way")
}

/// Drops the parts of holes at or above `len`.
fn clip(holes: &mut Vec<Range<usize>>, len: usize) {
    holes.retain_mut(|hole| {
        hole.end = hole.end.min(len);
        hole.start < hole.end
    });
}

/// Adds a hole above the others.
fn push_hole(holes: &mut Vec<Range<usize>>, hole: Range<usize>) {
    match holes.last_mut() {
        _ if hole.is_empty() => {}
        Some(last) if last.end == hole.start => last.end = hole.end,
        _ => holes.push(hole),
    }
}

/// The slot after a row's first `tokens` tokens.
fn end_of(tokens: usize, holes: &[Range<usize>]) -> usize {
    let mut end = tokens;
    for hole in holes {
        if hole.start >= end {
            break;
        }
        end += hole.len();
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_skips_the_holes_before_it() {
        let holes = [0..2, 3..4];
        assert_eq!(end_of(0, &holes), 0);
        assert_eq!(end_of(1, &holes), 3);
        assert_eq!(end_of(2, &holes), 5);
        assert_eq!(end_of(3, &[]), 3);
    }

    #[test]
    fn holes_merge_and_clip() {
        let mut holes = Vec::new();
        push_hole(&mut holes, 0..2);
        push_hole(&mut holes, 2..2);
        push_hole(&mut holes, 2..3);
        push_hole(&mut holes, 5..8);
        assert_eq!(holes, [0..3, 5..8]);
        clip(&mut holes, 6);
        assert_eq!(holes, [0..3, 5..6]);
        clip(&mut holes, 5);
        assert_eq!((holes.len(), &holes[0]), (1, &(0..3)));
    }
}
