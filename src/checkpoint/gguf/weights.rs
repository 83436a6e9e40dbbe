//! `model.safetensors` from a file's tensors, piece by piece.

use std::io::Write;
use std::path::Path;

use super::architectures::Change;
use super::error::GgufError;
use super::file::GgufFile;
use super::model::{Model, Planned};
use crate::checkpoint::numbers::{Overflow, WeightDtype, encode};
use crate::checkpoint::read::too_large;
use crate::checkpoint::save::{Saved, file_header};
use crate::checkpoint::{CheckpointError, WEIGHTS};
use crate::decoder::WeightFormat;
use crate::file::Replacement;
use crate::kernels::packed::{Codes, PackedRows};
use crate::parameters::TensorSpec;

/// Writes the model's tensors: matrices in a format, all else as numbers of type `dtype`. Takes the
/// memory of a piece of a tensor, and of the scales.
pub(super) fn write(
    file: &GgufFile,
    model: &Model,
    (dtype, format): (WeightDtype, WeightFormat),
    directory: &Path,
) -> Result<(), GgufError> {
    let path = directory.join(WEIGHTS);
    let failed = |source| CheckpointError::Write {
        path: path.clone(),
        source,
    };
    let saved = |spec: &TensorSpec| {
        let format = match spec.shape.len() {
            2 => format,
            _ => WeightFormat::Model,
        };
        let unsaved = || CheckpointError::WeightFormat {
            tensor: spec.name.clone(),
            format,
        };
        Saved::of(format, dtype).ok_or_else(unsaved)
    };
    let specs = model.tensors.iter().map(|tensor| &tensor.spec);
    let planned = specs.map(|spec| Ok((spec, saved(spec)?)));
    let planned: Vec<_> = planned.collect::<Result<_, CheckpointError>>()?;
    let mut out = Replacement::create(&path).map_err(failed)?;
    out.write_all(&file_header(planned.iter().copied()))
        .map_err(failed)?;
    let mut scales = Vec::new();
    for (tensor, (_, saved)) in model.tensors.iter().zip(planned) {
        let Planned {
            source,
            spec,
            change,
        } = tensor;
        // Whole heads at a time, where rows within a head change their places.
        let rows = match change {
            Change::Interleaved => model.head_dim,
            _ => 1,
        };
        let columns = spec.shape[1..].iter().product();
        let mut bytes = Vec::new();
        file.pieces(source, rows, |numbers| {
            match change {
                Change::None => {}
                Change::PlusOne => numbers.iter_mut().for_each(|number| *number -= 1.0),
                Change::Interleaved => separate(numbers, model.head_dim, columns),
            }
            bytes.clear();
            let dtype = match saved {
                Saved::Float(dtype) => dtype,
                Saved::Int8 => {
                    let mut packed = PackedRows::new(Codes::Int8, numbers.len() / columns, columns);
                    let written = packed.write(numbers);
                    written.map_err(|value| too_large(&path, &spec.name, value, format))?;
                    scales.extend(packed.scale_bytes());
                    return Ok(out.write_all(&packed.code_bytes()).map_err(failed)?);
                }
            };
            let numbers = numbers.iter().map(|&number| f64::from(number));
            encode(numbers, dtype, &mut bytes).map_err(|Overflow(value)| {
                CheckpointError::Overflow {
                    path: path.clone(),
                    tensor: spec.name.clone(),
                    value,
                    dtype,
                }
            })?;
            Ok(out.write_all(&bytes).map_err(failed)?)
        })?;
    }
    out.write_all(&scales).map_err(failed)?;
    Ok(out.finish().map_err(failed)?)
}

/// Rows 2j and 2j + 1 of each head become j and j + head_dim/2, as RoPE's pairs are in Hugging Face's
/// files. `numbers` are whole heads of rows of `columns`.
pub(super) fn separate(numbers: &mut [f32], head_dim: usize, columns: usize) {
    let mut old = Vec::new();
    for head in numbers.chunks_exact_mut(head_dim * columns) {
        old.clear();
        old.extend_from_slice(head);
        for (row, to) in head.chunks_exact_mut(columns).enumerate() {
            let from = head_row(row, head_dim) * columns;
            to.copy_from_slice(&old[from..from + columns]);
        }
    }
}

/// Where the row that becomes `row` lies.
pub(super) fn head_row(row: usize, head_dim: usize) -> usize {
    let (head, row) = (row / head_dim, row % head_dim);
    let (second, pair) = (row / (head_dim / 2), row % (head_dim / 2));
    head * head_dim + 2 * pair + second
}
