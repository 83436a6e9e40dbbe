//! The memory of one layer's keys, or of its values.

use std::ops::Range;

use burn::tensor::{Int, Tensor, backend::Backend};

use crate::holes::Holes;
use crate::kernels::stored::Stored;
use crate::plan::HISTORY;

/// What the memory of one layer must be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotShape {
    pub n_kv_heads: usize,
    pub head_dim: usize,
    /// Tokens that queries see, themselves included; none: all.
    pub window: Option<usize>,
}

impl SlotShape {
    /// Tokens of each row there is memory for, in a cache of `capacity`: of a window those that the
    /// next token sees, [`HISTORY`] before them, and an eighth of the window, so that what is kept
    /// moves to the front once in so many tokens.
    pub fn tokens(&self, capacity: usize) -> usize {
        let bounded = |window: usize| {
            let slack = (window / 8).clamp(32, 512);
            window.saturating_add(HISTORY + slack).min(capacity)
        };
        self.window.map_or(capacity, bounded)
    }
}

/// `[batch, n_kv_heads, tokens, head_dim]` from token `first` on. A layer with a window forgets the
/// tokens before it: what is kept moves to the front when the end is reached, so that keys lie one
/// behind the other at any time.
#[derive(Clone, Debug)]
pub(super) struct Slot<B: Backend> {
    /// Empty only while a write has it: the backend can then write in place, because nobody else
    /// holds the tensor.
    stored: Option<Stored<B>>,
    /// The cache's slot that the first row is.
    first: usize,
    /// Rows, but for the time of a pass that needs more.
    tokens: usize,
}

const WRITTEN: &str = "no write is under way";

impl<B: Backend> Slot<B> {
    pub fn new(stored: Stored<B>) -> Self {
        let [_, _, tokens, _] = stored.dims();
        Self {
            stored: Some(stored),
            first: 0,
            tokens,
        }
    }

    /// The first slot of the cache that is still here.
    pub fn first(&self) -> usize {
        self.first
    }

    /// What is kept of the cache's first `len` slots, sharing the memory.
    pub fn prefix(&self, len: usize) -> Stored<B> {
        let stored = self.stored.clone().expect(WRITTEN);
        stored.narrow(0, len - self.first)
    }

    /// Writes `rows` as the last of `seq` slots behind the cache's first `len`, of which those from
    /// `needed` on are still to be read: in place unless a fork shares the memory, or there is no
    /// room left. Where rows of some slots are missing, nothing before them is read again.
    pub fn append(&mut self, len: usize, needed: usize, seq: usize, rows: Tensor<B, 4>) {
        let [_, _, written, _] = rows.dims();
        if written < seq {
            let tokens = written.max(self.tokens);
            self.replace(|stored| stored.moved(0, 0, tokens).assign(0, rows));
            self.first = len + seq - written;
            return;
        }
        if len - self.first + seq > self.rows() {
            let rows = (len - needed.max(self.first) + seq).max(self.tokens);
            self.keep(len, needed, rows);
        }
        let start = len - self.first;
        self.replace(|stored| stored.assign(start, rows));
    }

    /// Frees what a long append took beyond its share, once its pass has read it.
    pub fn shrink(&mut self, len: usize, needed: usize) {
        let kept = len - needed.max(self.first);
        // Holes among the tokens of a window may take more than its share for a while.
        if self.rows() > self.tokens && kept <= self.tokens {
            self.keep(len, needed, self.tokens);
        }
    }

    /// Moves the tokens of the cache's first `len` slots together, so that those of each row end where
    /// the longest of `lens` does.
    pub fn compact(&mut self, holes: &[Holes], lens: &[usize], len: usize) {
        let longest = lens.iter().copied().max().unwrap_or(0);
        let runs: Vec<_> = holes
            .iter()
            .map(|holes| holes.tokens(self.first..len))
            .collect();
        // From a token on that every row has which has forgotten any.
        let kept = runs.iter().map(|runs| runs.iter().map(Range::len).sum());
        let forgotten = (lens.iter().zip(kept)).filter(|&(&len, kept): &(_, usize)| kept < len);
        let first = forgotten.map(|(_, kept)| longest - kept).max().unwrap_or(0);
        let of_slot = |run: Range<usize>| run.start - self.first..run.end - self.first;
        let runs: Vec<Vec<_>> = (runs.into_iter())
            .map(|runs| runs.into_iter().map(of_slot).collect())
            .collect();
        let rows = self.tokens.max(longest - first);
        self.replace(|stored| stored.gathered(&runs, longest - first, rows));
        self.first = first;
    }

    /// Forgets all tokens.
    pub fn reset(&mut self) {
        self.first = 0;
    }

    /// Makes row i of the batch what row `rows[i]` was.
    pub fn select(&mut self, rows: Tensor<B, 1, Int>) {
        self.replace(|stored| stored.select(rows));
    }

    /// Bytes as allocated.
    pub fn bytes(&self) -> usize {
        self.stored.as_ref().map_or(0, Stored::bytes)
    }

    fn rows(&self) -> usize {
        let [_, _, rows, _] = self.stored.as_ref().expect(WRITTEN).dims();
        rows
    }

    /// Moves the slots from `needed` to `len` to the front of memory for `rows`.
    fn keep(&mut self, len: usize, needed: usize, rows: usize) {
        let needed = needed.max(self.first);
        let start = needed - self.first;
        self.replace(|stored| stored.moved(start, len - needed, rows));
        self.first = needed;
    }

    fn replace(&mut self, change: impl FnOnce(Stored<B>) -> Stored<B>) {
        self.stored = Some(change(self.stored.take().expect(WRITTEN)));
    }
}
