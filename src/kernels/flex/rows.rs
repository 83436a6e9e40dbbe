//! Matrices as products read them, row by row: floats, or integers in groups.

use std::ops::Range;

use burn::tensor::{DType, Tensor, backend::Backend};
use burn_flex::FlexTensor;
use half::f16;
use pulp::Simd;

use super::narrow::{Numbers, Rows};
use super::widen::{Coded, Int4, Int8, widen_f16};
use super::{float_tensor, int_tensor};
use crate::kernels::packed::{Codes, GROUP, Packed};

/// A matrix that can be widened to f32.
pub(super) trait Matrix: Copy + Sync {
    fn columns(&self) -> usize;

    /// A row as f32.
    fn widen<S: Simd>(&self, simd: S, row: usize, to: &mut [f32]);
}

/// A matrix of floats. None if it does not lie in one piece, row after row, or is of other floats.
pub(super) fn floats(matrix: &FlexTensor) -> Option<Rows<'_>> {
    let numbers = match matrix.dtype() {
        DType::F32 => Numbers::F32(matrix.as_slice()?),
        DType::F16 => Numbers::F16(matrix.as_slice()?),
        DType::BF16 => Numbers::Bf16(matrix.as_slice()?),
        _ => return None,
    };
    let columns = matrix.layout().shape()[1];
    Some(Rows::new(numbers, columns, columns))
}

impl Matrix for Rows<'_> {
    fn columns(&self) -> usize {
        self.width()
    }

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, row: usize, to: &mut [f32]) {
        Rows::widen(self, simd, row..row + 1, to);
    }
}

/// The tensors of a packed matrix.
pub(super) struct GroupStorage {
    kind: Codes,
    columns: usize,
    bytes: FlexTensor,
    scales: FlexTensor,
    offsets: Option<FlexTensor>,
}

/// A matrix in groups, row after row.
#[derive(Clone, Copy)]
pub(super) struct Groups<'a> {
    kind: Codes,
    columns: usize,
    bytes: &'a [i8],
    scales: &'a [f16],
    offsets: Option<&'a [f16]>,
}

impl GroupStorage {
    /// Of a packed matrix whose groups are of inputs: one row per output.
    pub fn of_outputs<B: Backend>(matrix: &Packed<B>) -> Option<Self> {
        if !matrix.transposed {
            return None;
        }
        let floats = |tensor: &Tensor<B, 2>| {
            let tensor = float_tensor(tensor)?.to_contiguous();
            (tensor.dtype() == DType::F16).then_some(tensor)
        };
        let offsets = match &matrix.offsets {
            None => None,
            Some(offsets) => Some(floats(offsets)?),
        };
        Some(Self {
            kind: matrix.kind,
            columns: matrix.columns,
            bytes: int_tensor(&matrix.codes)?.to_contiguous(),
            scales: floats(&matrix.scales)?,
            offsets,
        })
    }

    pub fn groups(&self) -> Option<Groups<'_>> {
        let offsets = match &self.offsets {
            None => None,
            Some(offsets) => Some(offsets.as_slice()?),
        };
        Some(Groups {
            kind: self.kind,
            columns: self.columns,
            bytes: self.bytes.as_slice()?,
            scales: self.scales.as_slice()?,
            offsets,
        })
    }
}

impl<'a> Groups<'a> {
    pub fn codes(&self) -> Codes {
        self.kind
    }

    pub fn rows(&self) -> usize {
        self.scales.len() / self.per_row()
    }

    /// Groups of a row.
    pub fn per_row(&self) -> usize {
        self.columns.div_ceil(GROUP)
    }

    /// The bytes of some rows.
    pub fn bytes(&self, rows: Range<usize>) -> &'a [i8] {
        let per_row = self.per_row() * self.kind.bytes();
        &self.bytes[rows.start * per_row..rows.end * per_row]
    }

    /// The scales of the groups of some rows.
    pub fn scales(&self, rows: Range<usize>) -> &'a [f16] {
        &self.scales[rows.start * self.per_row()..rows.end * self.per_row()]
    }

    /// The offsets of such groups, if they have any.
    pub fn offsets(&self, rows: Range<usize>) -> Option<&'a [f16]> {
        let groups = rows.start * self.per_row()..rows.end * self.per_row();
        self.offsets.map(|offsets| &offsets[groups])
    }

    #[inline(always)]
    fn widen_coded<S: Simd, C: Coded>(&self, simd: S, row: usize, to: &mut [f32]) {
        let groups = self.bytes(row..row + 1).chunks_exact(C::CODES.bytes());
        let scales = self.scales(row..row + 1);
        let offsets = self.offsets(row..row + 1);
        for (g, (to, bytes)) in to.chunks_mut(GROUP).zip(groups).enumerate() {
            let scale = simd.splat_f32s(widen_f16(scales[g]));
            let offset = offsets.map_or(0.0, |offsets| widen_f16(offsets[g]));
            let offset = simd.splat_f32s(offset);
            let mut group = [0.0; GROUP];
            let (vectors, _) = S::as_mut_simd_f32s(&mut group);
            for (i, vector) in vectors.iter_mut().enumerate() {
                let codes = C::vector(simd, bytes, i * S::F32_LANES);
                *vector = simd.mul_add_f32s(codes, scale, offset);
            }
            to.copy_from_slice(&group[..to.len()]);
        }
    }
}

impl Matrix for Groups<'_> {
    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, row: usize, to: &mut [f32]) {
        match self.kind {
            Codes::Int8 => self.widen_coded::<S, Int8>(simd, row, to),
            Codes::Int4 => self.widen_coded::<S, Int4>(simd, row, to),
        }
    }
}
