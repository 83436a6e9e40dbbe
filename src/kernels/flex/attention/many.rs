//! Many queries: products of small matrices. The lanes of a vector are queries, so that the
//! softmax needs no sum across lanes and neither keys nor values are rearranged. Blends are formed a
//! tile at a time: for a whole tile of queries that is a few products more, where the weights in the
//! query and the output would be twice the products.

use pulp::bytemuck::cast_slice;
use pulp::bytemuck::cast_slice_mut;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::{ARCH, simd};
use super::rows::Scratch;
use super::{HIDDEN, Problem};

/// Keys per tile: keys or values of a tile fit the first-level cache.
pub(super) const TILE: usize = 64;
/// Vectors of queries side by side.
pub(super) const WIDE: usize = 3;

/// One number for each query of a tile.
pub(super) type Lanes<S> = [<S as Simd>::f32s; WIDE];

/// `[batch, n_heads, n_queries, head_dim]`, and of every query the base-2 logarithm of the sum of
/// its powers of 2.
pub(super) fn attention(problem: &Problem) -> (Vec<f32>, Vec<f32>) {
    let mut output = vec![0.0; problem.query.len()];
    let mut log_sums = vec![0.0; problem.query.len() / problem.head_dim];
    let (n_queries, head_dim) = (problem.n_queries, problem.head_dim);
    let tile = ARCH.dispatch(TileQueries);
    let tiles = output
        .par_chunks_mut(n_queries * head_dim)
        .zip(log_sums.par_chunks_mut(n_queries))
        .enumerate()
        .flat_map(|(head, (output, log_sums))| {
            let tiles = output.par_chunks_mut(tile * head_dim);
            let tiles = tiles.zip(log_sums.par_chunks_mut(tile)).enumerate();
            tiles.map(move |(i, output)| (head, i * tile, output))
        });
    tiles.for_each(|(head, first, (output, log_sums))| {
        ARCH.dispatch(Tile {
            problem,
            batch: head / problem.n_heads,
            head: head % problem.n_heads,
            first,
            output,
            log_sums,
        });
    });
    (output, log_sums)
}

/// How many queries a tile has.
pub(super) struct TileQueries;

impl WithSimd for TileQueries {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        WIDE * S::F32_LANES
    }
}

/// One thread's work: neighbouring queries of one head.
struct Tile<'a> {
    problem: &'a Problem<'a>,
    batch: usize,
    head: usize,
    first: usize,
    output: &'a mut [f32],
    log_sums: &'a mut [f32],
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // As many sums as registers hold beside a row of the right and a number of the left matrix.
        if S::REGISTER_COUNT >= 32 {
            self.attend::<S, 8>(simd);
        } else {
            self.attend::<S, 4>(simd);
        }
    }
}

impl Tile<'_> {
    #[inline(always)]
    fn attend<S: Simd, const HIGH: usize>(self, simd: S) {
        let problem = self.problem;
        let head_dim = problem.head_dim;
        let n_queries = self.output.len() / head_dim;
        let kv_head = self.head * problem.n_kv_heads / problem.n_heads;
        let (keys, values) = problem.blends(self.batch, kv_head);
        let head = self.batch * problem.n_heads + self.head;
        let start = (head * problem.n_queries + self.first) * head_dim;
        let queries = &problem.query[start..][..n_queries * head_dim];
        let queries = transposed(simd, queries, head_dim, problem.scale());

        let zero = [simd.splat_f32s(0.0); WIDE];
        let mut scratch = Scratch::default();
        let mut scores = [zero; TILE];
        let mut max = [simd.splat_f32s(HIDDEN); WIDE];
        let mut sum = zero;
        let mut weighted = vec![zero; head_dim];
        let last = self.first + n_queries - 1;
        let first = problem.visible(self.batch, self.first).start;
        let end = problem.visible(self.batch, last).end;
        for start in (first..end).step_by(TILE) {
            let range = start..(start + TILE).min(end);
            let scores = &mut scores[..range.len()];
            let tile = keys.tile(simd, range.clone(), &mut scratch);
            scores_of::<S, HIGH>(simd, tile, &queries, scores);
            let lanes = WIDE * S::F32_LANES;
            let numbers: &mut [f32] = cast_slice_mut(&mut *scores);
            for query in 0..n_queries {
                problem.for_each_hidden(self.batch, self.first + query, range.clone(), |key| {
                    numbers[key * lanes + query] = HIDDEN;
                });
            }
            let decay = softmax(simd, scores, &mut max, &mut sum);
            let tile = values.tile(simd, range, &mut scratch);
            add_values::<S, HIGH>(simd, tile, scores, decay, &mut weighted);
        }

        let lanes = WIDE * S::F32_LANES;
        let (max, sum): (&[f32], &[f32]) = (cast_slice(&max), cast_slice(&sum));
        for ((log_sum, max), sum) in self.log_sums.iter_mut().zip(max).zip(sum) {
            *log_sum = max + sum.log2();
        }
        for (query, output) in self.output.chunks_mut(head_dim).enumerate() {
            let channels: &[f32] = cast_slice(&weighted);
            let channels = channels.iter().skip(query).step_by(lanes);
            for (output, channel) in output.iter_mut().zip(channels) {
                *output = channel / sum[query];
            }
        }
    }
}

/// Rows of one number per channel, scaled, as `[head_dim]` of lanes; those beyond the last row are 0.
#[inline(always)]
pub(super) fn transposed<S: Simd>(
    simd: S,
    rows: &[f32],
    head_dim: usize,
    scale: f32,
) -> Vec<Lanes<S>> {
    let mut channels = vec![[simd.splat_f32s(0.0); WIDE]; head_dim];
    let numbers: &mut [f32] = cast_slice_mut(&mut channels);
    for (channel, lanes) in numbers.chunks_mut(WIDE * S::F32_LANES).enumerate() {
        let column = rows.iter().skip(channel).step_by(head_dim);
        let pairs = lanes.iter_mut().zip(column);
        pairs.for_each(|(to, x)| *to = x * scale);
    }
    channels
}

/// `scores[key] = Σ_c tile[key][c] · queries[c]`, HIGH keys at a time.
#[inline(always)]
pub(super) fn scores_of<S: Simd, const HIGH: usize>(
    simd: S,
    tile: &[f32],
    queries: &[Lanes<S>],
    scores: &mut [Lanes<S>],
) {
    let head_dim = queries.len();
    let keys = tile.chunks(HIGH * head_dim);
    for (keys, scores) in keys.zip(scores.chunks_mut(HIGH)) {
        let last = scores.len() - 1;
        // A row is repeated where the last block is not full.
        let rows: [&[f32]; HIGH] = std::array::from_fn(|i| {
            let row = &keys[i.min(last) * head_dim..];
            &row[..head_dim]
        });
        let mut sums = [[simd.splat_f32s(0.0); WIDE]; HIGH];
        for (channel, queries) in queries.iter().enumerate() {
            for (sums, row) in sums.iter_mut().zip(rows) {
                let x = simd.splat_f32s(row[channel]);
                for (sum, &query) in sums.iter_mut().zip(queries) {
                    *sum = simd.mul_add_f32s(x, query, *sum);
                }
            }
        }
        scores
            .iter_mut()
            .zip(sums)
            .for_each(|(to, sums)| *to = sums);
    }
}

/// Turns scores into 2^(score − max) and adds them up; returns what everything before must be
/// multiplied with.
#[inline(always)]
fn softmax<S: Simd>(
    simd: S,
    scores: &mut [Lanes<S>],
    max: &mut Lanes<S>,
    sum: &mut Lanes<S>,
) -> Lanes<S> {
    let mut largest = *max;
    for scores in scores.iter() {
        for (largest, &score) in largest.iter_mut().zip(scores) {
            *largest = simd.max_f32s(*largest, score);
        }
    }
    let decay: Lanes<S> =
        std::array::from_fn(|i| simd::exp2(simd, simd.sub_f32s(max[i], largest[i])));
    *max = largest;
    for (sum, &decay) in sum.iter_mut().zip(&decay) {
        *sum = simd.mul_f32s(*sum, decay);
    }
    for scores in scores {
        for i in 0..WIDE {
            scores[i] = simd::exp2(simd, simd.sub_f32s(scores[i], largest[i]));
            sum[i] = simd.add_f32s(sum[i], scores[i]);
        }
    }
    decay
}

/// `weighted[c] = weighted[c] · decay + Σ_key tile[key][c] · probabilities[key]`.
#[inline(always)]
pub(super) fn add_values<S: Simd, const HIGH: usize>(
    simd: S,
    tile: &[f32],
    probabilities: &[Lanes<S>],
    decay: Lanes<S>,
    weighted: &mut [Lanes<S>],
) {
    let head_dim = weighted.len();
    let (blocks, rest) = weighted.as_chunks_mut::<HIGH>();
    let (pairs, single) = rest.as_chunks_mut::<2>();
    let mut start = 0;
    for weighted in blocks {
        add_channels(simd, tile, head_dim, start, probabilities, decay, weighted);
        start += HIGH;
    }
    for weighted in pairs {
        add_channels(simd, tile, head_dim, start, probabilities, decay, weighted);
        start += 2;
    }
    for weighted in single.as_chunks_mut::<1>().0 {
        add_channels(simd, tile, head_dim, start, probabilities, decay, weighted);
        start += 1;
    }
}

/// N channels from `start`, whose sums stay in registers.
#[inline(always)]
fn add_channels<S: Simd, const N: usize>(
    simd: S,
    tile: &[f32],
    head_dim: usize,
    start: usize,
    probabilities: &[Lanes<S>],
    decay: Lanes<S>,
    weighted: &mut [Lanes<S>; N],
) {
    let mut sums = *weighted;
    for sums in &mut sums {
        for (sum, &decay) in sums.iter_mut().zip(&decay) {
            *sum = simd.mul_f32s(*sum, decay);
        }
    }
    for (value, probabilities) in tile.chunks_exact(head_dim).zip(probabilities) {
        let value = &value[start..start + N];
        for (sums, &x) in sums.iter_mut().zip(value) {
            let x = simd.splat_f32s(x);
            for (sum, &p) in sums.iter_mut().zip(probabilities) {
                *sum = simd.mul_add_f32s(x, p, *sum);
            }
        }
    }
    *weighted = sums;
}
