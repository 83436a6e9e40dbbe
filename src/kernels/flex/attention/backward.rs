//! Attention over plain keys and values for training (arXiv 2205.14135): forward it keeps a number
//! per query, backward it computes the probabilities again, tile by tile.
//!
//! With P = softmax(scores), scores = q · k / √head_dim, D = Σ_c (dO ⊙ O): dV = Pᵀ · dO,
//! dS = P ⊙ (dO · Vᵀ − D) / √head_dim, dQ = dS · K and dK = dSᵀ · Q. A thread has a kv head and all
//! queries that read it, so that every sum is formed in one order.

use burn::tensor::backend::Backend;
use burn_flex::FlexTensor;
use pulp::Simd;
use pulp::bytemuck::{cast_slice, cast_slice_mut};
use rayon::prelude::*;

use super::super::{ARCH, simd};
use super::many::{
    self, InBlocks, Lanes, TILE, WithBlocks, add_values, in_rows, scores_of, transposed,
};
use super::{Problem, Source};
use crate::kernels::operands::{Seen, Visibility};

/// Which keys are hidden, and the attention among the others.
#[derive(Clone, Debug)]
pub(in super::super) struct Trained(Seen);

/// What a forward pass leaves for its backward pass; all tensors lie in one piece.
#[derive(Clone, Debug)]
pub(in super::super) struct Kept {
    /// `[batch, n_heads, n_queries, head_dim]`.
    query: FlexTensor,
    /// `[batch, n_kv_heads, n_keys, head_dim]`.
    key: FlexTensor,
    value: FlexTensor,
    output: FlexTensor,
    /// `[batch, n_heads, n_queries]`.
    log_sums: Vec<f32>,
}

impl Trained {
    pub fn new<B: Backend>(visibility: &Visibility<B>) -> Self {
        Self(visibility.seen.clone())
    }

    /// The output, shaped as the query.
    pub fn forward(&self, query: FlexTensor, key: FlexTensor, value: FlexTensor) -> Kept {
        let [query, key, value] = [query, key, value].map(|x| x.to_contiguous());
        let keys = [Source::plain(key.clone())];
        let values = [Source::plain(value.clone())];
        let problem = self.problem(&query, &key, &keys, &values);
        let (output, log_sums) = many::attention(&problem);
        let [batch, n_heads, n_queries, head_dim] = query.layout().shape().dims();
        let output = burn::tensor::TensorData::new(output, [batch, n_heads, n_queries, head_dim]);
        Kept {
            output: FlexTensor::from_data(output),
            query,
            key,
            value,
            log_sums,
        }
    }

    fn problem<'a>(
        &'a self,
        query: &'a FlexTensor,
        key: &FlexTensor,
        keys: &'a [Source],
        values: &'a [Source],
    ) -> Problem<'a> {
        let [batch, n_heads, n_queries, head_dim] = query.layout().shape().dims();
        let [_, n_kv_heads, n_keys, _] = key.layout().shape().dims();
        Problem {
            query: query.storage(),
            keys,
            values,
            seen: &self.0,
            batch,
            n_heads,
            n_kv_heads,
            n_queries,
            n_keys,
            head_dim,
        }
    }

    /// The gradients of query, key and value, given that of the output.
    pub fn backward(&self, kept: &Kept, gradient: &FlexTensor) -> [Vec<f32>; 3] {
        let keys = [Source::plain(kept.key.clone())];
        let values = [Source::plain(kept.value.clone())];
        let problem = self.problem(&kept.query, &kept.key, &keys, &values);
        let gradient = gradient.to_contiguous();
        let (key, value) = (kept.key.storage::<f32>(), kept.value.storage::<f32>());
        let mut d_query = vec![0.0; problem.query.len()];
        let (mut d_key, mut d_value) = (vec![0.0; key.len()], vec![0.0; value.len()]);
        let head = problem.n_keys * problem.head_dim;
        let group = problem.n_heads / problem.n_kv_heads * problem.n_queries * problem.head_dim;
        d_query
            .par_chunks_mut(group)
            .zip(d_key.par_chunks_mut(head))
            .zip(d_value.par_chunks_mut(head))
            .zip(key.par_chunks(head).zip(value.par_chunks(head)))
            .enumerate()
            .for_each(|(kv_head, (((d_query, d_key), d_value), (key, value)))| {
                ARCH.dispatch(InBlocks(KvHead {
                    problem: &problem,
                    kv_head,
                    key,
                    value,
                    output: kept.output.storage(),
                    gradient: gradient.storage(),
                    log_sums: &kept.log_sums,
                    d_query,
                    d_key,
                    d_value,
                }));
            });
        [d_query, d_key, d_value]
    }
}

impl Kept {
    /// Shaped as the query.
    pub fn output(&self) -> FlexTensor {
        self.output.clone()
    }

    pub fn query(&self) -> &FlexTensor {
        &self.query
    }

    /// Shaped as the value.
    pub fn key(&self) -> &FlexTensor {
        &self.key
    }
}

/// One thread's work: a kv head, counted through the whole batch, and the queries that read it.
struct KvHead<'a> {
    problem: &'a Problem<'a>,
    kv_head: usize,
    /// Of this head.
    key: &'a [f32],
    value: &'a [f32],
    /// Of all heads.
    output: &'a [f32],
    gradient: &'a [f32],
    log_sums: &'a [f32],
    /// Of this head and its queries.
    d_query: &'a mut [f32],
    d_key: &'a mut [f32],
    d_value: &'a mut [f32],
}

impl WithBlocks for KvHead<'_> {
    type Output = ();

    #[inline(always)]
    fn with_blocks<S: Simd, const HIGH: usize, const WIDE: usize>(mut self, simd: S) {
        let Problem {
            n_queries,
            n_keys,
            head_dim,
            ..
        } = *self.problem;
        let lanes = WIDE * S::F32_LANES;
        let vectors = head_dim.div_ceil(S::F32_LANES);
        let zero = simd.splat_f32s(0.0);
        let mut sums = Sums {
            d_key: vec![zero; n_keys * vectors],
            d_value: vec![zero; n_keys * vectors],
            vectors,
        };
        let d_query = std::mem::take(&mut self.d_query);
        for (i, d_query) in d_query.chunks_mut(n_queries * head_dim).enumerate() {
            for (tile, d_query) in d_query.chunks_mut(lanes * head_dim).enumerate() {
                self.queries::<S, HIGH, WIDE>(simd, i, tile * lanes, d_query, &mut sums);
            }
        }
        let targets = [(&sums.d_key, self.d_key), (&sums.d_value, self.d_value)];
        for (sums, target) in targets {
            let padded: &[f32] = cast_slice(sums);
            let rows = padded.chunks(vectors * S::F32_LANES);
            for (row, target) in rows.zip(target.chunks_mut(head_dim)) {
                target.copy_from_slice(&row[..head_dim]);
            }
        }
    }
}

impl KvHead<'_> {
    /// The gradients that a tile of queries from `first` of the group's head `member` has or gives.
    #[inline(always)]
    fn queries<S: Simd, const HIGH: usize, const WIDE: usize>(
        &self,
        simd: S,
        member: usize,
        first: usize,
        d_query: &mut [f32],
        sums: &mut Sums<S>,
    ) {
        let problem = self.problem;
        let head_dim = problem.head_dim;
        let lanes = WIDE * S::F32_LANES;
        let zero = [simd.splat_f32s(0.0); WIDE];
        let one = [simd.splat_f32s(1.0); WIDE];
        let n = d_query.len() / head_dim;
        let head = self.kv_head * (problem.n_heads / problem.n_kv_heads) + member;
        let batch = self.kv_head / problem.n_kv_heads;
        let row = head * problem.n_queries + first;
        let [queries, gradients, outputs] = [problem.query, self.gradient, self.output]
            .map(|x| &x[row * head_dim..(row + n) * head_dim]);
        let query_lanes = transposed(simd, queries, head_dim, problem.scale());
        let gradient_lanes = transposed(simd, gradients, head_dim, 1.0);
        let query_rows = padded::<S>(simd, queries, head_dim);
        let gradient_rows = padded::<S>(simd, gradients, head_dim);
        let (mut dots, mut log_sums) = (zero, zero);
        let numbers: &mut [f32] = cast_slice_mut(&mut log_sums);
        numbers[..n].copy_from_slice(&self.log_sums[row..][..n]);
        let numbers: &mut [f32] = cast_slice_mut(&mut dots);
        let rows = gradients.chunks(head_dim).zip(outputs.chunks(head_dim));
        for (dot, (gradient, output)) in numbers.iter_mut().zip(rows) {
            *dot = simd::dot(simd, gradient, output);
        }

        let factor = simd.splat_f32s((head_dim as f32).sqrt().recip());
        let mut query_sums = vec![zero; head_dim];
        let (mut probabilities, mut d_scores) = ([zero; TILE], [zero; TILE]);
        let start = problem.visible(batch, first).start;
        let end = problem.visible(batch, first + n - 1).end;
        for start in (start..end).step_by(TILE) {
            let range = start..(start + TILE).min(end);
            let tile = range.start * head_dim..range.end * head_dim;
            let (keys, values) = (&self.key[tile.clone()], &self.value[tile]);
            let probabilities = &mut probabilities[..range.len()];
            let d_scores = &mut d_scores[..range.len()];
            scores_of::<S, HIGH, WIDE>(simd, keys, &query_lanes, probabilities);
            scores_of::<S, HIGH, WIDE>(simd, values, &gradient_lanes, d_scores);
            for (p, d_score) in probabilities.iter_mut().zip(d_scores.iter_mut()) {
                for i in 0..WIDE {
                    p[i] = simd::exp2(simd, simd.sub_f32s(p[i], log_sums[i]));
                    let slope = simd.mul_f32s(simd.sub_f32s(d_score[i], dots[i]), factor);
                    d_score[i] = simd.mul_f32s(p[i], slope);
                }
            }
            let p: &mut [f32] = cast_slice_mut(&mut *probabilities);
            let d_score: &mut [f32] = cast_slice_mut(&mut *d_scores);
            problem.for_each_hidden(batch, first..first + n, range.clone(), |query, key| {
                p[key * lanes + query] = 0.0;
                d_score[key * lanes + query] = 0.0;
            });
            add_values::<S, HIGH, WIDE>(simd, keys, d_scores, one, &mut query_sums);
            let place = range.start * sums.vectors..range.end * sums.vectors;
            let d_keys = &mut sums.d_key[place.clone()];
            add_rows::<S, HIGH, WIDE>(simd, d_scores, &query_rows, sums.vectors, d_keys);
            let d_values = &mut sums.d_value[place];
            add_rows::<S, HIGH, WIDE>(simd, probabilities, &gradient_rows, sums.vectors, d_values);
        }
        in_rows::<S, WIDE>(&query_sums, d_query);
    }
}

/// Gradients of one head's keys and values, rows of `vectors` vectors.
struct Sums<S: Simd> {
    d_key: Vec<S::f32s>,
    d_value: Vec<S::f32s>,
    vectors: usize,
}

/// Rows of whole vectors, 0 beyond the last channel.
#[inline(always)]
fn padded<S: Simd>(simd: S, rows: &[f32], head_dim: usize) -> Vec<S::f32s> {
    let vectors = head_dim.div_ceil(S::F32_LANES);
    let mut output = vec![simd.splat_f32s(0.0); rows.len() / head_dim * vectors];
    let numbers: &mut [f32] = cast_slice_mut(&mut output);
    let targets = numbers.chunks_mut(vectors * S::F32_LANES);
    for (target, row) in targets.zip(rows.chunks(head_dim)) {
        target[..head_dim].copy_from_slice(row);
    }
    output
}

/// `sums[key] += Σ_query weights[key][query] · rows[query]`.
#[inline(always)]
fn add_rows<S: Simd, const HIGH: usize, const WIDE: usize>(
    simd: S,
    weights: &[Lanes<S, WIDE>],
    rows: &[S::f32s],
    vectors: usize,
    sums: &mut [S::f32s],
) {
    let blocks = weights.chunks(HIGH).zip(sums.chunks_mut(HIGH * vectors));
    for (weights, sums) in blocks {
        let mut first = 0;
        while first + 2 <= vectors {
            add_block::<S, HIGH, 2, WIDE>(simd, weights, rows, vectors, first, sums);
            first += 2;
        }
        if first < vectors {
            add_block::<S, HIGH, 1, WIDE>(simd, weights, rows, vectors, first, sums);
        }
    }
}

/// Up to HIGH keys and N vectors of channels from `first`, whose sums stay in registers.
#[inline(always)]
fn add_block<S: Simd, const HIGH: usize, const N: usize, const WIDE: usize>(
    simd: S,
    weights: &[Lanes<S, WIDE>],
    rows: &[S::f32s],
    vectors: usize,
    first: usize,
    sums: &mut [S::f32s],
) {
    let n = rows.len() / vectors;
    let last = weights.len() - 1;
    let lanes = WIDE * S::F32_LANES;
    let numbers: &[f32] = cast_slice(weights);
    let mut weights = [numbers; HIGH];
    let mut block = [[simd.splat_f32s(0.0); N]; HIGH];
    for (i, (weights, block)) in weights.iter_mut().zip(&mut block).enumerate() {
        // A row is repeated where the block is not full.
        let key = i.min(last);
        *weights = &numbers[key * lanes..][..n];
        block.copy_from_slice(&sums[key * vectors + first..][..N]);
    }
    for (query, row) in (0..n).zip(rows.chunks_exact(vectors)) {
        let row = &row[first..first + N];
        for (sums, weights) in block.iter_mut().zip(weights) {
            let weight = simd.splat_f32s(weights[query]);
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum = simd.mul_add_f32s(weight, x, *sum);
            }
        }
    }
    for (sums, block) in sums.chunks_mut(vectors).zip(block) {
        sums[first..first + N].copy_from_slice(&block);
    }
}
