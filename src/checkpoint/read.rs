//! From the rows of a file to the memory of a tensor, by all threads: each takes a piece of the file
//! to its final place, so that there is no second copy.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::error::CheckpointError;
use super::numbers::{Number, Overflow, WeightDtype, round_all};
use crate::decoder::{WeightError, WeightFormat};
use crate::kernels::packed::{Codes, PackedRows, RowsMut};

/// Numbers that a thread reads at a time: with what they become, they stay in the second-level cache.
const PIECE: usize = 1 << 16;

/// The sides of the squares that a matrix is transposed by: as many numbers as a line of the cache has.
const SQUARE: usize = 16;

/// A matrix, or a vector, in a file. Ranges are of its rows.
pub(super) trait Rows: Sync {
    /// `[rows, columns]`; the numbers of a vector are rows.
    fn dims(&self) -> [usize; 2];

    /// What errors name: the file, and the tensor in it.
    fn place(&self) -> (&Path, &str);

    /// Rows are read so many at a time, or a multiple.
    fn together(&self) -> usize {
        1
    }

    /// As f32; `scratch` is for their bytes.
    fn widened(
        &self,
        rows: Range<usize>,
        to: &mut [f32],
        scratch: &mut Vec<u8>,
    ) -> Result<(), CheckpointError>;

    /// The bytes of numbers that lie in the file in this type.
    fn stored(
        &self,
        _dtype: WeightDtype,
        _rows: Range<usize>,
        _to: &mut [u8],
    ) -> Option<Result<(), CheckpointError>> {
        None
    }

    /// Numbers that lie in the file as they are packed.
    fn stored_packed(
        &self,
        _rows: Range<usize>,
        _to: &mut RowsMut<'_>,
        _scratch: &mut Vec<u8>,
    ) -> Option<Result<(), CheckpointError>> {
        None
    }
}

/// What a thread reads through.
#[derive(Default)]
struct Scratch {
    bytes: Vec<u8>,
    wide: Vec<f32>,
}

impl Scratch {
    /// Some rows as numbers of a type.
    fn read<T: Number>(
        &mut self,
        source: &dyn Rows,
        rows: Range<usize>,
        to: &mut [T],
    ) -> Result<(), CheckpointError> {
        if let Some(read) = source.stored(T::DTYPE, rows.clone(), T::bytes_mut(to)) {
            T::from_file(to);
            return read;
        }
        let wide = resized(&mut self.wide, to.len());
        source.widened(rows, wide, &mut self.bytes)?;
        let (path, tensor) = source.place();
        round_all(wide, to).map_err(|Overflow(value)| CheckpointError::Overflow {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            value,
            dtype: T::DTYPE,
        })
    }
}

/// The beginning of a buffer that grows.
fn resized<T: Number>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::zeroed());
    }
    &mut buffer[..len]
}

/// Rows that are read at a time.
fn rows_at_once(source: &dyn Rows) -> usize {
    let [_, columns] = source.dims();
    let together = source.together();
    (PIECE / (columns * together).max(1)).max(1) * together
}

/// The first error of pieces that are worked on at once.
fn each<P: IndexedParallelIterator>(
    pieces: P,
    work: impl Fn(&mut Scratch, P::Item) -> Result<(), CheckpointError> + Sync,
) -> Result<(), CheckpointError> {
    let results = pieces.map_init(Scratch::default, |scratch, piece| work(scratch, piece).err());
    let failed = results.find_first(Option::is_some).flatten();
    failed.map_or(Ok(()), Err)
}

/// A tensor's numbers in the order of the file or, for a matrix, that of its transpose.
pub(super) fn numbers<T: Number>(
    source: &dyn Rows,
    transposed: bool,
) -> Result<Vec<T>, CheckpointError> {
    let [rows, columns] = source.dims();
    let at_once = rows_at_once(source);
    let range = |piece: usize| piece * at_once..rows.min((piece + 1) * at_once);
    let mut all: Vec<T> = bytemuck::zeroed_vec(rows * columns);
    if all.is_empty() {
        return Ok(all);
    }
    if !transposed {
        let pieces = all.par_chunks_mut(at_once * columns).enumerate();
        each(pieces, |scratch, (piece, to)| {
            scratch.read(source, range(piece), to)
        })?;
        return Ok(all);
    }
    // What becomes of a piece's rows is some columns of every row of the transpose.
    let n_pieces = rows.div_ceil(at_once);
    let mut parts: Vec<Vec<&mut [T]>> = (0..n_pieces)
        .map(|_| Vec::with_capacity(columns))
        .collect();
    for row in all.chunks_mut(rows) {
        for (part, columns) in parts.iter_mut().zip(row.chunks_mut(at_once)) {
            part.push(columns);
        }
    }
    let pieces = parts.into_par_iter().enumerate();
    each(pieces, |scratch, (piece, to)| {
        // Kept apart, because reading takes the rest.
        let mut numbers = Vec::new();
        let numbers = resized(&mut numbers, range(piece).len() * columns);
        scratch.read(source, range(piece), numbers)?;
        transpose(numbers, columns, to);
        Ok(())
    })?;
    Ok(all)
}

/// `to[j][i] = from[i][j]`, square by square.
fn transpose<T: Copy>(from: &[T], columns: usize, mut to: Vec<&mut [T]>) {
    for (j, to) in to.chunks_mut(SQUARE).enumerate() {
        let first = j * SQUARE;
        for (i, from) in from.chunks(SQUARE * columns).enumerate() {
            for (j, to) in to.iter_mut().enumerate() {
                let to = to[i * SQUARE..].iter_mut();
                let column = from[first + j..].iter().step_by(columns);
                to.zip(column).for_each(|(to, x)| *to = *x);
            }
        }
    }
}

/// A matrix in groups: as it is where the file has it so.
pub(super) fn packed(
    source: &dyn Rows,
    codes: Codes,
    format: WeightFormat,
) -> Result<PackedRows, CheckpointError> {
    let [rows, columns] = source.dims();
    let at_once = rows_at_once(source);
    let range = |piece: usize| piece * at_once..rows.min((piece + 1) * at_once);
    let mut packed = PackedRows::new(codes, rows, columns);
    let pieces = packed.parts(at_once).into_par_iter().enumerate();
    each(pieces, |scratch, (piece, mut to)| {
        let rows = range(piece);
        if let Some(read) = source.stored_packed(rows.clone(), &mut to, &mut scratch.bytes) {
            return read;
        }
        let wide = resized(&mut scratch.wide, rows.len() * columns);
        source.widened(rows, wide, &mut scratch.bytes)?;
        let (path, tensor) = source.place();
        to.write(wide).map_err(|value| too_large(path, tensor, value, format))
    })?;
    Ok(packed)
}

/// The error for a number that a format is too small for.
pub(super) fn too_large(
    path: &Path,
    tensor: &str,
    value: f32,
    format: WeightFormat,
) -> CheckpointError {
    CheckpointError::Weight {
        path: path.to_owned(),
        source: WeightError::Overflow {
            tensor: tensor.to_owned(),
            value,
            format,
        },
    }
}
