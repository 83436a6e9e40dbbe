//! Matrices as products read them: rows of f32, which lie in memory or are widened.

use std::ops::Range;

use burn::tensor::{DType, Tensor, backend::Backend};
use burn_flex::FlexTensor;
use half::{bf16, f16};

use super::simd::{widen_bf16, widen_f16};
use super::{float_tensor, int_tensor};
use crate::kernels::packed::{Codes, GROUP, Packed};

/// A matrix whose rows are the columns of a product's `[input, output]` weight, each in one piece.
pub(super) struct RowStorage {
    numbers: FlexTensor,
    /// Of matrices in groups: scales, and offsets.
    groups: Option<(Codes, FlexTensor, Option<FlexTensor>)>,
    columns: usize,
}

/// The numbers of a [`RowStorage`].
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    numbers: Numbers<'a>,
    columns: usize,
}

#[derive(Clone, Copy)]
enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    Int8(&'a [i8], &'a [f16]),
    Int4(&'a [i8], &'a [f16], &'a [f16]),
}

impl RowStorage {
    /// The transpose of a float matrix `[input, output]`, if that lies in one piece.
    pub fn transposed<B: Backend>(weight: &Tensor<B, 2>) -> Option<Self> {
        let numbers = float_tensor(weight)?.transpose(0, 1);
        let readable = matches!(numbers.dtype(), DType::F32 | DType::F16 | DType::BF16);
        (readable && numbers.is_contiguous()).then(|| Self {
            columns: numbers.layout().shape()[1],
            numbers,
            groups: None,
        })
    }

    /// Of a packed matrix `[input, output]`, the one whose transpose it is.
    pub fn packed<B: Backend>(weight: &Packed<B>) -> Option<Self> {
        let float = |tensor| {
            let tensor = float_tensor(tensor)?;
            (tensor.dtype() == DType::F16).then(|| tensor.to_contiguous())
        };
        if !weight.transposed {
            return None;
        }
        let offsets = match &weight.offsets {
            None => None,
            Some(offsets) => Some(float(offsets)?),
        };
        Some(Self {
            numbers: int_tensor(&weight.codes)?.to_contiguous(),
            groups: Some((weight.kind, float(&weight.scales)?, offsets)),
            columns: weight.columns,
        })
    }

    pub fn is_f32(&self) -> bool {
        self.numbers.dtype() == DType::F32
    }

    pub fn rows(&self) -> Option<Rows<'_>> {
        let numbers = match (&self.groups, self.numbers.dtype()) {
            (None, DType::F16) => Numbers::F16(self.numbers.as_slice()?),
            (None, DType::BF16) => Numbers::Bf16(self.numbers.as_slice()?),
            (None, _) => Numbers::F32(self.numbers.as_slice()?),
            (Some((codes, scales, offsets)), _) => {
                let (numbers, scales) = (self.numbers.as_slice()?, scales.as_slice()?);
                match (codes, offsets) {
                    (Codes::Int8, _) => Numbers::Int8(numbers, scales),
                    (Codes::Int4, offsets) => {
                        Numbers::Int4(numbers, scales, offsets.as_ref()?.as_slice()?)
                    }
                }
            }
        };
        Some(Rows {
            numbers,
            columns: self.columns,
        })
    }
}

impl Rows<'_> {
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Columns `range` of a row, which begin with a group: as they lie if they are f32, else widened
    /// in `scratch`, which is as long.
    #[inline(always)]
    pub fn piece<'t>(
        &'t self,
        row: usize,
        range: Range<usize>,
        scratch: &'t mut [f32],
    ) -> &'t [f32] {
        let start = row * self.columns + range.start;
        let len = range.len();
        let scratch = &mut scratch[..len];
        match self.numbers {
            Numbers::F32(numbers) => return &numbers[start..][..len],
            Numbers::F16(numbers) => {
                let numbers = &numbers[start..][..len];
                (scratch.iter_mut().zip(numbers)).for_each(|(to, x)| *to = widen_f16(*x));
            }
            Numbers::Bf16(numbers) => {
                let numbers = &numbers[start..][..len];
                (scratch.iter_mut().zip(numbers)).for_each(|(to, x)| *to = widen_bf16(*x));
            }
            Numbers::Int8(bytes, scales) => {
                let first = row * self.columns.div_ceil(GROUP) + range.start / GROUP;
                let groups = bytes[first * GROUP..].chunks_exact(GROUP);
                for ((to, bytes), &scale) in
                    scratch.chunks_mut(GROUP).zip(groups).zip(&scales[first..])
                {
                    let scale = widen_f16(scale);
                    // Whole groups are a loop of known length, which becomes vectors.
                    match <&mut [f32; GROUP]>::try_from(&mut *to) {
                        Ok(to) => int8(bytes, scale, to),
                        Err(_) => int8(bytes, scale, to),
                    }
                }
            }
            Numbers::Int4(bytes, scales, offsets) => {
                const BYTES: usize = Codes::Int4.bytes();
                let first = row * self.columns.div_ceil(GROUP) + range.start / GROUP;
                let groups = bytes[first * BYTES..].chunks_exact(BYTES);
                let steps = scales[first..].iter().zip(&offsets[first..]);
                for ((to, bytes), (&scale, &offset)) in
                    scratch.chunks_mut(GROUP).zip(groups).zip(steps)
                {
                    let (scale, offset) = (widen_f16(scale), widen_f16(offset));
                    let low = |byte: i8| f32::from(byte as u8 & 15).mul_add(scale, offset);
                    let high = |byte: i8| f32::from(byte as u8 >> 4).mul_add(scale, offset);
                    let (to_low, to_high) = to.split_at_mut(BYTES.min(to.len()));
                    match (
                        <&mut [f32; BYTES]>::try_from(&mut *to_low),
                        <&mut [f32; BYTES]>::try_from(&mut *to_high),
                    ) {
                        (Ok(to_low), Ok(to_high)) => {
                            let both = to_low.iter_mut().zip(to_high).zip(bytes);
                            both.for_each(|((to_low, to_high), &byte)| {
                                (*to_low, *to_high) = (low(byte), high(byte));
                            });
                        }
                        _ => {
                            let lows = to_low.iter_mut().zip(bytes);
                            lows.for_each(|(to, &byte)| *to = low(byte));
                            let highs = to_high.iter_mut().zip(bytes);
                            highs.for_each(|(to, &byte)| *to = high(byte));
                        }
                    }
                }
            }
        }
        scratch
    }
}

#[inline(always)]
fn int8(bytes: &[i8], scale: f32, to: &mut [f32]) {
    let numbers = to.iter_mut().zip(bytes);
    numbers.for_each(|(to, &byte)| *to = f32::from(byte) * scale);
}
