//! Matrices as products read them, row by row: floats, or integers in groups.

use std::ops::Range;

use burn::tensor::{DType, Tensor, backend::Backend};
use burn_flex::FlexTensor;
use half::{bf16, f16};
use pulp::Simd;

use super::simd::{self, widen_bf16, widen_f16};
use super::{float_tensor, int_tensor};
use crate::kernels::packed::{Codes, GROUP, Packed};

/// Columns that are widened at a time: they stay in the first-level cache.
pub(super) const PIECE: usize = 1024;

/// A matrix that can be widened to f32.
pub(super) trait Matrix: Copy + Sync {
    fn columns(&self) -> usize;

    /// A row as f32.
    fn widen<S: Simd>(&self, simd: S, row: usize, to: &mut [f32]);
}

/// A matrix of floats, row after row in one piece.
#[derive(Clone, Copy)]
pub(super) struct Floats<'a> {
    numbers: Numbers<'a>,
    columns: usize,
}

#[derive(Clone, Copy)]
enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Floats<'a> {
    /// None if it does not lie in one piece, or is of other floats.
    pub fn new(matrix: &'a FlexTensor) -> Option<Self> {
        let numbers = match matrix.dtype() {
            DType::F32 => Numbers::F32(matrix.as_slice()?),
            DType::F16 => Numbers::F16(matrix.as_slice()?),
            DType::BF16 => Numbers::Bf16(matrix.as_slice()?),
            _ => return None,
        };
        let columns = matrix.layout().shape()[1];
        Some(Self { numbers, columns })
    }

    pub fn is_f32(&self) -> bool {
        matches!(self.numbers, Numbers::F32(_))
    }

    /// Some columns of a row: as they lie if they are f32, else widened in `scratch`, which has room
    /// for them.
    #[inline(always)]
    pub fn piece<'t>(&self, row: usize, range: Range<usize>, scratch: &'t mut [f32]) -> &'t [f32]
    where
        'a: 't,
    {
        let start = row * self.columns + range.start;
        let scratch = &mut scratch[..range.len()];
        match self.numbers {
            Numbers::F32(numbers) => return &numbers[start..][..range.len()],
            Numbers::F16(numbers) => {
                let numbers = &numbers[start..][..range.len()];
                (scratch.iter_mut().zip(numbers)).for_each(|(to, x)| *to = widen_f16(*x));
            }
            Numbers::Bf16(numbers) => {
                let numbers = &numbers[start..][..range.len()];
                (scratch.iter_mut().zip(numbers)).for_each(|(to, x)| *to = widen_bf16(*x));
            }
        }
        scratch
    }
}

impl Matrix for Floats<'_> {
    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    fn widen<S: Simd>(&self, _: S, row: usize, to: &mut [f32]) {
        // What is f32 already is multiplied where it lies.
        self.piece(row, 0..self.columns, to);
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

/// Scales or offsets of the groups of a piece.
pub(super) type OfPiece = [f32; PIECE / GROUP];

impl GroupStorage {
    /// Of a packed matrix, or of the one that it is the transpose of.
    pub fn new<B: Backend>(matrix: &Packed<B>) -> Option<Self> {
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

impl Groups<'_> {
    /// Groups of a row.
    pub fn per_row(&self) -> usize {
        self.columns.div_ceil(GROUP)
    }

    /// The codes of some groups of a row, as many as a piece has at most, without their scales.
    #[inline(always)]
    pub fn codes(&self, row: usize, groups: Range<usize>, to: &mut [f32]) {
        let (first, len) = (row * self.per_row() + groups.start, groups.len());
        let bytes = &self.bytes[first * self.kind.bytes()..][..len * self.kind.bytes()];
        match self.kind {
            Codes::Int8 => (to.iter_mut().zip(bytes)).for_each(|(to, x)| *to = f32::from(*x)),
            Codes::Int4 => {
                let mut halves = [0; PIECE];
                unpack(bytes, &mut halves);
                (to.iter_mut().zip(&halves[..len * GROUP])).for_each(|(to, x)| *to = f32::from(*x));
            }
        }
    }

    /// The scales of such groups.
    #[inline(always)]
    pub fn scales(&self, row: usize, groups: Range<usize>) -> OfPiece {
        wide(&self.scales[row * self.per_row() + groups.start..][..groups.len()])
    }

    /// The offsets of such groups, if they have any.
    #[inline(always)]
    pub fn offsets(&self, row: usize, groups: Range<usize>) -> Option<OfPiece> {
        let offsets = self.offsets?;
        Some(wide(
            &offsets[row * self.per_row() + groups.start..][..groups.len()],
        ))
    }
}

impl Matrix for Groups<'_> {
    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, row: usize, to: &mut [f32]) {
        let mut codes = [0.0; PIECE];
        for (i, to) in to.chunks_mut(PIECE).enumerate() {
            let first = i * (PIECE / GROUP);
            let groups = first..first + to.len().div_ceil(GROUP);
            self.codes(row, groups.clone(), &mut codes);
            let scales = self.scales(row, groups.clone());
            let offsets = self.offsets(row, groups).unwrap_or_default();
            let codes = codes.as_chunks_mut::<GROUP>().0.iter_mut();
            let steps = scales.into_iter().zip(offsets);
            for (to, (codes, (scale, offset))) in to.chunks_mut(GROUP).zip(codes.zip(steps)) {
                simd::scale(simd, scale, offset, codes);
                to.copy_from_slice(&codes[..to.len()]);
            }
        }
    }
}

/// Both halves of every byte: of a group all lower ones, then all upper ones. A function of its own:
/// beside a loop that makes floats of them, compilers take vectors of groups rather than of bytes,
/// which is many times slower.
#[inline(never)]
fn unpack(bytes: &[i8], halves: &mut [u8; PIECE]) {
    let (bytes, _) = bytes.as_chunks::<{ Codes::Int4.bytes() }>();
    let (halves, _) = halves.as_chunks_mut::<GROUP>();
    for (to, bytes) in halves.iter_mut().zip(bytes) {
        for j in 0..GROUP / 2 {
            to[j] = bytes[j] as u8 & 15;
        }
        for j in 0..GROUP / 2 {
            to[j + GROUP / 2] = bytes[j] as u8 >> 4;
        }
    }
}

/// As many as a piece has at most: a loop of known length becomes vectors.
#[inline(always)]
fn wide(numbers: &[f16]) -> OfPiece {
    let mut all = [f16::ZERO; PIECE / GROUP];
    all[..numbers.len()].copy_from_slice(numbers);
    // Not `map`, which would be a function for no processor in particular.
    let mut wide = [0.0; PIECE / GROUP];
    for (wide, x) in wide.iter_mut().zip(all) {
        *wide = widen_f16(x);
    }
    wide
}
