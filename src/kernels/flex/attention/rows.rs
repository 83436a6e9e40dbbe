//! Stored keys or values as the kernels read them: rows of any type, or tiles of rows of f32.

use std::ops::Range;

use burn::tensor::{DType, backend::Backend};
use burn_flex::FlexTensor;
use pulp::Simd;

use super::super::narrow::{Numbers, Rows};
use super::super::{float_tensor, int_tensor};
use crate::kernels::stored::Stored;

/// Keys or values of one layer, `[batch, n_kv_heads, keys, head_dim]`, channels side by side.
pub(super) struct Storage {
    numbers: FlexTensor,
    /// `[batch, n_kv_heads, keys, 1]`, where the numbers are 8-bit codes.
    scales: Option<FlexTensor>,
}

impl Storage {
    pub fn new<B: Backend>(stored: &Stored<B>) -> Option<Self> {
        let (numbers, scales) = match stored {
            Stored::Float(tensor) => (float_tensor(tensor)?, None),
            Stored::Int8 { codes, scales } => (int_tensor(codes)?, Some(float_tensor(scales)?)),
        };
        let readable = matches!(
            (numbers.dtype(), scales.as_ref().map(FlexTensor::dtype)),
            (DType::F32 | DType::F16 | DType::BF16, None) | (DType::I8, Some(DType::F32))
        );
        // Everything but transposed rows is read where it lies, and scales if a head's are one behind the other.
        let in_rows = |tensor: FlexTensor| match tensor.layout().strides() {
            [batch, head, row, 1] if [*batch, *head, *row].iter().all(|s| *s >= 0) => tensor,
            _ => tensor.to_contiguous(),
        };
        let in_a_row = |tensor: FlexTensor| match tensor.layout().strides() {
            [batch, head, 1, _] if [*batch, *head].iter().all(|s| *s >= 0) => tensor,
            _ => tensor.to_contiguous(),
        };
        readable.then(|| Self {
            numbers: in_rows(numbers),
            scales: scales.map(in_a_row),
        })
    }

    /// f32 in one piece.
    #[cfg(feature = "train")]
    pub fn plain(numbers: FlexTensor) -> Self {
        Self {
            numbers,
            scales: None,
        }
    }

    /// The rows of one kv head, one per key.
    pub fn rows(&self, batch: usize, kv_head: usize) -> Rows<'_> {
        let layout = self.numbers.layout();
        let start = start_of(&self.numbers, batch, kv_head);
        let numbers = match (self.numbers.dtype(), &self.scales) {
            (DType::F16, _) => Numbers::F16(&self.numbers.storage()[start..]),
            (DType::BF16, _) => Numbers::Bf16(&self.numbers.storage()[start..]),
            (_, Some(scales)) => Numbers::Int8(
                &self.numbers.storage()[start..],
                &scales.storage()[start_of(scales, batch, kv_head)..],
            ),
            (_, None) => Numbers::F32(&self.numbers.storage()[start..]),
        };
        let stride = layout.strides()[2].unsigned_abs();
        Rows::new(numbers, stride, layout.shape()[3])
    }
}

/// Where a head's first row starts.
fn start_of(tensor: &FlexTensor, batch: usize, kv_head: usize) -> usize {
    let layout = tensor.layout();
    let strides = layout.strides();
    layout.start_offset() + batch * strides[0].unsigned_abs() + kv_head * strides[1].unsigned_abs()
}

/// Rows one behind the other: as they lie if they do, else converted in `scratch`, which grows to the
/// largest tile.
#[inline(always)]
fn tile<'t, S: Simd>(
    simd: S,
    rows: &Rows<'t>,
    range: Range<usize>,
    scratch: &'t mut Vec<f32>,
) -> &'t [f32] {
    if let Some(tile) = rows.as_they_lie(range.clone()) {
        return tile;
    }
    let scratch = grown(scratch, range.len() * rows.width());
    rows.widen(simd, range, scratch);
    scratch
}

/// The first `len` numbers of a buffer that is made as long as need be.
#[inline(always)]
fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Rows of one kv head, each source's times its weight, added up.
pub(super) struct Blend<'a>(Vec<(Rows<'a>, Option<&'a [f32]>)>);

/// Space for tiles that are not read where they lie.
#[derive(Default)]
pub(super) struct Scratch {
    source: Vec<f32>,
    blend: Vec<f32>,
}

impl<'a> Blend<'a> {
    pub fn new(sources: Vec<(Rows<'a>, Option<&'a [f32]>)>) -> Self {
        Self(sources)
    }

    /// [`tile`] of the blend.
    #[inline(always)]
    pub fn tile<'t, S: Simd>(
        &self,
        simd: S,
        range: Range<usize>,
        scratch: &'t mut Scratch,
    ) -> &'t [f32]
    where
        'a: 't,
    {
        let Scratch { source, blend } = scratch;
        if let [(rows, None)] = self.0[..] {
            return tile(simd, &rows, range, source);
        }
        let width = self.0.first().map_or(0, |(rows, _)| rows.width());
        let blend = grown(blend, range.len() * width);
        for (i, (rows, weight)) in self.0.iter().enumerate() {
            let tile = tile(simd, rows, range.clone(), source);
            match i {
                0 => add_weighted::<S, true>(simd, tile, *weight, width, blend),
                _ => add_weighted::<S, false>(simd, tile, *weight, width, blend),
            }
        }
        blend
    }
}

/// `sums[row] += weight ⊙ rows[row]`, or `=` for the first of the terms; no weight is one.
#[inline(always)]
fn add_weighted<S: Simd, const FIRST: bool>(
    simd: S,
    rows: &[f32],
    weight: Option<&[f32]>,
    width: usize,
    sums: &mut [f32],
) {
    let vectors = width / S::F32_LANES;
    if vectors * S::F32_LANES != width {
        for (sums, row) in sums.chunks_exact_mut(width).zip(rows.chunks_exact(width)) {
            let pairs = sums.iter_mut().zip(row);
            match weight {
                Some(weight) => {
                    for ((sum, x), w) in pairs.zip(weight) {
                        *sum = if FIRST { x * w } else { *sum + x * w };
                    }
                }
                None => {
                    for (sum, x) in pairs {
                        *sum = if FIRST { *x } else { *sum + x };
                    }
                }
            }
        }
        return;
    }
    let (sums, _) = S::as_mut_simd_f32s(sums);
    let (rows, _) = S::as_simd_f32s(rows);
    let weight = weight.map(|weight| S::as_simd_f32s(weight).0);
    for channels in 0..vectors {
        let factor = match weight {
            Some(weight) => weight[channels],
            None => simd.splat_f32s(1.0),
        };
        let rows = rows.chunks_exact(vectors);
        for (sums, row) in sums.chunks_exact_mut(vectors).zip(rows) {
            sums[channels] = match FIRST {
                true => simd.mul_f32s(factor, row[channels]),
                false => simd.mul_add_f32s(factor, row[channels], sums[channels]),
            };
        }
    }
}
