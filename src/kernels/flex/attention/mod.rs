//! Attention over blends of stored keys and values, read where they lie: one pass with an online
//! softmax (arXiv 1805.02867, 2205.14135).
//!
//! Keys and values are read in tiles or parts, by two kernels:
//! [`few`] for decoding, with dot products along the channels and the blend's weights in the queries and
//! the output, and [`many`] for prefill, where every vector holds the same channel of different queries and
//! blends are formed tile by tile.

#[cfg(feature = "train")]
mod backward;
mod few;
mod many;
mod rows;

use std::ops::Range;

#[cfg(feature = "train")]
pub(super) use backward::{Kept, Trained};
use burn::tensor::{Tensor, backend::Backend};
use burn_flex::FlexTensor;

use super::narrow::Rows;
use super::{f32_tensor, tensor};
use crate::kernels::operands::{Seen, Term, Visibility};
use rows::{Blend, Storage};

/// Queries per head up to which [`few`] is faster than [`many`].
const FEW: usize = 16;
/// The score of a hidden key. Finite, so that a query that sees no key at all still gets numbers.
const HIDDEN: f32 = -1e30;

pub(crate) fn attention<B: Backend>(
    query: &Tensor<B, 4>,
    keys: &[Term<B>],
    values: &[Term<B>],
    visibility: &Visibility<B>,
) -> Option<Tensor<B, 4>> {
    let shape @ [batch, n_heads, n_queries, head_dim] = query.dims();
    let [_, n_kv_heads, n_keys, _] = keys[0].source.dims();
    let query = f32_tensor(query)?.to_contiguous();
    let sources =
        |terms: &[Term<B>]| -> Option<Vec<Source>> { terms.iter().map(Source::new).collect() };
    let problem = Problem {
        query: query.as_slice::<f32>()?,
        keys: &sources(keys)?,
        values: &sources(values)?,
        seen: &visibility.seen,
        batch,
        n_heads,
        n_kv_heads,
        n_queries,
        n_keys,
        head_dim,
    };
    #[cfg(test)]
    crate::kernels::work::is_done_by(match n_queries <= FEW {
        true => "few",
        false => "many",
    });
    let output = if n_queries <= FEW {
        few::attention(&problem)
    } else {
        many::attention(&problem).0
    };
    tensor(output, shape)
}

/// One call: `[batch, n_heads, n_queries, head_dim]` over `n_keys`.
struct Problem<'a> {
    query: &'a [f32],
    keys: &'a [Source],
    values: &'a [Source],
    seen: &'a Seen,
    batch: usize,
    n_heads: usize,
    n_kv_heads: usize,
    n_queries: usize,
    n_keys: usize,
    head_dim: usize,
}

impl Problem<'_> {
    /// What a query is multiplied with: scores are powers of 2.
    fn scale(&self) -> f32 {
        std::f32::consts::LOG2_E / (self.head_dim as f32).sqrt()
    }

    /// The rows of one kv head: of every source of the keys, and of the values.
    fn rows(&self, batch: usize, kv_head: usize) -> (Vec<Rows<'_>>, Vec<Rows<'_>>) {
        (
            self.keys
                .iter()
                .map(|s| s.storage.rows(batch, kv_head))
                .collect(),
            self.values
                .iter()
                .map(|s| s.storage.rows(batch, kv_head))
                .collect(),
        )
    }

    /// The keys and the values of one kv head.
    fn blends(&self, batch: usize, kv_head: usize) -> (Blend<'_>, Blend<'_>) {
        (
            Source::blend(self.keys, batch, kv_head),
            Source::blend(self.values, batch, kv_head),
        )
    }

    /// The keys from the first to the last that a query sees; holes may be among them.
    fn visible(&self, batch: usize, query: usize) -> Range<usize> {
        self.seen.keys(batch, query, [self.n_queries, self.n_keys])
    }

    /// Calls `hide` with every index of `queries` and of `keys` of which the one must not see the other.
    #[inline(always)]
    fn for_each_hidden(
        &self,
        batch: usize,
        queries: Range<usize>,
        keys: Range<usize>,
        mut hide: impl FnMut(usize, usize),
    ) {
        if self.all_seen(batch, &queries, &keys) {
            return;
        }
        for (i, query) in queries.enumerate() {
            let visible = self.visible(batch, query);
            let start = visible.start.clamp(keys.start, keys.end);
            (keys.start..start).for_each(|key| hide(i, key - keys.start));
            let end = visible.end.clamp(keys.start, keys.end);
            (end..keys.end).for_each(|key| hide(i, key - keys.start));
            for hole in self.seen.holes_among(batch, self.n_keys) {
                let hole = hole.start.max(keys.start)..hole.end.min(keys.end);
                hole.for_each(|key| hide(i, key - keys.start));
            }
        }
    }

    /// Whether each of the queries sees all of the keys: neither end of what is seen goes back from one
    /// query to the next.
    #[inline(always)]
    fn all_seen(&self, batch: usize, queries: &Range<usize>, keys: &Range<usize>) -> bool {
        let first = self.visible(batch, queries.start);
        let last = self.visible(batch, queries.end - 1);
        let mut holes = self.seen.holes_among(batch, self.n_keys);
        last.start <= keys.start
            && keys.end <= first.end
            && !holes.any(|hole| hole.start < keys.end && keys.start < hole.end)
    }
}

/// A term of a blend.
struct Source {
    storage: Storage,
    /// `[n_kv_heads, head_dim]`; none is one.
    weight: Option<Vec<f32>>,
    head_dim: usize,
}

impl Source {
    fn new<B: Backend>(term: &Term<B>) -> Option<Self> {
        let [_, n_kv_heads, _, head_dim] = term.source.dims();
        let weight = match &term.weight {
            None => None,
            Some(weight) => {
                let weight = weight.clone().expand([1, n_kv_heads, 1, head_dim]);
                let weight: FlexTensor = f32_tensor(&weight)?.to_contiguous();
                Some(weight.as_slice::<f32>()?.to_vec())
            }
        };
        Some(Self {
            storage: Storage::new(&term.source)?,
            weight,
            head_dim,
        })
    }

    /// f32 as it is, in one piece.
    #[cfg(feature = "train")]
    fn plain(tensor: FlexTensor) -> Self {
        let [_, _, _, head_dim] = tensor.layout().shape().dims();
        Self {
            storage: Storage::plain(tensor),
            weight: None,
            head_dim,
        }
    }

    fn blend(sources: &[Self], batch: usize, kv_head: usize) -> Blend<'_> {
        let rows = sources
            .iter()
            .map(|s| (s.storage.rows(batch, kv_head), s.weight(kv_head)));
        Blend::new(rows.collect())
    }

    fn weight(&self, kv_head: usize) -> Option<&[f32]> {
        let weight = self.weight.as_ref()?;
        Some(&weight[kv_head * self.head_dim..][..self.head_dim])
    }
}
