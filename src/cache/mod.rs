//! The KV cache: preallocated storage for the layers that store, and which slots hold a token.
//!
//! All rows of a batch grow together, one slot per column, so that an append is one write whatever
//! the rows' lengths. A slot that holds no token of a row (left padding, a rejected draft) is a
//! *hole* of that row: nothing attends to it and it takes no position.

mod dtype;
mod error;
mod slot;
mod store;

use std::fmt;
use std::sync::Arc;

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};

use crate::holes::Holes;
use crate::kernels::stored::Stored;
use crate::plan::{HISTORY, KvLayout, KvPart, PerPart};
pub use dtype::CacheDtype;
pub use error::CacheError;
use slot::Slot;
pub(crate) use slot::SlotShape;
pub(crate) use store::{KvStore, Uncached};

/// What a cache must agree with its decoder about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CacheShape {
    pub layout: Arc<KvLayout>,
    /// Of every layer, whether it stores or not.
    pub slots: Arc<[SlotShape]>,
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
        let mut bytes: usize = 0;
        for (layer, slot) in self.slots.iter().enumerate() {
            let head = (slot.head_dim.checked_mul(numbers.size())?).checked_add(scale)?;
            let stored = KvPart::BOTH.map(|part| usize::from(self.layout.stores(part, layer)));
            let tensors = [
                stored.iter().sum(),
                batch,
                slot.n_kv_heads,
                slot.tokens(capacity),
            ];
            let tensors = tensors.into_iter().try_fold(head, usize::checked_mul)?;
            bytes = bytes.checked_add(tensors)?;
        }
        isize::try_from(bytes).is_ok().then_some(bytes)
    }

    /// What the layers that store keys, or values, store.
    fn stored(&self, part: KvPart) -> impl Iterator<Item = &SlotShape> {
        let layers = self.slots.iter().enumerate();
        let stored = layers.filter(move |(layer, _)| self.layout.stores(part, *layer));
        stored.map(|(_, slot)| slot)
    }
}

impl fmt::Display for CacheShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (slot, layer)) in self.slots.iter().zip(self.layout.layers()).enumerate() {
            let SlotShape {
                n_kv_heads,
                head_dim,
                window,
            } = slot;
            let same = i > 0 && self.slots[i - 1] == *slot;
            let separator = if i > 0 { "; " } else { "" };
            f.write_str(separator)?;
            if !same {
                write!(f, "{n_kv_heads} kv heads of {head_dim} channels, ")?;
                if let Some(window) = window {
                    write!(f, "a window of {window} tokens, ")?;
                }
                f.write_str("and layers with ")?;
            }
            write!(f, "{layer}")?;
        }
        Ok(())
    }
}

/// Keys and values of the layers that store, for a batch of rows.
///
/// Should be created with [`FusedKvDecoder::new_cache`](crate::FusedKvDecoder::new_cache) and
/// filled by [`forward_cached`](crate::FusedKvDecoder::forward_cached). Memory for the whole
/// capacity is taken at once, by layers with a sliding window for little more than the window: they
/// forget what no later token sees, but for the last 32 tokens before, so that as many can be taken
/// back. A clone is a fork: it shares memory until either side is appended to, and is then copied.
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
    /// Of the layers that store keys, and of those that store values, bottom first.
    slots: PerPart<Vec<Slot<B>>>,
    /// Per row, below `len`.
    holes: Vec<Holes>,
    len: usize,
    capacity: usize,
    dtype: CacheDtype,
    /// The decoder's float type.
    float: DType,
    device: B::Device,
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
        let slots = PerPart::new(|part| {
            let zeros = |slot: &SlotShape| {
                let tokens = slot.tokens(capacity);
                let dims = [batch, slot.n_kv_heads, tokens, slot.head_dim];
                Slot::new(Stored::zeros(dims, numbers, device))
            };
            shape.stored(part).map(zeros).collect()
        });
        Ok(Self {
            shape,
            slots,
            holes: vec![Holes::default(); batch],
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
            .map(|holes| self.len - holes.slots())
            .collect()
    }

    /// Bytes of all key and value tensors as allocated, used or not.
    pub fn bytes_allocated(&self) -> usize {
        self.slots.iter().flatten().map(Slot::bytes).sum()
    }

    /// Keeps the first `len` slots of every row, e.g. to undo rejected drafts.
    ///
    /// # Errors
    /// [`CacheError::TruncateBeyondLength`] if fewer are in use; [`CacheError::Forgotten`] if a layer
    /// with a sliding window no longer has what the next token would see.
    pub fn truncate(&mut self, len: usize) -> Result<(), CacheError> {
        if len > self.len {
            return Err(CacheError::TruncateBeyondLength {
                requested: len,
                len: self.len,
            });
        }
        let mut holes = self.holes.clone();
        holes.iter_mut().for_each(|holes| holes.clip(len));
        self.keep(len, holes)
    }

    /// Makes `len` slots with these holes all there are.
    fn keep(&mut self, len: usize, holes: Vec<Holes>) -> Result<(), CacheError> {
        if len == 0 {
            self.reset();
            return Ok(());
        }
        for part in KvPart::BOTH {
            for (slot, shape) in self.slots[part].iter().zip(self.shape.stored(part)) {
                let needed = needed(&holes, len, shape.window);
                if slot.first() > needed {
                    return Err(CacheError::Forgotten {
                        requested: len,
                        needed,
                        first: slot.first(),
                    });
                }
            }
        }
        self.len = len;
        self.holes = holes;
        Ok(())
    }

    /// Keeps the first `lens[row]` tokens of each row, e.g. where rows rejected different numbers
    /// of drafts. Slots freed in all rows are free again; those still used by a longer row become
    /// holes.
    ///
    /// # Errors
    /// [`CacheError::BatchMismatch`] if there is not one length per row,
    /// [`CacheError::TruncateBeyondLength`] if a row has fewer tokens, [`CacheError::Forgotten`] as
    /// [`truncate`](Self::truncate).
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
            .map(|(&len, holes)| holes.end_of(len))
            .collect();
        let len = ends.iter().copied().max().unwrap_or(0);
        let mut holes = self.holes.clone();
        for (holes, end) in holes.iter_mut().zip(ends) {
            holes.clip(end);
            holes.push(end..len);
        }
        self.keep(len, holes)
    }

    /// Moves every row's tokens together, so that the slots of rejected drafts and of padding that no
    /// row needs are free again: as many slots are then in use as the longest row has tokens. Rows
    /// that have fewer begin with padding; where all have as many, nothing needs a mask any more.
    ///
    /// Copies what is cached, so do it now and then rather than after every draft. What a layer with a
    /// sliding window keeps beyond its window may become less.
    ///
    /// ```
    /// # use fusedkv::backend::{Flex, FlexDevice};
    /// # use fusedkv::{FusedKvDecoderConfig, KvPlan, Logits, TokenBatch};
    /// # let device = FlexDevice::default();
    /// # let config = FusedKvDecoderConfig::tiny(64, KvPlan::FusedKv { storage_layers: 3 });
    /// # let model = config.init::<Flex>(&device)?;
    /// let mut cache = model.new_cache(2, 8)?;
    /// let rows = TokenBatch::from_rows(&[vec![1, 2, 3], vec![4]], 64, &device)?;
    /// model.forward_cached(rows, &mut cache, Logits::Last)?;
    /// cache.truncate_rows(&[1, 1])?;
    /// assert_eq!((cache.len(), cache.row_lens()), (3, vec![1, 1]));
    /// cache.compact();
    /// assert_eq!((cache.len(), cache.row_lens()), (1, vec![1, 1]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn compact(&mut self) {
        let lens = self.row_lens();
        let len = lens.iter().copied().max().unwrap_or(0);
        if len == self.len {
            return;
        }
        for slot in self.slots.iter_mut().flatten() {
            slot.compact(&self.holes, &lens, self.len);
        }
        for (holes, row_len) in self.holes.iter_mut().zip(lens) {
            *holes = Holes::default();
            holes.push(0..len - row_len);
        }
        self.len = len;
    }

    /// Forgets all tokens; the memory stays.
    pub fn reset(&mut self) {
        self.len = 0;
        self.holes.fill(Holes::default());
        self.slots.iter_mut().flatten().for_each(Slot::reset);
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
        for slot in self.slots.iter_mut().flatten() {
            slot.select(index.clone());
        }
        self.holes = rows.iter().map(|&row| self.holes[row].clone()).collect();
        Ok(())
    }

    /// Cached keys (or values) of a layer, counted from 0, in the decoder's float type, holes
    /// included: `[batch, n_kv_heads, len, head_dim]`, of a layer with a sliding window the last ones
    /// that it keeps. None if the layer stores none.
    pub fn get(&self, part: KvPart, layer: usize) -> Option<Tensor<B, 4>> {
        let slot = self.shape.layout.slot(part, layer)?;
        let stored = self.slots[part][slot].prefix(self.len);
        Some(stored.float(self.float))
    }

    /// Per row, the slots in use that hold no token.
    pub(crate) fn holes(&self) -> &[Holes] {
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

/// The first of `len` slots that the next token sees, of any row, through a window.
fn needed(holes: &[Holes], len: usize, window: Option<usize>) -> usize {
    let Some(window) = window else {
        return 0;
    };
    let starts = holes
        .iter()
        .map(|holes| holes.start_of_last(window - 1, len));
    starts.min().unwrap_or(0)
}

/// The first of `len` slots that is kept for later tokens.
fn kept(holes: &[Holes], len: usize, window: Option<usize>) -> usize {
    needed(holes, len, window).saturating_sub(HISTORY)
}

/// An append under way: one chunk's keys and values of every storing layer.
pub(crate) struct Append<'c, B: Backend> {
    cache: &'c mut FusedKvCache<B>,
    seq: usize,
}

impl<B: Backend> Append<'_, B> {
    /// Makes the new slots count; the first `padding[row]` of them hold no token.
    pub fn commit(self, padding: &[usize]) {
        let start = self.cache.len;
        self.cache.len += self.seq;
        for (holes, &padding) in self.cache.holes.iter_mut().zip(padding) {
            holes.push(start..start + padding);
        }
        let FusedKvCache {
            shape,
            slots,
            holes,
            len,
            ..
        } = self.cache;
        for part in KvPart::BOTH {
            for (slot, shape) in slots[part].iter_mut().zip(shape.stored(part)) {
                slot.shrink(*len, kept(holes, *len, shape.window));
            }
        }
    }

    fn slot(&self, part: KvPart, layer: usize) -> usize {
        let slot = self.cache.shape.layout.slot(part, layer);
        slot.expect("a layout reads and writes what it stores")
    }
}

impl<B: Backend> KvStore<B> for Append<'_, B> {
    fn put(&mut self, part: KvPart, layer: usize, x: Tensor<B, 4>) {
        let slot = self.slot(part, layer);
        let FusedKvCache {
            shape, holes, len, ..
        } = &*self.cache;
        let (len, kept) = (*len, kept(holes, *len, shape.slots[layer].window));
        let seq = self.seq;
        self.cache.slots[part][slot].append(len, kept, seq, x);
    }

    fn get(&self, part: KvPart, layer: usize) -> Stored<B> {
        let slot = self.slot(part, layer);
        self.cache.slots[part][slot].prefix(self.cache.len + self.seq)
    }
}
