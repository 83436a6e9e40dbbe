//! `model.safetensors` from a file's tensors, piece by piece.

use std::io::Write;
use std::path::Path;

use super::architectures::Change;
use super::error::GgufError;
use super::file::GgufFile;
use super::model::{Model, Planned};
use crate::checkpoint::numbers::{Overflow, WeightDtype, encode};
use crate::checkpoint::save::header;
use crate::checkpoint::{CheckpointError, WEIGHTS};
use crate::file::Replacement;

/// Writes the model's tensors as numbers of type `dtype`. Takes the memory of a piece of a tensor.
pub(super) fn write(
    file: &mut GgufFile,
    model: &Model,
    dtype: WeightDtype,
    directory: &Path,
) -> Result<(), GgufError> {
    let path = directory.join(WEIGHTS);
    let failed = |source| CheckpointError::Write {
        path: path.clone(),
        source,
    };
    let specs: Vec<_> = model
        .tensors
        .iter()
        .map(|tensor| tensor.spec.clone())
        .collect();
    let mut out = Replacement::create(&path).map_err(failed)?;
    out.write_all(&header(&specs, dtype)).map_err(failed)?;
    for Planned {
        source,
        spec,
        change,
    } in &model.tensors
    {
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
    Ok(out.finish().map_err(failed)?)
}

/// Rows 2j and 2j + 1 of each head become j and j + head_dim/2, as RoPE's pairs are in Hugging Face's
/// files. `numbers` are whole heads of rows of `columns`.
fn separate(numbers: &mut [f32], head_dim: usize, columns: usize) {
    let mut old = Vec::new();
    for head in numbers.chunks_exact_mut(head_dim * columns) {
        old.clear();
        old.extend_from_slice(head);
        for (row, to) in head.chunks_exact_mut(columns).enumerate() {
            let (second, pair) = (row / (head_dim / 2), row % (head_dim / 2));
            let from = (2 * pair + second) * columns;
            to.copy_from_slice(&old[from..from + columns]);
        }
    }
}
