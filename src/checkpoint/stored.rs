//! Tensors as safetensors files have them: floats, or 8-bit codes and their scales.

use std::ops::Range;
use std::path::Path;

use burn::tensor::f16;

use super::error::CheckpointError;
use super::numbers::{Number, WeightDtype, widen};
use super::read::Rows;
use super::safetensors::{Place, SafetensorsFile};
use crate::kernels::packed::{Codes, GROUP, RowsMut};

/// A tensor, and the file it is in.
type Stored<'f> = (&'f SafetensorsFile, Place);

/// Floats.
pub(super) struct FloatRows<'f> {
    pub tensor: Stored<'f>,
    pub dtype: WeightDtype,
    pub name: String,
    pub dims: [usize; 2],
}

impl FloatRows<'_> {
    fn read(&self, rows: Range<usize>, to: &mut [u8]) -> Result<(), CheckpointError> {
        let (file, place) = &self.tensor;
        let row = self.dims[1] * self.dtype.bytes();
        file.read(place, (rows.start * row) as u64, to)
    }
}

impl Rows for FloatRows<'_> {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn place(&self) -> (&Path, &str) {
        (self.tensor.0.path(), &self.name)
    }

    fn widened(
        &self,
        rows: Range<usize>,
        to: &mut [f32],
        scratch: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        scratch.resize(to.len() * self.dtype.bytes(), 0);
        self.read(rows, scratch)?;
        widen(self.dtype, scratch, to);
        Ok(())
    }

    fn stored(
        &self,
        dtype: WeightDtype,
        rows: Range<usize>,
        to: &mut [u8],
    ) -> Option<Result<(), CheckpointError>> {
        (dtype == self.dtype).then(|| self.read(rows, to))
    }
}

/// Codes in groups of 32 of a row, a scale for each.
pub(super) struct Int8Rows<'f> {
    pub codes: Stored<'f>,
    pub scales: Stored<'f>,
    pub name: String,
    pub dims: [usize; 2],
}

impl Int8Rows<'_> {
    fn read_codes(&self, rows: Range<usize>, to: &mut [u8]) -> Result<(), CheckpointError> {
        let (file, place) = &self.codes;
        file.read(place, (rows.start * self.dims[1]) as u64, to)
    }

    fn read_scales(&self, rows: Range<usize>, to: &mut [f16]) -> Result<(), CheckpointError> {
        let (file, place) = &self.scales;
        let row = self.dims[1].div_ceil(GROUP) * size_of::<f16>();
        file.read(place, (rows.start * row) as u64, f16::bytes_mut(to))?;
        f16::from_file(to);
        Ok(())
    }

    fn read_packed(
        &self,
        rows: Range<usize>,
        to: &mut RowsMut<'_>,
        scratch: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        self.read_scales(rows.clone(), to.scales)?;
        let columns = self.dims[1];
        let codes: &mut [u8] = bytemuck::cast_slice_mut(to.bytes);
        if columns.is_multiple_of(GROUP) {
            return self.read_codes(rows, codes);
        }
        // In memory the last group of a row is wider than the row.
        scratch.resize(rows.len() * columns, 0);
        self.read_codes(rows, scratch)?;
        let rows = codes.chunks_mut(columns.next_multiple_of(GROUP));
        for (to, codes) in rows.zip(scratch.chunks(columns)) {
            to[..columns].copy_from_slice(codes);
        }
        Ok(())
    }
}

impl Rows for Int8Rows<'_> {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn place(&self) -> (&Path, &str) {
        (self.codes.0.path(), &self.name)
    }

    fn widened(
        &self,
        rows: Range<usize>,
        to: &mut [f32],
        scratch: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let columns = self.dims[1];
        let groups = columns.div_ceil(GROUP);
        let mut scales = vec![f16::ZERO; rows.len() * groups];
        self.read_scales(rows.clone(), &mut scales)?;
        scratch.resize(to.len(), 0);
        self.read_codes(rows, scratch)?;
        let rows = to.chunks_mut(columns).zip(scratch.chunks(columns));
        for ((to, codes), scales) in rows.zip(scales.chunks(groups)) {
            let of_groups = to.chunks_mut(GROUP).zip(codes.chunks(GROUP));
            for ((to, codes), scale) in of_groups.zip(scales) {
                let scale = scale.to_f32();
                let numbers = to.iter_mut().zip(codes);
                numbers.for_each(|(to, &code)| *to = f32::from(code as i8) * scale);
            }
        }
        Ok(())
    }

    fn stored_packed(
        &self,
        rows: Range<usize>,
        to: &mut RowsMut<'_>,
        scratch: &mut Vec<u8>,
    ) -> Option<Result<(), CheckpointError>> {
        (to.codes == Codes::Int8).then(|| self.read_packed(rows, to, scratch))
    }
}
