//! Few queries over many keys: every query of a kv head's group with every key by a dot product.
//! The limit is how fast keys and values come from memory, so each is read from it once for all of them,
//! and widened on the way where it is no f32 ([`narrow`](super::super::narrow)).

use std::ops::Range;

use pulp::bytemuck::cast_slice;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::{ARCH, PARALLEL, simd};
use super::{HIDDEN, Problem};

/// Keys of a head that one thread goes through. Fixed, so that sums are formed in one order whatever
/// the number of threads or rows: long enough for the processor to foresee what is read next and to
/// be worth a thread and its merging, few enough for all threads of a machine to have some.
const PART: usize = 512;

/// `[batch, n_heads, n_queries, head_dim]`.
pub(super) fn attention(problem: &Problem) -> Vec<f32> {
    let heads = problem.batch * problem.n_kv_heads;
    let first = problem.seen.first_key([problem.n_queries, problem.n_keys]);
    let tasks: Vec<_> = (0..heads)
        .flat_map(|head| {
            let starts = (first..problem.n_keys).step_by(PART);
            starts.map(move |start| (head, start..(start + PART).min(problem.n_keys)))
        })
        .collect();
    let attend = |(head, keys): &(usize, Range<usize>)| attend(problem, *head, keys.clone());
    let work = heads * (problem.n_keys - first) * problem.head_dim;
    let parts: Vec<Softmax> = if work < PARALLEL {
        tasks.iter().map(attend).collect()
    } else {
        tasks.par_iter().map(attend).collect()
    };
    let mut output = vec![0.0; problem.query.len()];
    let group = problem.query.len() / heads;
    let parts_per_head = parts.len() / heads;
    for (head, (output, parts)) in output
        .chunks_mut(group)
        .zip(parts.chunks(parts_per_head))
        .enumerate()
    {
        merge(problem, head % problem.n_kv_heads, parts, output);
    }
    output
}

/// What some keys give to the queries of a kv head; `head` counts those of all rows. A function by itself, because
/// a closure is compiled for each of its callers.
fn attend(problem: &Problem, head: usize, keys: Range<usize>) -> Softmax {
    let (batch, kv_head) = (head / problem.n_kv_heads, head % problem.n_kv_heads);
    ARCH.dispatch(Part::new(problem, batch, kv_head, keys))
}

/// What some of the keys give to each query of a group.
struct Softmax {
    /// The largest score.
    max: Vec<f32>,
    /// Σ 2^(score − max).
    sum: Vec<f32>,
    /// Σ 2^(score − max) · value: `[values' sources, queries, head_dim]`.
    weighted: Vec<f32>,
}

/// Adds up what the parts found, each in terms of its own largest score.
fn merge(problem: &Problem, kv_head: usize, parts: &[Softmax], output: &mut [f32]) {
    let head_dim = problem.head_dim;
    let queries = output.len() / head_dim;
    for (query, output) in output.chunks_mut(head_dim).enumerate() {
        let max = parts.iter().map(|part| part.max[query]);
        let max = max.fold(f32::NEG_INFINITY, f32::max);
        let factors = parts.iter().map(|part| (part.max[query] - max).exp2());
        let sum: f32 = factors
            .clone()
            .zip(parts)
            .map(|(f, part)| f * part.sum[query])
            .sum();
        for (factor, part) in factors.zip(parts) {
            for (i, source) in problem.values.iter().enumerate() {
                let weighted = &part.weighted[(i * queries + query) * head_dim..][..head_dim];
                let weight = source.weight(kv_head);
                add_weighted(output, weighted.iter().copied(), factor / sum, weight);
            }
        }
    }
}

/// One thread's work: some of the keys of one kv head.
struct Part<'a> {
    problem: &'a Problem<'a>,
    batch: usize,
    kv_head: usize,
    keys: Range<usize>,
}

impl<'a> Part<'a> {
    fn new(problem: &'a Problem<'a>, batch: usize, kv_head: usize, keys: Range<usize>) -> Self {
        Self {
            problem,
            batch,
            kv_head,
            keys,
        }
    }

    /// The group's queries for each source of the keys, `[sources, queries, head_dim]`: scaled, and
    /// times the source's weight.
    fn queries(&self) -> Vec<f32> {
        let problem = self.problem;
        let group = problem.n_heads / problem.n_kv_heads * problem.n_queries * problem.head_dim;
        let start = (self.batch * problem.n_kv_heads + self.kv_head) * group;
        let query = &problem.query[start..][..group];
        let mut queries = vec![0.0; problem.keys.len() * group];
        for (source, queries) in problem.keys.iter().zip(queries.chunks_mut(group)) {
            let weight = source.weight(self.kv_head);
            let rows = query.chunks(problem.head_dim);
            for (query, row) in queries.chunks_mut(problem.head_dim).zip(rows) {
                add_weighted(query, row.iter().copied(), problem.scale(), weight);
            }
        }
        queries
    }
}

impl WithSimd for Part<'_> {
    type Output = Softmax;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Softmax {
        let problem = self.problem;
        let head_dim = problem.head_dim;
        let queries = self.queries();
        let n_rows = queries.len() / problem.keys.len() / head_dim;
        let (keys, values) = problem.rows(self.batch, self.kv_head);
        let mut scores = vec![0.0; n_rows * PART];
        for (keys, queries) in keys.iter().zip(queries.chunks(n_rows * head_dim)) {
            keys.add_products(simd, queries, self.keys.clone(), &mut scores, PART);
        }
        let (mut max, mut sum) = (vec![HIDDEN; n_rows], vec![0.0; n_rows]);
        for (row, scores) in scores.chunks_mut(PART).enumerate() {
            let scores = &mut scores[..self.keys.len()];
            let (query, keys) = (row % problem.n_queries, self.keys.clone());
            problem.for_each_hidden(self.batch, query..query + 1, keys, |_, key| {
                scores[key] = HIDDEN;
            });
            max[row] = simd::maximum(simd, scores, HIDDEN);
            sum[row] = powers(simd, scores, max[row]);
        }
        let vectors = head_dim.div_ceil(S::F32_LANES);
        let mut weighted = vec![simd.splat_f32s(0.0); values.len() * n_rows * vectors];
        for (values, weighted) in values.iter().zip(weighted.chunks_mut(n_rows * vectors)) {
            values.add_sums(simd, &scores, PART, self.keys.clone(), weighted);
        }
        // Without what fills up the last vector of a row.
        let rows = weighted.chunks(vectors);
        let rows = rows.map(|row| &cast_slice::<_, f32>(row)[..head_dim]);
        Softmax {
            max,
            sum,
            weighted: rows.flatten().copied().collect(),
        }
    }
}

/// Turns one query's scores into 2^(score − max) and returns their sum.
#[inline(always)]
fn powers<S: Simd>(simd: S, scores: &mut [f32], max: f32) -> f32 {
    let (whole, tail) = S::as_mut_simd_f32s(scores);
    let shift = simd.splat_f32s(max);
    let mut sums = simd.splat_f32s(0.0);
    for x in whole {
        *x = simd::exp2(simd, simd.sub_f32s(*x, shift));
        sums = simd.add_f32s(sums, *x);
    }
    let mut sum = simd.reduce_sum_f32s(sums);
    for x in tail {
        *x = (*x - max).exp2();
        sum += *x;
    }
    sum
}

/// `output[c] += x[c] · factor · weight[c]`.
fn add_weighted(
    output: &mut [f32],
    x: impl Iterator<Item = f32>,
    factor: f32,
    weight: Option<&[f32]>,
) {
    match weight {
        None => output.iter_mut().zip(x).for_each(|(o, x)| *o += x * factor),
        Some(weight) => {
            let terms = output.iter_mut().zip(x).zip(weight);
            terms.for_each(|((o, x), w)| *o += x * factor * w);
        }
    }
}
