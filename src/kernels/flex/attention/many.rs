//! Many queries: products of small matrices. The lanes of a vector are queries, so that the
//! softmax needs no sum across lanes and neither keys nor values are rearranged. Blends are formed a
//! tile at a time: for some hundred queries that is a few products more, where the weights in the
//! query and the output would be twice the products.

use std::ops::Range;

use pulp::bytemuck::{cast_slice, cast_slice_mut};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::{ARCH, simd};
use super::rows::Scratch;
use super::{HIDDEN, Problem};

/// Keys per tile: keys or values of a tile fit the first-level cache.
pub(super) const TILE: usize = 64;
/// Blocks of queries that read a tile one after the other, while it lies in a cache: it is fetched,
/// widened or blended once for all of them.
const BLOCKS: usize = 4;

/// One number for each query of a block, which has `WIDE` vectors of them.
pub(super) type Lanes<S, const WIDE: usize> = [<S as Simd>::f32s; WIDE];

/// What is computed in blocks of WIDE vectors of queries by HIGH keys or channels.
pub(super) trait WithBlocks {
    type Output;

    fn with_blocks<S: Simd, const HIGH: usize, const WIDE: usize>(self, simd: S) -> Self::Output;
}

/// With as many sums as registers hold beside a row of the right matrix and a number of the left: a sum
/// without a register would wait for memory in every step.
pub(super) struct InBlocks<T>(pub T);

impl<T: WithBlocks> WithSimd for InBlocks<T> {
    type Output = T::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> T::Output {
        if const { S::REGISTER_COUNT >= 32 } {
            self.0.with_blocks::<S, 8, 3>(simd)
        } else {
            self.0.with_blocks::<S, 6, 2>(simd)
        }
    }
}

/// `[batch, n_heads, n_queries, head_dim]`, and of every query the base-2 logarithm of the sum of
/// its powers of 2.
pub(super) fn attention(problem: &Problem) -> (Vec<f32>, Vec<f32>) {
    let mut output = vec![0.0; problem.query.len()];
    let mut log_sums = vec![0.0; problem.query.len() / problem.head_dim];
    let (n_queries, head_dim) = (problem.n_queries, problem.head_dim);
    let block = ARCH.dispatch(InBlocks(BlockLen));
    let blocks = problem.batch * problem.n_heads * n_queries.div_ceil(block);
    // Threads that are done early take over from others.
    let share = block * (blocks / (8 * rayon::current_num_threads())).clamp(1, BLOCKS);
    let shares = output
        .par_chunks_mut(n_queries * head_dim)
        .zip(log_sums.par_chunks_mut(n_queries))
        .enumerate()
        .flat_map(|(head, (output, log_sums))| {
            let shares = output.par_chunks_mut(share * head_dim);
            let shares = shares.zip(log_sums.par_chunks_mut(share)).enumerate();
            shares.map(move |(i, output)| (head, i * share, output))
        });
    shares.for_each(|(head, first, (output, log_sums))| {
        ARCH.dispatch(InBlocks(Share {
            problem,
            batch: head / problem.n_heads,
            head: head % problem.n_heads,
            first,
            output,
            log_sums,
        }));
    });
    (output, log_sums)
}

/// How many queries a block has.
struct BlockLen;

impl WithBlocks for BlockLen {
    type Output = usize;

    #[inline(always)]
    fn with_blocks<S: Simd, const HIGH: usize, const WIDE: usize>(self, _: S) -> usize {
        WIDE * S::F32_LANES
    }
}

/// One thread's work: neighbouring queries of one head.
struct Share<'a> {
    problem: &'a Problem<'a>,
    batch: usize,
    head: usize,
    first: usize,
    output: &'a mut [f32],
    log_sums: &'a mut [f32],
}

impl WithBlocks for Share<'_> {
    type Output = ();

    #[inline(always)]
    fn with_blocks<S: Simd, const HIGH: usize, const WIDE: usize>(self, simd: S) {
        let problem = self.problem;
        let head_dim = problem.head_dim;
        let kv_head = self.head * problem.n_kv_heads / problem.n_heads;
        let (keys, values) = problem.blends(self.batch, kv_head);
        let head = self.batch * problem.n_heads + self.head;
        let start = (head * problem.n_queries + self.first) * head_dim;
        let queries = &problem.query[start..][..self.output.len()];

        let lanes = WIDE * S::F32_LANES;
        let mut blocks = Vec::with_capacity(BLOCKS);
        for (i, queries) in queries.chunks(lanes * head_dim).enumerate() {
            blocks.push(Block::<S, WIDE>::new(
                simd,
                problem,
                self.batch,
                self.first + i * lanes,
                queries,
            ));
        }
        let (mut key_scratch, mut value_scratch) = (Scratch::default(), Scratch::default());
        let mut scores = [[simd.splat_f32s(0.0); WIDE]; TILE];
        let last = self.first + queries.len() / head_dim - 1;
        let start = problem.visible(self.batch, self.first).start / TILE * TILE;
        let end = problem.visible(self.batch, last).end;
        for start in (start..end).step_by(TILE) {
            let range = start..(start + TILE).min(end);
            let keys = keys.tile(simd, range.clone(), &mut key_scratch);
            let values = values.tile(simd, range, &mut value_scratch);
            for block in &mut blocks {
                let tiles = [keys, values];
                block.read::<HIGH>(simd, problem, self.batch, start, tiles, &mut scores);
            }
        }
        let outputs = self.output.chunks_mut(lanes * head_dim);
        let results = outputs.zip(self.log_sums.chunks_mut(lanes));
        for (block, (output, log_sums)) in blocks.into_iter().zip(results) {
            block.finish(simd, output, log_sums);
        }
    }
}

/// As many queries as there are lanes, and their softmax so far.
struct Block<S: Simd, const WIDE: usize> {
    /// Which queries.
    places: Range<usize>,
    /// Of the keys, those from the first to the last that one of them sees.
    seen: Range<usize>,
    /// `[head_dim]`.
    queries: Vec<Lanes<S, WIDE>>,
    max: Lanes<S, WIDE>,
    sum: Lanes<S, WIDE>,
    /// `[head_dim]`, values times powers of 2.
    weighted: Vec<Lanes<S, WIDE>>,
}

impl<S: Simd, const WIDE: usize> Block<S, WIDE> {
    #[inline(always)]
    fn new(simd: S, problem: &Problem, batch: usize, first: usize, queries: &[f32]) -> Self {
        let head_dim = problem.head_dim;
        let zero = [simd.splat_f32s(0.0); WIDE];
        let places = first..first + queries.len() / head_dim;
        let [first, last] = [places.start, places.end - 1].map(|q| problem.visible(batch, q));
        Self {
            places,
            seen: first.start..last.end,
            queries: transposed(simd, queries, head_dim, problem.scale()),
            max: [simd.splat_f32s(HIDDEN); WIDE],
            sum: zero,
            weighted: vec![zero; head_dim],
        }
    }

    /// Takes in the keys and values of a tile, which begins at `start`, as far as one of the queries sees them.
    #[inline(always)]
    fn read<const HIGH: usize>(
        &mut self,
        simd: S,
        problem: &Problem,
        batch: usize,
        start: usize,
        [keys, values]: [&[f32]; 2],
        scores: &mut [Lanes<S, WIDE>; TILE],
    ) {
        let head_dim = problem.head_dim;
        let range = start..self.seen.end.min(start + keys.len() / head_dim);
        if range.is_empty() || range.end <= self.seen.start {
            return;
        }
        let [keys, values] = [keys, values].map(|tile| &tile[..range.len() * head_dim]);
        let scores = &mut scores[..range.len()];
        scores_of::<S, HIGH, WIDE>(simd, keys, &self.queries, scores);
        let numbers: &mut [f32] = cast_slice_mut(&mut *scores);
        problem.for_each_hidden(batch, self.places.clone(), range, |query, key| {
            numbers[key * WIDE * S::F32_LANES + query] = HIDDEN;
        });
        let decay = softmax(simd, scores, &mut self.max, &mut self.sum);
        add_values::<S, HIGH, WIDE>(simd, values, scores, decay, &mut self.weighted);
    }

    #[inline(always)]
    fn finish(mut self, simd: S, output: &mut [f32], log_sums: &mut [f32]) {
        for channel in &mut self.weighted {
            for (x, &sum) in channel.iter_mut().zip(&self.sum) {
                *x = simd.div_f32s(*x, sum);
            }
        }
        in_rows::<S, WIDE>(&self.weighted, output);
        let (max, sum): (&[f32], &[f32]) = (cast_slice(&self.max), cast_slice(&self.sum));
        for ((log_sum, max), sum) in log_sums.iter_mut().zip(max).zip(sum) {
            *log_sum = max + sum.log2();
        }
    }
}

/// Rows of one number per channel, scaled, as `[head_dim]` of lanes; those beyond the last row are 0.
#[inline(always)]
pub(super) fn transposed<S: Simd, const WIDE: usize>(
    simd: S,
    rows: &[f32],
    head_dim: usize,
    scale: f32,
) -> Vec<Lanes<S, WIDE>> {
    let mut channels = vec![[simd.splat_f32s(0.0); WIDE]; head_dim];
    let numbers: &mut [f32] = cast_slice_mut(&mut channels);
    for (channel, lanes) in numbers.chunks_mut(WIDE * S::F32_LANES).enumerate() {
        let column = rows.iter().skip(channel).step_by(head_dim);
        let pairs = lanes.iter_mut().zip(column);
        pairs.for_each(|(to, x)| *to = x * scale);
    }
    channels
}

/// The reverse of [`transposed`]: `[head_dim]` of lanes, as rows of one number per channel.
#[inline(always)]
pub(super) fn in_rows<S: Simd, const WIDE: usize>(channels: &[Lanes<S, WIDE>], rows: &mut [f32]) {
    let numbers: &[f32] = cast_slice(channels);
    for (query, row) in rows.chunks_mut(channels.len()).enumerate() {
        let column = numbers.iter().skip(query).step_by(WIDE * S::F32_LANES);
        row.iter_mut().zip(column).for_each(|(to, x)| *to = *x);
    }
}

/// How many blocks of `high` to make of n: one less than there could be where that leaves a multiple of 4,
/// because smaller blocks have too few sums to keep the processor busy.
#[inline(always)]
fn blocks_of(high: usize, n: usize) -> usize {
    let blocks = n / high;
    let rest = n - blocks * high;
    let lower = blocks > 0 && !rest.is_multiple_of(4) && (rest + high).is_multiple_of(4);
    blocks - usize::from(lower)
}

/// `scores[key] = Σ_c tile[key][c] · queries[c]`, HIGH keys at a time.
#[inline(always)]
pub(super) fn scores_of<S: Simd, const HIGH: usize, const WIDE: usize>(
    simd: S,
    tile: &[f32],
    queries: &[Lanes<S, WIDE>],
    scores: &mut [Lanes<S, WIDE>],
) {
    let high = blocks_of(HIGH, scores.len()) * HIGH;
    let (keys, tile) = tile.split_at(high * queries.len());
    let (blocks, scores) = scores.split_at_mut(high);
    blocks_of_scores::<S, HIGH, WIDE>(simd, keys, queries, blocks);
    let fours = scores.len() / 4 * 4;
    let (keys, tile) = tile.split_at(fours * queries.len());
    let (blocks, scores) = scores.split_at_mut(fours);
    blocks_of_scores::<S, 4, WIDE>(simd, keys, queries, blocks);
    let twos = scores.len() / 2 * 2;
    let (keys, tile) = tile.split_at(twos * queries.len());
    let (blocks, scores) = scores.split_at_mut(twos);
    blocks_of_scores::<S, 2, WIDE>(simd, keys, queries, blocks);
    blocks_of_scores::<S, 1, WIDE>(simd, tile, queries, scores);
}

/// [`scores_of`] whole blocks of N keys, whose sums stay in registers.
#[inline(always)]
fn blocks_of_scores<S: Simd, const N: usize, const WIDE: usize>(
    simd: S,
    tile: &[f32],
    queries: &[Lanes<S, WIDE>],
    scores: &mut [Lanes<S, WIDE>],
) {
    let head_dim = queries.len();
    let blocks = scores.as_chunks_mut::<N>().0;
    for (keys, scores) in tile.chunks_exact(N * head_dim).zip(blocks) {
        let mut rows = [keys; N];
        for (row, key) in rows.iter_mut().zip(keys.chunks_exact(head_dim)) {
            *row = key;
        }
        let mut sums = [[simd.splat_f32s(0.0); WIDE]; N];
        for (channel, queries) in queries.iter().enumerate() {
            for (sums, row) in sums.iter_mut().zip(rows) {
                let x = simd.splat_f32s(row[channel]);
                for (sum, &query) in sums.iter_mut().zip(queries) {
                    *sum = simd.mul_add_f32s(x, query, *sum);
                }
            }
        }
        *scores = sums;
    }
}

/// Turns scores into 2^(score − max) and adds them up; returns what everything before must be
/// multiplied with.
#[inline(always)]
fn softmax<S: Simd, const WIDE: usize>(
    simd: S,
    scores: &mut [Lanes<S, WIDE>],
    max: &mut Lanes<S, WIDE>,
    sum: &mut Lanes<S, WIDE>,
) -> Lanes<S, WIDE> {
    let mut largest = *max;
    for scores in scores.iter() {
        for (largest, &score) in largest.iter_mut().zip(scores) {
            *largest = simd.max_f32s(*largest, score);
        }
    }
    // A closure would be compiled for any processor, and call every operation of this one.
    let mut decay = *max;
    for i in 0..WIDE {
        decay[i] = simd::exp2(simd, simd.sub_f32s(max[i], largest[i]));
        sum[i] = simd.mul_f32s(sum[i], decay[i]);
    }
    *max = largest;
    for scores in scores {
        for i in 0..WIDE {
            scores[i] = simd::exp2(simd, simd.sub_f32s(scores[i], largest[i]));
            sum[i] = simd.add_f32s(sum[i], scores[i]);
        }
    }
    decay
}

/// `weighted[c] = weighted[c] · decay + Σ_key tile[key][c] · probabilities[key]`, HIGH channels at a time.
#[inline(always)]
pub(super) fn add_values<S: Simd, const HIGH: usize, const WIDE: usize>(
    simd: S,
    tile: &[f32],
    probabilities: &[Lanes<S, WIDE>],
    decay: Lanes<S, WIDE>,
    weighted: &mut [Lanes<S, WIDE>],
) {
    let head_dim = weighted.len();
    let high = blocks_of(HIGH, head_dim) * HIGH;
    let fours = high + (head_dim - high) / 4 * 4;
    let twos = fours + (head_dim - fours) / 2 * 2;
    let (blocks, rest) = weighted.split_at_mut(high);
    add_channels::<S, HIGH, WIDE>(simd, tile, head_dim, 0, probabilities, decay, blocks);
    let (blocks, rest) = rest.split_at_mut(fours - high);
    add_channels::<S, 4, WIDE>(simd, tile, head_dim, high, probabilities, decay, blocks);
    let (blocks, rest) = rest.split_at_mut(twos - fours);
    add_channels::<S, 2, WIDE>(simd, tile, head_dim, fours, probabilities, decay, blocks);
    add_channels::<S, 1, WIDE>(simd, tile, head_dim, twos, probabilities, decay, rest);
}

/// [`add_values`] to whole blocks of N channels, whose sums stay in registers; the first is `start`.
#[inline(always)]
fn add_channels<S: Simd, const N: usize, const WIDE: usize>(
    simd: S,
    tile: &[f32],
    head_dim: usize,
    start: usize,
    probabilities: &[Lanes<S, WIDE>],
    decay: Lanes<S, WIDE>,
    weighted: &mut [Lanes<S, WIDE>],
) {
    for (i, weighted) in weighted.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        let start = start + i * N;
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
}
