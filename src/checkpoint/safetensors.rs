//! One safetensors file: a header that is believed only as far as the file bears it out, and
//! tensors that are read piece by piece.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::Value;

use super::error::CheckpointError;
use super::numbers::WeightDtype;
use super::shared_file::SharedFile;

/// Bytes compared at a time.
const PIECE: usize = 1 << 20;

/// The longest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// An open file whose header has been checked against its length.
#[derive(Debug)]
pub(super) struct SafetensorsFile {
    path: PathBuf,
    file: SharedFile,
    tensors: BTreeMap<String, Place>,
    metadata: BTreeMap<String, String>,
}

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// From the start of the file.
    start: u64,
    bytes: u64,
}

impl Place {
    /// Some of a matrix's rows.
    pub fn rows(&self, start: usize, rows: usize) -> Self {
        // The whole has been checked to lie in the file.
        let row = self.bytes / self.shape[0] as u64;
        let mut shape = self.shape.clone();
        shape[0] = rows;
        Self {
            dtype: self.dtype,
            shape,
            start: self.start + start as u64 * row,
            bytes: rows as u64 * row,
        }
    }
}

impl SafetensorsFile {
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let read = |source| CheckpointError::Read {
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(read)?;
        let file_bytes = file.metadata().map_err(read)?.len();
        let available = file_bytes.saturating_sub(8);
        let too_short = |length| CheckpointError::HeaderLength {
            path: path.to_owned(),
            length,
            available,
        };
        if file_bytes < 8 {
            return Err(too_short(8));
        }
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(read)?;
        let length = u64::from_le_bytes(length);
        if length > available || length > MAX_HEADER {
            return Err(too_short(length));
        }
        // No longer than the file.
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(read)?;
        let (tensors, metadata) = places(path, &header, file_bytes)?;
        Ok(Self {
            path: path.to_owned(),
            file: file.into(),
            tensors,
            metadata,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn tensors(&self) -> &BTreeMap<String, Place> {
        &self.tensors
    }

    /// What the header says beside its tensors, where it is text.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Fills `bytes` with those of a tensor from the `offset`th on.
    pub fn read(
        &self,
        place: &Place,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), CheckpointError> {
        // The place has been checked to lie in the file.
        let read = self.file.read_at(place.start + offset, bytes);
        read.map_err(|source| CheckpointError::Read {
            path: self.path.clone(),
            source,
        })
    }

    /// Whether two tensors are the same, bit by bit.
    pub fn same(&self, a: &Place, other: &Self, b: &Place) -> Result<bool, CheckpointError> {
        if (a.dtype, &a.shape) != (b.dtype, &b.shape) {
            return Ok(false);
        }
        let mut offset = 0;
        let [mut of_a, mut of_b] = [(); 2].map(|()| vec![0; PIECE.min(a.bytes as usize)]);
        while offset < a.bytes {
            let length = (a.bytes - offset).min(PIECE as u64) as usize;
            let (of_a, of_b) = (&mut of_a[..length], &mut of_b[..length]);
            self.read(a, offset, of_a)?;
            other.read(b, offset, of_b)?;
            if of_a != of_b {
                return Ok(false);
            }
            offset += length as u64;
        }
        Ok(true)
    }
}

/// The float type of a tensor's numbers.
pub(super) fn weight_dtype(
    path: &Path,
    tensor: &str,
    place: &Place,
) -> Result<WeightDtype, CheckpointError> {
    WeightDtype::from_stored(place.dtype).ok_or_else(|| CheckpointError::Dtype {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        found: place.dtype.to_string(),
    })
}

/// Tensors by name, and what else is said by key.
type Header = (BTreeMap<String, Place>, BTreeMap<String, String>);

/// What the header says, if it holds for a file of `file_bytes`.
fn places(path: &Path, header: &[u8], file_bytes: u64) -> Result<Header, CheckpointError> {
    let entries: BTreeMap<String, Value> =
        serde_json::from_slice(header).map_err(|error| CheckpointError::Header {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
    let data_start = 8 + header.len() as u64;
    let (mut places, mut metadata) = (BTreeMap::new(), BTreeMap::new());
    for (tensor, entry) in entries {
        if tensor == "__metadata__" {
            let said = entry.as_object().into_iter().flatten();
            let texts = said.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.into())));
            metadata.extend(texts);
        } else {
            let place = place(path, &tensor, entry, data_start, file_bytes)?;
            places.insert(tensor, place);
        }
    }
    // Every byte belongs to one tensor.
    let mut in_order: Vec<_> = places.iter().collect();
    in_order.sort_by_key(|(_, place)| (place.start, place.bytes));
    let mut end = data_start;
    for (tensor, place) in in_order {
        if place.start != end {
            return Err(CheckpointError::Entry {
                path: path.to_owned(),
                tensor: tensor.clone(),
                reason: format!(
                    "it starts at byte {} of the data, expected {}, where the tensor before it ends",
                    place.start - data_start,
                    end - data_start,
                ),
            });
        }
        end += place.bytes;
    }
    if end != file_bytes {
        return Err(CheckpointError::TrailingBytes {
            path: path.to_owned(),
            found: file_bytes,
            expected: end,
        });
    }
    Ok((places, metadata))
}

fn place(
    path: &Path,
    tensor: &str,
    entry: Value,
    data_start: u64,
    file_bytes: u64,
) -> Result<Place, CheckpointError> {
    let wrong = |reason: String| CheckpointError::Entry {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        reason,
    };
    let info: TensorInfo = serde_json::from_value(entry).map_err(|e| wrong(e.to_string()))?;
    let (start, end) = info.data_offsets;
    let bytes = end.checked_sub(start).ok_or_else(|| {
        wrong(format!(
            "it ends at {end}, before its start at {start}, expected the reverse"
        ))
    })?;
    let by_shape = info
        .shape
        .iter()
        .try_fold(1_usize, |product, &size| product.checked_mul(size))
        .and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
    if bytes.checked_mul(8) != by_shape || by_shape.is_none() {
        let expected =
            by_shape.map_or("more than can be".to_owned(), |bits| (bits / 8).to_string());
        return Err(wrong(format!(
            "it has {bytes} bytes, expected {expected} for {} of shape {:?}",
            info.dtype, info.shape,
        )));
    }
    let file_end = data_start.saturating_add(end as u64);
    if file_end > file_bytes {
        return Err(CheckpointError::Truncated {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            expected: file_end,
            found: file_bytes,
        });
    }
    Ok(Place {
        dtype: info.dtype,
        shape: info.shape,
        start: data_start + start as u64,
        bytes: bytes as u64,
    })
}
