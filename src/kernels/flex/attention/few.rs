//! Few queries over many keys: every query of a kv head's group with every key by a dot product.
//! The limit is how fast keys and values come from memory, so each is read once for all of them.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::{ARCH, PARALLEL, simd};
use super::{HIDDEN, Problem};

/// Keys per tile: long enough for the processor to foresee what is read next.
const TILE: usize = 256;
/// Keys of a head that one thread goes through. Fixed, so that sums are formed in one order whatever
/// the number of threads or rows: enough to be worth a thread and its merging, few enough for all
/// threads of a machine to have some.
const PART: usize = 2 * TILE;

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
    let attend = |(head, keys): &(usize, Range<usize>)| {
        let (batch, kv_head) = (head / problem.n_kv_heads, head % problem.n_kv_heads);
        ARCH.dispatch(Part::new(problem, batch, kv_head, keys.clone()))
    };
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

/// A softmax under way for each query of a group, over some of the keys.
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
        let mut scratch = Vec::new();
        let mut scores = vec![0.0; n_rows * TILE];
        let mut state = Softmax {
            max: vec![HIDDEN; n_rows],
            sum: vec![0.0; n_rows],
            weighted: vec![0.0; values.len() * n_rows * head_dim],
        };
        for start in self.keys.clone().step_by(TILE) {
            let range = start..(start + TILE).min(self.keys.end);
            scores.fill(0.0);
            for (keys, queries) in keys.iter().zip(queries.chunks(n_rows * head_dim)) {
                for part in parts(&range, keys.at_once()) {
                    let first = part.start - start;
                    let tile = keys.tile(simd, part, &mut scratch);
                    for (query, scores) in queries.chunks(head_dim).zip(scores.chunks_mut(TILE)) {
                        add_scores(simd, query, tile, &mut scores[first..]);
                    }
                }
            }
            for (row, scores) in scores.chunks_mut(TILE).enumerate() {
                let scores = &mut scores[..range.len()];
                let query = row % problem.n_queries;
                problem.for_each_hidden(self.batch, query, range.clone(), |i| scores[i] = HIDDEN);
                let decay = state.add(simd, row, scores);
                if decay != 1.0 {
                    for weighted in state.weighted.chunks_mut(n_rows * head_dim) {
                        let weighted = &mut weighted[row * head_dim..][..head_dim];
                        weighted.iter_mut().for_each(|x| *x *= decay);
                    }
                }
            }
            for (values, weighted) in values
                .iter()
                .zip(state.weighted.chunks_mut(n_rows * head_dim))
            {
                for part in parts(&range, values.at_once()) {
                    let among = part.start - start..part.end - start;
                    let tile = values.tile(simd, part, &mut scratch);
                    let rows = scores.chunks(TILE).zip(weighted.chunks_mut(head_dim));
                    for (scores, weighted) in rows {
                        add_values(simd, &scores[among.clone()], tile, weighted);
                    }
                }
            }
        }
        state
    }
}

/// A range in parts of so many.
fn parts(range: &Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    let starts = range.clone().step_by(len);
    starts.map(move |start| start..start.saturating_add(len).min(end))
}

impl Softmax {
    /// Turns one query's scores into 2^(score − max) and adds them up; returns what everything
    /// before must be multiplied with.
    #[inline(always)]
    fn add<S: Simd>(&mut self, simd: S, row: usize, scores: &mut [f32]) -> f32 {
        let old = self.max[row];
        let max = scores.iter().copied().fold(old, f32::max);
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
        let decay = (old - max).exp2();
        self.max[row] = max;
        self.sum[row] = self.sum[row] * decay + sum;
        decay
    }
}

/// `scores[i] += query · tile[i]`.
#[inline(always)]
fn add_scores<S: Simd>(simd: S, query: &[f32], tile: &[f32], scores: &mut [f32]) {
    for (score, key) in scores.iter_mut().zip(tile.chunks_exact(query.len())) {
        *score += simd::dot(simd, query, key);
    }
}

/// `weighted += Σ_i probabilities[i] · tile[i]`.
#[inline(always)]
fn add_values<S: Simd>(simd: S, probabilities: &[f32], tile: &[f32], weighted: &mut [f32]) {
    let head_dim = weighted.len();
    let (sums, sums_tail) = S::as_mut_simd_f32s(weighted);
    let (sums4, sums) = sums.as_chunks_mut::<4>();
    let lanes = S::F32_LANES;
    let mut start = 0;
    for sums in sums4 {
        *sums = add_columns(simd, probabilities, tile, head_dim, start, *sums);
        start += 4 * lanes;
    }
    for sum in sums {
        [*sum] = add_columns(simd, probabilities, tile, head_dim, start, [*sum]);
        start += lanes;
    }
    for (column, sum) in sums_tail.iter_mut().enumerate() {
        let values = tile
            .chunks_exact(head_dim)
            .map(|value| value[start + column]);
        *sum += probabilities
            .iter()
            .zip(values)
            .map(|(p, v)| p * v)
            .sum::<f32>();
    }
}

/// N vectors of columns from `start`, whose sums stay in registers.
#[inline(always)]
fn add_columns<S: Simd, const N: usize>(
    simd: S,
    probabilities: &[f32],
    tile: &[f32],
    head_dim: usize,
    start: usize,
    mut sums: [S::f32s; N],
) -> [S::f32s; N] {
    for (&p, value) in probabilities.iter().zip(tile.chunks_exact(head_dim)) {
        let p = simd.splat_f32s(p);
        let (value, _) = S::as_simd_f32s(&value[start..start + N * S::F32_LANES]);
        for (sum, &v) in sums.iter_mut().zip(value) {
            *sum = simd.mul_add_f32s(p, v, *sum);
        }
    }
    sums
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
