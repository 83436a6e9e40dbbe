//! From the rows of files to the memory of tensors, by all threads: each takes a piece of a file to
//! its final place, so that there is no second copy.

use std::ops::Range;
use std::path::Path;

use burn::tensor::{TensorData, bf16, f16};
use rayon::prelude::*;

use super::error::CheckpointError;
use super::numbers::{Number, Overflow, WeightDtype, round_all};
use crate::decoder::{WeightError, WeightFormat};
use crate::kernels::packed::{Codes, PackedRows, RowsMut};

/// Numbers that a thread reads at a time: with what they become, they stay in the second-level cache.
const PIECE: usize = 1 << 16;

/// The sides of the squares that a matrix is transposed by: as many numbers as a line of the cache has.
const SQUARE: usize = 16;

/// Rows that are transposed at a time, however wide, at the least.
const FEWEST: usize = 4 * SQUARE;

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
    /// Rows that are to be transposed, of any type.
    rows: Vec<f32>,
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
fn resized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Rows that are read at a time.
fn rows_at_once(source: &dyn Rows) -> usize {
    let [_, columns] = source.dims();
    let together = source.together();
    (PIECE / (columns * together).max(1)).max(1) * together
}

/// What a tensor is read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Numbers in the order of the file or, for a matrix, that of its transpose.
    Float {
        dtype: WeightDtype,
        transposed: bool,
    },
    /// A matrix in groups: as it is where the file has it so.
    Packed(WeightFormat, Codes),
}

/// A tensor that has been read.
pub(super) enum Loaded {
    Float(TensorData),
    Packed(PackedRows),
}

/// A tensor's memory.
enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Packed(PackedRows),
}

/// A tensor on its way from a file.
pub(super) struct Reading<'f> {
    source: Box<dyn Rows + 'f>,
    kind: Kind,
    numbers: Numbers,
}

/// A piece of a tensor to be read.
type Task<'t> = Box<dyn FnOnce(&mut Scratch) -> Result<(), CheckpointError> + Send + 't>;

impl<'f> Reading<'f> {
    pub fn new(source: Box<dyn Rows + 'f>, kind: Kind) -> Self {
        let [rows, columns] = source.dims();
        let numbers = match kind {
            Kind::Packed(_, codes) => Numbers::Packed(PackedRows::new(codes, rows, columns)),
            // Of the system, which clears it when it is first written.
            Kind::Float { dtype, .. } => match dtype {
                WeightDtype::F32 => Numbers::F32(bytemuck::zeroed_vec(rows * columns)),
                WeightDtype::F16 => Numbers::F16(bytemuck::zeroed_vec(rows * columns)),
                WeightDtype::Bf16 => Numbers::Bf16(bytemuck::zeroed_vec(rows * columns)),
            },
        };
        Self {
            source,
            kind,
            numbers,
        }
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F32(numbers) => size_of_val(&**numbers),
            Numbers::F16(numbers) => size_of_val(&**numbers),
            Numbers::Bf16(numbers) => size_of_val(&**numbers),
            Numbers::Packed(rows) => rows.bytes.len(),
        }
    }

    /// What has been read of a tensor that has this shape in the file.
    pub fn finish(self, mut shape: Vec<usize>) -> Loaded {
        if let Kind::Float {
            transposed: true, ..
        } = self.kind
        {
            shape.reverse();
        }
        Loaded::Float(match self.numbers {
            Numbers::F32(numbers) => TensorData::new(numbers, shape),
            Numbers::F16(numbers) => TensorData::new(numbers, shape),
            Numbers::Bf16(numbers) => TensorData::new(numbers, shape),
            Numbers::Packed(rows) => return Loaded::Packed(rows),
        })
    }

    fn tasks(&mut self) -> Vec<Task<'_>> {
        let source = &*self.source;
        match (&mut self.numbers, self.kind) {
            (Numbers::F32(to), Kind::Float { transposed, .. }) => floats(source, transposed, to),
            (Numbers::F16(to), Kind::Float { transposed, .. }) => floats(source, transposed, to),
            (Numbers::Bf16(to), Kind::Float { transposed, .. }) => floats(source, transposed, to),
            (Numbers::Packed(to), Kind::Packed(format, _)) => packed(source, format, to),
            _ => Vec::new(),
        }
    }
}

/// Reads tensors, threads taking pieces of all of them.
///
/// # Errors
/// The first in the tensors' order.
pub(super) fn read_all(readings: &mut [Reading<'_>]) -> Result<(), CheckpointError> {
    let tasks: Vec<Task<'_>> = readings.iter_mut().flat_map(Reading::tasks).collect();
    let tasks = tasks.into_par_iter();
    let errors = tasks.map_init(Scratch::default, |scratch, task| task(scratch).err());
    let failed = errors.find_first(Option::is_some).flatten();
    failed.map_or(Ok(()), Err)
}

/// The rows of every piece of a source.
fn pieces(source: &dyn Rows, at_once: usize) -> impl Iterator<Item = Range<usize>> {
    let [rows, _] = source.dims();
    let ranges = (0..rows).step_by(at_once);
    ranges.map(move |start| start..rows.min(start + at_once))
}

fn floats<'t, T: Number>(
    source: &'t dyn Rows,
    transposed: bool,
    numbers: &'t mut [T],
) -> Vec<Task<'t>> {
    let [rows, columns] = source.dims();
    let at_once = rows_at_once(source);
    if !transposed {
        let pieces = pieces(source, at_once).zip(numbers.chunks_mut((at_once * columns).max(1)));
        let task = |(rows, to)| -> Task<'t> {
            Box::new(move |scratch: &mut Scratch| scratch.read(source, rows, to))
        };
        return pieces.map(task).collect();
    }
    // What becomes of a piece's rows is some columns of every row of the transpose: few enough that
    // to say where they are takes little beside them.
    let at_once = at_once.max(FEWEST.next_multiple_of(source.together()));
    let mut parts: Vec<Vec<&mut [T]>> = (0..rows.div_ceil(at_once))
        .map(|_| Vec::with_capacity(columns))
        .collect();
    for row in numbers.chunks_mut(rows.max(1)) {
        for (part, columns) in parts.iter_mut().zip(row.chunks_mut(at_once)) {
            part.push(columns);
        }
    }
    let task = |(rows, to): (Range<usize>, _)| -> Task<'t> {
        Box::new(move |scratch: &mut Scratch| {
            let mut buffer = std::mem::take(&mut scratch.rows);
            let piece = T::in_f32s(resized(&mut buffer, rows.len() * columns));
            let piece = &mut piece[..rows.len() * columns];
            let read = scratch.read(source, rows, piece);
            transpose(piece, columns, to);
            scratch.rows = buffer;
            read
        })
    };
    pieces(source, at_once).zip(parts).map(task).collect()
}

fn packed<'t>(
    source: &'t dyn Rows,
    format: WeightFormat,
    numbers: &'t mut PackedRows,
) -> Vec<Task<'t>> {
    let [_, columns] = source.dims();
    let at_once = rows_at_once(source);
    let pieces = pieces(source, at_once).zip(numbers.parts(at_once));
    let task = |(rows, mut to): (Range<usize>, RowsMut<'t>)| -> Task<'t> {
        Box::new(move |scratch: &mut Scratch| {
            if let Some(read) = source.stored_packed(rows.clone(), &mut to, &mut scratch.bytes) {
                return read;
            }
            let wide = resized(&mut scratch.wide, rows.len() * columns);
            source.widened(rows, wide, &mut scratch.bytes)?;
            let (path, tensor) = source.place();
            let written = to.write(wide);
            written.map_err(|value| too_large(path, tensor, value, format))
        })
    };
    pieces.map(task).collect()
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
