//! What products and attention are computed of.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Bool, Tensor, TensorData, backend::Backend};

use super::packed::Packed;
use super::stored::Stored;
use crate::holes::Holes;

/// A matrix `[input, output]` that rows are multiplied with.
#[derive(Clone, Debug)]
pub(crate) enum Factor<B: Backend> {
    /// In any layout.
    Float(Tensor<B, 2>),
    Packed(Packed<B>),
}

#[cfg(test)]
impl<B: Backend> Factor<B> {
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Float(weight) => weight.dims(),
            Self::Packed(weight) => weight.dims(),
        }
    }
}

/// How attention treats a blend of sources; both give the same result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FusionForm {
    /// Blend keys and values first.
    Materialised,
    /// Move the weights to the query and the output.
    Absorbed,
}

/// A term of a blend.
#[derive(Clone, Debug)]
pub(crate) struct Term<B: Backend> {
    /// `[batch, n_kv_heads, keys, head_dim]`.
    pub source: Stored<B>,
    /// Broadcastable to the source; none is one.
    pub weight: Option<Tensor<B, 4>>,
}

impl<B: Backend> Term<B> {
    pub fn plain(source: Tensor<B, 4>) -> Self {
        Self {
            source: Stored::Float(source),
            weight: None,
        }
    }
}

/// Which keys each query sees: those up to its own position, of them the last of a window, and none
/// that holds no token. The last query stands at the last key.
#[derive(Clone, Debug)]
pub(crate) struct Visibility<B: Backend> {
    pub seen: Seen,
    /// What the backends' own operations take, as it was last asked for.
    mask: RefCell<Option<Mask<B>>>,
}

/// [`Visibility::mask`] for so many queries and keys.
#[derive(Clone, Debug)]
struct Mask<B: Backend> {
    of: [usize; 2],
    hidden: Option<Tensor<B, 4, Bool>>,
}

/// [`Visibility`] as data.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Tokens a query sees, itself included; none: all.
    window: Option<usize>,
    /// Per row the slots that hold no token; no rows: every slot of every row holds one.
    holes: Arc<[Holes]>,
    /// Slots in all, those included that come before the first key.
    slots: usize,
}

impl<B: Backend> Visibility<B> {
    /// Every key up to a query's own.
    pub fn causal() -> Self {
        Self::new(None, Arc::default(), 0)
    }

    /// `holes` are the slots without a token among all `slots`, row by row; no rows: none has any.
    pub fn new(window: Option<usize>, holes: Arc<[Holes]>, slots: usize) -> Self {
        Self::of(Seen {
            window,
            holes,
            slots,
        })
    }

    fn of(seen: Seen) -> Self {
        Self {
            seen,
            mask: RefCell::default(),
        }
    }

    /// The same on another backend.
    #[cfg(all(
        test,
        feature = "cubecl-attention",
        any(feature = "wgpu", feature = "cuda")
    ))]
    pub fn on<C: Backend>(&self) -> Visibility<C> {
        Visibility::of(self.seen.clone())
    }

    /// `true` where a query does not see a key, `[1 or batch, 1, queries, keys]`; none where every
    /// query sees every key.
    pub fn mask(&self, shape: [usize; 2], device: &B::Device) -> Option<Tensor<B, 4, Bool>> {
        // The layers of a pass ask for the same one, until they narrow to the last positions.
        let mut known = self.mask.borrow_mut();
        match &*known {
            Some(mask) if mask.of == shape => mask.hidden.clone(),
            _ => {
                let hidden = self.new_mask(shape, device);
                *known = Some(Mask {
                    of: shape,
                    hidden: hidden.clone(),
                });
                hidden
            }
        }
    }

    fn new_mask(
        &self,
        [queries, keys]: [usize; 2],
        device: &B::Device,
    ) -> Option<Tensor<B, 4, Bool>> {
        let seen = &self.seen;
        if seen.holes.is_empty() {
            let offset = keys as i64 - queries as i64;
            let future = || Tensor::<B, 2, Bool>::tril_mask([queries, keys], offset, device);
            let past = |window: usize| {
                let offset = offset + 1 - window as i64;
                Tensor::<B, 2, Bool>::triu_mask([queries, keys], offset, device)
            };
            let mask = match (queries > 1, seen.window.filter(|&window| window < keys)) {
                (false, None) => return None,
                (true, None) => future(),
                (false, Some(window)) => past(window),
                (true, Some(window)) => future().bool_or(past(window)),
            };
            return Some(mask.unsqueeze());
        }
        let mut hidden = vec![true; seen.holes.len() * queries * keys];
        let rows = hidden.chunks_mut(keys).enumerate();
        for (i, hidden) in rows {
            let (row, query) = (i / queries, i % queries);
            hidden[seen.keys(row, query, [queries, keys])].fill(false);
            for hole in seen.holes_among(row, keys) {
                hidden[hole].fill(true);
            }
        }
        let shape = [seen.holes.len(), 1, queries, keys];
        Some(Tensor::from_data(TensorData::new(hidden, shape), device))
    }
}

impl Seen {
    /// The keys from the first to the last that a query of a row sees; holes may be among them, and there is
    /// always one, if only the query's own, which padding is. Neither end goes back from a query to the next.
    pub fn keys(&self, row: usize, query: usize, [queries, keys]: [usize; 2]) -> Range<usize> {
        let end = keys - queries + query + 1;
        let start = match (self.window, self.holes.get(row)) {
            (None, _) => 0,
            (Some(window), None) => end.saturating_sub(window),
            (Some(window), Some(holes)) => {
                let before = self.slots - keys;
                let start = holes.start_of_last(window, before + end);
                start.saturating_sub(before).min(end - 1)
            }
        };
        start..end
    }

    /// Whether queries see just the keys up to their own, of `keys` in all.
    pub fn is_causal(&self, keys: usize) -> bool {
        self.holes.is_empty() && self.window.is_none_or(|window| window >= keys)
    }

    /// The first key that any query sees, of the first query in every row.
    #[cfg(any(feature = "flex", feature = "cubecl-attention"))]
    pub fn first_key(&self, shape: [usize; 2]) -> usize {
        let rows = 0..self.holes.len().max(1);
        let starts = rows.map(|row| self.keys(row, 0, shape).start);
        starts.min().unwrap_or(0)
    }

    /// The holes of a row among its last `keys` slots, counted from the first of them.
    pub fn holes_among(&self, row: usize, keys: usize) -> impl Iterator<Item = Range<usize>> {
        let before = self.slots.saturating_sub(keys);
        let holes = self.holes.get(row).map_or(&[][..], Holes::ranges);
        holes
            .iter()
            .map(move |hole| hole.start.saturating_sub(before)..hole.end.saturating_sub(before))
            .filter(|hole| !hole.is_empty())
    }
}
