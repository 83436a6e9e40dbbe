//! Stored keys or values as the kernels read them: tiles of rows of f32.

use std::ops::Range;

use burn::tensor::{DType, backend::Backend};
use burn_flex::FlexTensor;
use half::{bf16, f16};

use pulp::Simd;

use super::super::widen;
use super::super::{float_tensor, int_tensor};
use crate::kernels::stored::Stored;

/// Keys or values of one layer, `[batch, n_kv_heads, keys, head_dim]`, channels side by side.
pub(super) struct Storage {
    numbers: FlexTensor,
    /// `[batch, n_kv_heads, keys, 1]`, where the numbers are 8-bit codes.
    scales: Option<FlexTensor>,
}

/// The rows of one kv head, one per key.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    numbers: Numbers<'a>,
    /// From one row to the next.
    stride: usize,
    head_dim: usize,
}

#[derive(Clone, Copy)]
enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    /// Codes, and a scale per row.
    Int8(&'a [i8], &'a [f32]),
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
        // Everything but transposed rows is read where it lies.
        let in_rows = |tensor: FlexTensor| match tensor.layout().strides() {
            [batch, head, row, 1] if [*batch, *head, *row].iter().all(|s| *s >= 0) => tensor,
            _ => tensor.to_contiguous(),
        };
        readable.then(|| Self {
            numbers: in_rows(numbers),
            scales: scales.map(in_rows),
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
        Rows {
            numbers,
            stride: layout.strides()[2].unsigned_abs(),
            head_dim: layout.shape()[3],
        }
    }
}

/// Where a head's first row starts.
fn start_of(tensor: &FlexTensor, batch: usize, kv_head: usize) -> usize {
    let layout = tensor.layout();
    let strides = layout.strides();
    layout.start_offset() + batch * strides[0].unsigned_abs() + kv_head * strides[1].unsigned_abs()
}

/// Numbers that are widened at a time for few queries: they stay in the first-level cache.
const WIDENED: usize = 1 << 12;

impl<'a> Rows<'a> {
    /// Rows that are best asked for at a time, where they are read again and again.
    pub fn at_once(&self) -> usize {
        match self.lie_as_read() {
            true => usize::MAX,
            false => (WIDENED / self.head_dim).max(1),
        }
    }

    fn lie_as_read(&self) -> bool {
        matches!(self.numbers, Numbers::F32(_)) && self.stride == self.head_dim
    }

    /// Rows `range` one behind the other: as they lie if they do, else converted in `scratch`, which
    /// grows to the largest tile.
    #[inline(always)]
    pub fn tile<'t, S: Simd>(
        &self,
        simd: S,
        range: Range<usize>,
        scratch: &'t mut Vec<f32>,
    ) -> &'t [f32]
    where
        'a: 't,
    {
        let (stride, width) = (self.stride, self.head_dim);
        let len = range.len() * width;
        if let Numbers::F32(rows) = self.numbers
            && self.lie_as_read()
        {
            return &rows[range.start * stride..][..len];
        }
        let scratch = grown(scratch, len);
        let rows = scratch.chunks_exact_mut(width).zip(range);
        match self.numbers {
            Numbers::F32(numbers) => {
                for (to, key) in rows {
                    to.copy_from_slice(&numbers[key * stride..][..width]);
                }
            }
            Numbers::F16(numbers) => {
                for (to, key) in rows {
                    widen::f16s(simd, &numbers[key * stride..][..width], to);
                }
            }
            Numbers::Bf16(numbers) => {
                for (to, key) in rows {
                    widen::bf16s(&numbers[key * stride..][..width], to);
                }
            }
            Numbers::Int8(numbers, scales) => {
                for (to, key) in rows {
                    widen::scaled(simd, &numbers[key * stride..][..width], scales[key], to);
                }
            }
        }
        scratch
    }
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

    /// [`Rows::tile`] of the blend.
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
            return rows.tile(simd, range, source);
        }
        let width = self.0.first().map_or(0, |(rows, _)| rows.head_dim);
        let blend = grown(blend, range.len() * width);
        blend.fill(0.0);
        for (rows, weight) in &self.0 {
            let tile = rows.tile(simd, range.clone(), source);
            match weight {
                None => blend.iter_mut().zip(tile).for_each(|(sum, x)| *sum += x),
                Some(weight) => {
                    let rows = blend.chunks_exact_mut(width).zip(tile.chunks_exact(width));
                    for (sums, row) in rows {
                        let terms = sums.iter_mut().zip(row).zip(*weight);
                        terms.for_each(|((sum, x), w)| *sum += x * w);
                    }
                }
            }
        }
        blend
    }
}
