//! A file's tensors as a decoder loads them.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use burn::tensor::f16;

use super::architectures::Change;
use super::file::{GgufFile, GgufTensor};
use super::model::{Model, Planned};
use super::weights::{head_row, separate};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::numbers::WeightDtype;
use crate::checkpoint::read::Rows;
use crate::checkpoint::tensors::{FileTensor, TensorFiles};
use crate::kernels::packed::{Codes, GROUP, RowsMut};

/// Bytes of a block of Q8_0: its scale, and 32 codes.
const Q8_0: usize = 34;

/// The tensors of a file by the names that Hugging Face has for them.
pub(super) struct GgufTensors<'f> {
    file: &'f GgufFile,
    head_dim: usize,
    tensors: HashMap<&'f str, &'f Planned>,
}

impl<'f> GgufTensors<'f> {
    pub fn new(file: &'f GgufFile, model: &'f Model) -> Self {
        let tensors = model.tensors.iter();
        Self {
            file,
            head_dim: model.head_dim,
            tensors: tensors
                .map(|planned| (&*planned.spec.name, planned))
                .collect(),
        }
    }

    /// Whether all tensors that a decoder needs are there.
    pub fn check(&self, expected: &[FileTensor]) -> Result<(), CheckpointError> {
        expected.iter().try_for_each(|tensor| {
            let planned = self.find(tensor)?;
            match planned.spec.shape == tensor.spec.shape {
                true => Ok(()),
                false => Err(self.shape(&tensor.spec, planned.spec.shape.clone())),
            }
        })
    }

    fn find(&self, tensor: &FileTensor) -> Result<&'f Planned, CheckpointError> {
        let planned = self.tensors.get(&*tensor.spec.name);
        planned.copied().ok_or_else(|| self.missing(&tensor.spec))
    }
}

impl TensorFiles for GgufTensors<'_> {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn rows(
        &self,
        tensor: &FileTensor,
        part: usize,
    ) -> Result<Box<dyn Rows + '_>, CheckpointError> {
        let planned = self.find(tensor)?;
        let place = self.file.tensors().get(&planned.source);
        let place = place.ok_or_else(|| self.missing(&tensor.spec))?;
        let before = tensor.parts[..part].iter().map(|part| part.shape[0]);
        let shape = &tensor.parts[part].shape;
        Ok(Box::new(GgufRows {
            file: self.file,
            place,
            planned,
            head_dim: self.head_dim,
            first: before.sum(),
            dims: [shape[0], shape[1..].iter().product()],
        }))
    }
}

/// Some of a tensor's rows.
struct GgufRows<'f> {
    file: &'f GgufFile,
    place: &'f GgufTensor,
    planned: &'f Planned,
    head_dim: usize,
    /// Rows of the tensor before these.
    first: usize,
    dims: [usize; 2],
}

impl GgufRows<'_> {
    /// The bytes of as many rows; of a vector, of all its numbers.
    fn read(&self, rows: Range<usize>, to: &mut [u8]) -> Result<(), CheckpointError> {
        let format = self.place.format;
        // Rows are whole blocks.
        let numbers = (self.first + rows.start) * self.dims[1];
        let offset = numbers / format.block * format.bytes;
        let read = self.file.read(self.place, offset as u64, to);
        read.map_err(|source| CheckpointError::Read {
            path: self.file.path().to_owned(),
            source,
        })
    }

    /// Blocks as they lie, with the places that rows have.
    fn read_packed(
        &self,
        rows: Range<usize>,
        to: &mut RowsMut<'_>,
        scratch: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let groups = self.dims[1] / GROUP;
        scratch.resize(rows.len() * groups * Q8_0, 0);
        self.read(rows, scratch)?;
        let each = to.bytes.chunks_exact_mut(groups * GROUP);
        for (row, (bytes, scales)) in each.zip(to.scales.chunks_exact_mut(groups)).enumerate() {
            let from = match self.planned.change {
                Change::Interleaved => head_row(row, self.head_dim),
                _ => row,
            };
            let blocks = scratch[from * groups * Q8_0..].as_chunks::<Q8_0>().0;
            let codes = bytes.as_chunks_mut::<GROUP>().0;
            for ((codes, scale), block) in codes.iter_mut().zip(scales).zip(blocks) {
                *scale = f16::from_le_bytes([block[0], block[1]]);
                let bytes = block[2..].iter();
                codes
                    .iter_mut()
                    .zip(bytes)
                    .for_each(|(to, &code)| *to = code as i8);
            }
        }
        Ok(())
    }
}

impl Rows for GgufRows<'_> {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn place(&self) -> (&Path, &str) {
        (self.file.path(), &self.planned.source)
    }

    fn together(&self) -> usize {
        match self.planned.change {
            // Rows within a head change their places.
            Change::Interleaved => self.head_dim,
            // A vector's blocks are not to be cut.
            _ if self.dims[1] == 1 => self.dims[0],
            _ => 1,
        }
    }

    fn widened(
        &self,
        rows: Range<usize>,
        to: &mut [f32],
        scratch: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let format = self.place.format;
        scratch.resize(to.len() / format.block * format.bytes, 0);
        self.read(rows, scratch)?;
        let mut numbers = Vec::with_capacity(to.len());
        (format.decode)(scratch, &mut numbers);
        match self.planned.change {
            Change::None => {}
            Change::PlusOne => numbers.iter_mut().for_each(|number| *number -= 1.0),
            Change::Interleaved => separate(&mut numbers, self.head_dim, self.dims[1]),
        }
        to.copy_from_slice(&numbers);
        Ok(())
    }

    fn stored(
        &self,
        dtype: WeightDtype,
        rows: Range<usize>,
        to: &mut [u8],
    ) -> Option<Result<(), CheckpointError>> {
        let lies_so = match dtype {
            WeightDtype::F32 => "F32",
            WeightDtype::F16 => "F16",
            WeightDtype::Bf16 => "BF16",
        };
        let unchanged = self.planned.change == Change::None;
        (unchanged && self.place.format.name == lies_so).then(|| self.read(rows, to))
    }

    fn stored_packed(
        &self,
        rows: Range<usize>,
        to: &mut RowsMut<'_>,
        scratch: &mut Vec<u8>,
    ) -> Option<Result<(), CheckpointError>> {
        let is_q8_0 = self.place.format.name == "Q8_0" && to.codes == Codes::Int8;
        let moved = self.planned.change != Change::PlusOne;
        (is_q8_0 && moved).then(|| self.read_packed(rows, to, scratch))
    }
}
