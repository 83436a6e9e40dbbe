//! The kernel itself, in CubeCL: scalars only, shared memory and barriers, no planes, which a
//! software device lacks.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// The score of a hidden key. Finite, so that a query that sees no key at all still gets numbers.
const HIDDEN: f32 = -1e30;

/// A source of keys or values where it lies.
#[derive(CubeType, CubeLaunch)]
pub struct Source<E: Numeric> {
    /// `[batch, n_kv_heads, keys, head_dim]`.
    rows: Tensor<E>,
    /// `[batch, n_kv_heads, keys, 1]`; none is one.
    scales: ComptimeOption<Tensor<f32>>,
    /// `[1, n_kv_heads, 1, head_dim]`; none is one.
    weight: ComptimeOption<Tensor<f32>>,
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    pub head_dim: usize,
    /// Queries of a kv head, all heads of its group, that a cube takes.
    pub rows: usize,
    /// Keys that a cube takes.
    pub part: usize,
    /// Keys in shared memory at a time.
    pub tile: usize,
    /// Units that share a score.
    pub slices: usize,
    pub units: usize,
    /// The last query stands at the last key, and no query sees a later one than its own.
    pub causal: bool,
}

impl Form {
    /// Numbers that a unit keeps of the output: a query has its channels and the sum of its
    /// exponentials.
    fn sums_per_unit(&self) -> usize {
        (self.rows * (self.head_dim + 1)).div_ceil(self.units)
    }

    /// Bytes of shared memory.
    pub fn shared_bytes(&self) -> usize {
        let queries = self.rows * self.head_dim;
        let tile = self.tile * (self.head_dim + 1);
        let scores = self.rows * self.tile * self.slices;
        (queries + tile + scores + 2 * self.rows) * size_of::<f32>()
    }
}

/// Attention of a block of queries over one part of the keys, by cubes
/// `[kv heads · blocks of rows, batch, parts]`.
///
/// `partial` is `[batch, n_heads, queries, parts, head_dim + 2]`: sums of values and of exponentials
/// relative to the largest score, and that score.
#[cube(launch, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
#[allow(
    clippy::collapsible_if,
    reason = "the outer condition is the compiler's"
)]
pub fn attend_part<E: Numeric, M: Numeric>(
    query: &Tensor<f32>,
    keys: &Sequence<Source<E>>,
    values: &Sequence<Source<E>>,
    hidden: &ComptimeOption<Tensor<M>>,
    partial: &mut Tensor<f32>,
    first_key: usize,
    #[comptime] form: Form,
    #[define(E, M)] _types: [StorageType; 2],
) {
    let head_dim = comptime!(form.head_dim);
    let width = comptime!(form.head_dim + 1);
    let n_rows = comptime!(form.rows);
    let tile = comptime!(form.tile);
    let slices = comptime!(form.slices);
    let units = comptime!(form.units);
    let scale = comptime!((form.head_dim as f32).sqrt().recip());

    let unit = UNIT_POS as usize;
    let n_kv_heads = keys[0].rows.shape(1);
    let n_keys = keys[0].rows.shape(2);
    let kv_head = CUBE_POS_X as usize % n_kv_heads;
    let batch = CUBE_POS_Y as usize;
    let part = CUBE_POS_Z as usize;
    let parts = CUBE_COUNT_Z as usize;
    let n_heads = query.shape(1);
    let n_queries = query.shape(2);
    let first_row = CUBE_POS_X as usize / n_kv_heads * n_rows;
    let end_row = n_heads / n_kv_heads * n_queries;
    let first_head = n_heads / n_kv_heads * kv_head;

    let mut queries = SharedMemory::<f32>::new(comptime!(form.rows * form.head_dim));
    // One column more, of ones: neighbouring keys then lie in different banks, and the sum of
    // exponentials is one channel of the output.
    let mut shared = SharedMemory::<f32>::new(comptime!(form.tile * (form.head_dim + 1)));
    let mut scores = SharedMemory::<f32>::new(comptime!(form.rows * form.tile * form.slices));
    let mut largest = SharedMemory::<f32>::new(n_rows);
    let mut shrink = SharedMemory::<f32>::new(n_rows);
    let mut sums = Array::<f32>::new(comptime!(form.sums_per_unit()));

    let mut i = unit;
    while i < n_rows * head_dim {
        let row = first_row + i / head_dim;
        let mut x = 0.0f32;
        if row < end_row {
            let head = first_head + row / n_queries;
            x = query[batch * query.stride(0)
                + head * query.stride(1)
                + row % n_queries * query.stride(2)
                + i % head_dim * query.stride(3)]
                * f32::new(scale);
        }
        queries[i] = x;
        i += units;
    }
    if unit < n_rows {
        largest[unit] = f32::new(HIDDEN);
    }
    #[unroll]
    for i in 0..comptime!(form.sums_per_unit()) {
        sums[i] = 0.0f32;
    }

    let mut start = first_key + part * comptime!(form.part);
    let mut end = start + comptime!(form.part);
    if end > n_keys {
        end = n_keys;
    }
    while start < end {
        let mut len = end - start;
        if len > tile {
            len = tile.runtime();
        }
        // What was read of the tile before is read.
        sync_cube();
        load::<E>(keys, &mut shared, batch, kv_head, start, len, form);
        sync_cube();
        let mut i = unit;
        while i < n_rows * tile * slices {
            let slice = i % slices;
            let row = i / slices / tile;
            let key = i / slices % tile;
            let mut score = 0.0f32;
            let mut channel = slice;
            while channel < head_dim {
                score += queries[row * head_dim + channel] * shared[key * width + channel];
                channel += slices;
            }
            scores[i] = score;
            i += units;
        }
        sync_cube();
        load::<E>(values, &mut shared, batch, kv_head, start, len, form);
        // The first slice of a score becomes the whole one.
        let mut i = unit;
        while i < n_rows * tile {
            let key = start + i % tile;
            let query_index = (first_row + i / tile) % n_queries;
            let mut score = 0.0f32;
            #[unroll]
            for slice in 0..slices {
                score += scores[i * slices + slice];
            }
            if comptime!(form.causal) {
                if key + n_queries > n_keys + query_index {
                    score = f32::new(HIDDEN);
                }
            }
            #[comptime]
            if let ComptimeOption::Some(hidden) = hidden {
                if key < end {
                    let at = batch * hidden.stride(0)
                        + query_index * hidden.stride(2)
                        + key * hidden.stride(3);
                    if u32::cast_from(hidden[at]) != 0 {
                        score = f32::new(HIDDEN);
                    }
                }
            }
            scores[i * slices] = score;
            i += units;
        }
        sync_cube();
        if unit < n_rows {
            let before = largest[unit];
            let mut now = before;
            for key in 0..len {
                now = max(now, scores[(unit * tile + key) * slices]);
            }
            largest[unit] = now;
            shrink[unit] = (before - now).exp();
        }
        sync_cube();
        let mut i = unit;
        while i < n_rows * tile {
            scores[i * slices] = (scores[i * slices] - largest[i / tile]).exp();
            i += units;
        }
        sync_cube();
        #[unroll]
        for i in 0..comptime!(form.sums_per_unit()) {
            let at = unit + i * units;
            if at < n_rows * width {
                let row = at / width;
                let channel = at % width;
                let mut sum = sums[i] * shrink[row];
                for key in 0..len {
                    sum += scores[(row * tile + key) * slices] * shared[key * width + channel];
                }
                sums[i] = sum;
            }
        }
        start += tile;
    }

    #[unroll]
    for i in 0..comptime!(form.sums_per_unit()) {
        let at = unit + i * units;
        let row = first_row + at / width;
        if at < n_rows * width && row < end_row {
            let head = first_head + row / n_queries;
            let query = (batch * n_heads + head) * n_queries + row % n_queries;
            let to = (query * parts + part) * (width + 1);
            let channel = at % width;
            partial[to + channel] = sums[i];
            if channel == 0 {
                partial[to + width] = largest[at / width];
            }
        }
    }
}

/// Keys `start..start + len` of the blend of `sources` into shared memory, `[tile, head_dim + 1]`,
/// and 1 into the last column.
#[cube]
fn load<E: Numeric>(
    sources: &Sequence<Source<E>>,
    shared: &mut SharedMemory<f32>,
    batch: usize,
    kv_head: usize,
    start: usize,
    len: usize,
    #[comptime] form: Form,
) {
    let head_dim = comptime!(form.head_dim);
    let width = comptime!(form.head_dim + 1);
    let mut i = UNIT_POS as usize;
    while i < len * width {
        let key = start + i / width;
        let channel = i % width;
        let mut x = 1.0f32;
        if channel < head_dim {
            x = 0.0f32;
            #[unroll]
            for s in 0..sources.len() {
                x += number::<E>(&sources[s], batch, kv_head, key, channel);
            }
        }
        shared[i] = x;
        i += comptime!(form.units);
    }
}

/// A number of a source, widened and weighted.
#[cube]
fn number<E: Numeric>(
    source: &Source<E>,
    batch: usize,
    kv_head: usize,
    key: usize,
    channel: usize,
) -> f32 {
    let rows = &source.rows;
    let mut x = f32::cast_from(
        rows[batch * rows.stride(0)
            + kv_head * rows.stride(1)
            + key * rows.stride(2)
            + channel * rows.stride(3)],
    );
    #[comptime]
    if let ComptimeOption::Some(scales) = &source.scales {
        x *= scales[batch * scales.stride(0) + kv_head * scales.stride(1) + key * scales.stride(2)];
    }
    #[comptime]
    if let ComptimeOption::Some(weight) = &source.weight {
        x *= weight[kv_head * weight.stride(1) + channel * weight.stride(3)];
    }
    x
}

/// The parts of every query's sums to `output` `[batch, n_heads, queries, head_dim]`, a unit per
/// number of it.
#[cube(launch, address_type = "dynamic")]
pub fn merge_parts(
    partial: &Tensor<f32>,
    output: &mut Tensor<f32>,
    parts: usize,
    #[comptime] head_dim: usize,
) {
    let n_heads = output.shape(1);
    let n_queries = output.shape(2);
    let query = ABSOLUTE_POS / head_dim;
    let channel = ABSOLUTE_POS % head_dim;
    if query >= output.shape(0) * n_heads * n_queries {
        terminate!();
    }
    let width = comptime!(head_dim + 2);
    let from = query * parts * width;
    let mut largest = f32::new(HIDDEN);
    for part in 0..parts {
        largest = max(largest, partial[from + part * width + head_dim + 1]);
    }
    let mut sum = 0.0f32;
    let mut exponentials = 0.0f32;
    for part in 0..parts {
        let at = from + part * width;
        let factor = (partial[at + head_dim + 1] - largest).exp();
        sum += factor * partial[at + channel];
        exponentials += factor * partial[at + head_dim];
    }
    let to = query / n_queries / n_heads * output.stride(0)
        + query / n_queries % n_heads * output.stride(1)
        + query % n_queries * output.stride(2)
        + channel * output.stride(3);
    output[to] = sum / exponentials;
}
