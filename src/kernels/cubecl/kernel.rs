//! The kernels themselves, in CubeCL: shared memory and barriers, no planes, which a software device
//! lacks.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// The score of a hidden key. Finite, so that a query that sees no key at all still gets numbers.
const HIDDEN: f32 = -1e30;
/// Units, at most, that share the scores of a query, or its parts, where all of them are looked at.
const LANES: usize = 16;
/// Vectors that a unit reads before it keeps the first of them: reads then overlap.
const IN_FLIGHT: usize = 4;

/// A source of keys or values where it lies, its channels read `N` at a time.
#[derive(CubeType, CubeLaunch)]
pub struct Source<E: Numeric, F: Float, N: Size> {
    /// `[batch, n_kv_heads, keys, head_dim]`.
    rows: Tensor<Vector<E, N>>,
    /// `[batch, n_kv_heads, keys, 1]`; none is one.
    scales: ComptimeOption<Tensor<f32>>,
    /// `[1, n_kv_heads, 1, head_dim]`; none is one.
    weight: ComptimeOption<Tensor<Vector<F, N>>>,
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
    /// Numbers that a unit keeps of the output.
    fn sums_per_unit(&self) -> usize {
        (self.rows * self.head_dim).div_ceil(self.units)
    }

    /// Units that look at the scores of one query.
    fn lanes(&self) -> usize {
        LANES.min(self.units / self.rows)
    }

    /// Bytes of shared memory.
    pub fn shared_bytes(&self) -> usize {
        let queries = self.rows * self.head_dim;
        let tile = self.tile * (self.head_dim + 1);
        let scores = self.rows * self.part;
        let shares = self.units.max(self.rows * self.tile * self.slices);
        (queries + tile + scores + shares) * size_of::<f32>()
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
pub fn attend_part<F: Float, E: Numeric, M: Numeric, N: Size>(
    query: &Tensor<F>,
    keys: &Sequence<Source<E, F, N>>,
    values: &Sequence<Source<E, F, N>>,
    hidden: &ComptimeOption<Tensor<M>>,
    partial: &mut Tensor<f32>,
    first_key: usize,
    #[comptime] form: Form,
    #[define(F, E, M)] _types: [StorageType; 3],
) {
    let head_dim = comptime!(form.head_dim);
    let width = comptime!(form.head_dim + 1);
    let n_rows = comptime!(form.rows);
    let part_len = comptime!(form.part);
    let tile = comptime!(form.tile);
    let slices = comptime!(form.slices);
    let units = comptime!(form.units);
    let lanes = comptime!(form.lanes());
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
    // One column more: neighbouring keys then lie in different banks.
    let mut shared = SharedMemory::<f32>::new(comptime!(form.tile * (form.head_dim + 1)));
    // `[rows, part]`, first scores, then exponentials.
    let mut scores = SharedMemory::<f32>::new(comptime!(form.rows * form.part));
    // What several units have found of one number.
    let mut shares = SharedMemory::<f32>::new(comptime!(
        form.units.max(form.rows * form.tile * form.slices)
    ));
    let mut sums = Array::<f32>::new(comptime!(form.sums_per_unit()));

    let mut i = unit;
    while i < n_rows * head_dim {
        let row = first_row + i / head_dim;
        let mut x = 0.0f32;
        if row < end_row {
            let head = first_head + row / n_queries;
            x = f32::cast_from(
                query[batch * query.stride(0)
                    + head * query.stride(1)
                    + row % n_queries * query.stride(2)
                    + i % head_dim * query.stride(3)],
            ) * f32::new(scale);
        }
        queries[i] = x;
        i += units;
    }

    let first = first_key + part * part_len;
    let mut part_keys = n_keys - first;
    if part_keys > part_len {
        part_keys = part_len.runtime();
    }

    let mut start = 0usize.runtime();
    while start < part_keys {
        let mut len = part_keys - start;
        if len > tile {
            len = tile.runtime();
        }
        // What was read of the tile before is read.
        sync_cube();
        load::<F, E, N>(keys, &mut shared, batch, kv_head, first + start, len, form);
        sync_cube();
        // Neighbouring units take neighbouring keys.
        let mut i = unit;
        while i < n_rows * slices * tile {
            let row = i / tile / slices;
            let slice = i / tile % slices;
            let key = i % tile;
            let mut score = 0.0f32;
            let mut channel = slice;
            while channel < head_dim {
                score += queries[row * head_dim + channel] * shared[key * width + channel];
                channel += slices;
            }
            shares[i] = score;
            i += units;
        }
        sync_cube();
        let mut i = unit;
        while i < n_rows * tile {
            let row = i / tile;
            let key = start + i % tile;
            if key < part_keys {
                let mut score = 0.0f32;
                #[unroll]
                for slice in 0..slices {
                    score += shares[(row * slices + slice) * tile + i % tile];
                }
                let query_index = (first_row + row) % n_queries;
                if comptime!(form.causal) {
                    if first + key + n_queries > n_keys + query_index {
                        score = f32::new(HIDDEN);
                    }
                }
                #[comptime]
                if let ComptimeOption::Some(hidden) = hidden {
                    let at = batch * hidden.stride(0)
                        + query_index * hidden.stride(2)
                        + (first + key) * hidden.stride(3);
                    if u32::cast_from(hidden[at]) != 0 {
                        score = f32::new(HIDDEN);
                    }
                }
                scores[row * part_len + key] = score;
            }
            i += units;
        }
        start += tile;
    }

    // The largest score of every query, then exponentials relative to it and their sum.
    let row = unit / lanes;
    let mut largest = f32::new(HIDDEN);
    let mut exponentials = 0.0f32;
    sync_cube();
    if row < n_rows {
        let mut key = unit % lanes;
        while key < part_keys {
            largest = max(largest, scores[row * part_len + key]);
            key += lanes;
        }
        shares[unit] = largest;
    }
    sync_cube();
    if row < n_rows {
        #[unroll]
        for lane in 0..lanes {
            largest = max(largest, shares[row * lanes + lane]);
        }
        let mut key = unit % lanes;
        while key < part_keys {
            let exponential = (scores[row * part_len + key] - largest).exp();
            scores[row * part_len + key] = exponential;
            exponentials += exponential;
            key += lanes;
        }
    }
    sync_cube();
    if row < n_rows {
        shares[unit] = exponentials;
    }
    sync_cube();
    if row < n_rows && unit.is_multiple_of(lanes) && first_row + row < end_row {
        let mut sum = 0.0f32;
        #[unroll]
        for lane in 0..lanes {
            sum += shares[row * lanes + lane];
        }
        let head = first_head + (first_row + row) / n_queries;
        let query = (batch * n_heads + head) * n_queries + (first_row + row) % n_queries;
        let to = (query * parts + part) * (head_dim + 2) + head_dim;
        partial[to] = sum;
        partial[to + 1] = largest;
    }

    #[unroll]
    for i in 0..comptime!(form.sums_per_unit()) {
        sums[i] = 0.0f32;
    }
    let mut start = 0usize.runtime();
    while start < part_keys {
        let mut len = part_keys - start;
        if len > tile {
            len = tile.runtime();
        }
        sync_cube();
        load::<F, E, N>(
            values,
            &mut shared,
            batch,
            kv_head,
            first + start,
            len,
            form,
        );
        sync_cube();
        #[unroll]
        for i in 0..comptime!(form.sums_per_unit()) {
            let at = unit + i * units;
            if at < n_rows * head_dim {
                let row = at / head_dim;
                let channel = at % head_dim;
                let mut sum = sums[i];
                for key in 0..len {
                    sum += scores[row * part_len + start + key] * shared[key * width + channel];
                }
                sums[i] = sum;
            }
        }
        start += tile;
    }

    #[unroll]
    for i in 0..comptime!(form.sums_per_unit()) {
        let at = unit + i * units;
        let row = first_row + at / head_dim;
        if at < n_rows * head_dim && row < end_row {
            let head = first_head + row / n_queries;
            let query = (batch * n_heads + head) * n_queries + row % n_queries;
            partial[(query * parts + part) * (head_dim + 2) + at % head_dim] = sums[i];
        }
    }
}

/// Keys `start..start + len` of the blend of `sources` into shared memory, `[tile, head_dim + 1]`.
#[cube]
fn load<F: Float, E: Numeric, N: Size>(
    sources: &Sequence<Source<E, F, N>>,
    shared: &mut SharedMemory<f32>,
    batch: usize,
    kv_head: usize,
    start: usize,
    len: usize,
    #[comptime] form: Form,
) {
    let vector = N::value();
    let vectors = comptime!(form.head_dim / vector);
    let width = comptime!(form.head_dim + 1);
    let units = comptime!(form.units);
    let in_flight = comptime!(IN_FLIGHT.min((form.tile * vectors).div_ceil(form.units)));
    let mut held = Array::<Vector<f32, N>>::new(in_flight);
    let mut first = UNIT_POS as usize;
    while first < len * vectors {
        #[unroll]
        for j in 0..in_flight {
            let i = first + j * units;
            if i < len * vectors {
                held[j] =
                    numbers::<F, E, N>(sources, batch, kv_head, start + i / vectors, i % vectors);
            }
        }
        #[unroll]
        for j in 0..in_flight {
            let i = first + j * units;
            if i < len * vectors {
                let to = i / vectors * width + i % vectors * vector;
                #[unroll]
                for channel in 0..vector {
                    shared[to + channel] = held[j][channel];
                }
            }
        }
        first += in_flight * units;
    }
}

/// The `vector`th `N` channels of a key of the blend of `sources`.
#[cube]
fn numbers<F: Float, E: Numeric, N: Size>(
    sources: &Sequence<Source<E, F, N>>,
    batch: usize,
    kv_head: usize,
    key: usize,
    vector: usize,
) -> Vector<f32, N> {
    let mut sum = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for s in 0..sources.len() {
        let source = &sources[s];
        let rows = &source.rows;
        // Strides count numbers, an index vectors.
        let row = batch * rows.stride(0) + kv_head * rows.stride(1) + key * rows.stride(2);
        let mut x = Vector::<f32, N>::cast_from(rows[row / N::value() + vector * rows.stride(3)]);
        #[comptime]
        if let ComptimeOption::Some(scales) = &source.scales {
            let scale = scales
                [batch * scales.stride(0) + kv_head * scales.stride(1) + key * scales.stride(2)];
            x *= Vector::<f32, N>::new(scale);
        }
        #[comptime]
        if let ComptimeOption::Some(weight) = &source.weight {
            let at = kv_head * weight.stride(1) / N::value() + vector * weight.stride(3);
            x *= Vector::<f32, N>::cast_from(weight[at]);
        }
        sum += x;
    }
    sum
}

/// The parts of a query's sums to `output` `[batch, n_heads, queries, head_dim]`, by cubes
/// `[n_heads · queries, batch]`.
#[cube(launch, address_type = "dynamic")]
pub fn merge_parts<F: Float>(
    partial: &Tensor<f32>,
    output: &mut Tensor<F>,
    parts: usize,
    #[comptime] head_dim: usize,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let unit = UNIT_POS as usize;
    let n_heads = output.shape(1);
    let n_queries = output.shape(2);
    let query = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize;
    let width = comptime!(head_dim + 2);
    let lanes = comptime!(LANES.min(units));
    // Units that share a channel.
    let sharers = comptime!((units / head_dim).max(1));
    let from = query * parts * width;
    let mut shares = SharedMemory::<f32>::new(units);
    let mut shared_exponentials = SharedMemory::<f32>::new(units);

    let mut largest = f32::new(HIDDEN);
    if unit < lanes {
        let mut part = unit;
        while part < parts {
            largest = max(largest, partial[from + part * width + head_dim + 1]);
            part += lanes;
        }
        shares[unit] = largest;
    }
    sync_cube();
    #[unroll]
    for lane in 0..lanes {
        largest = max(largest, shares[lane]);
    }

    let to = query / n_queries / n_heads * output.stride(0)
        + query / n_queries % n_heads * output.stride(1)
        + query % n_queries * output.stride(2);
    let mut first = 0usize.runtime();
    while first < head_dim {
        let channel = first + unit / sharers;
        let mut sum = 0.0f32;
        let mut exponentials = 0.0f32;
        if channel < head_dim {
            let mut part = unit % sharers;
            while part < parts {
                let at = from + part * width;
                let factor = (partial[at + head_dim + 1] - largest).exp();
                sum += factor * partial[at + channel];
                exponentials += factor * partial[at + head_dim];
                part += sharers;
            }
        }
        sync_cube();
        shares[unit] = sum;
        shared_exponentials[unit] = exponentials;
        sync_cube();
        if channel < head_dim && unit.is_multiple_of(sharers) {
            let mut sum = 0.0f32;
            let mut exponentials = 0.0f32;
            #[unroll]
            for sharer in 0..sharers {
                sum += shares[unit + sharer];
                exponentials += shared_exponentials[unit + sharer];
            }
            output[to + channel * output.stride(3)] = F::cast_from(sum / exponentials);
        }
        first += comptime!(units / sharers);
    }
}
