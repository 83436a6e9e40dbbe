//! One GGUF file: a header that is believed only as far as the file bears it out, and tensors that
//! are read piece by piece.
//!
//! Format: `docs/gguf.md` of ggml.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::error::GgufError;
use super::formats::Format;
use super::value::{GgufArray, GgufNumbers, GgufValue, Kind};
use crate::checkpoint::shared_file::SharedFile;

const MAGIC: [u8; 4] = *b"GGUF";

/// Bytes of a header, at most: that of a vocabulary of 262144 tokens takes some ten million.
const MAX_HEADER: u64 = 1 << 28;

/// Arrays in arrays, at most; models have none.
const MAX_DEPTH: usize = 4;

/// ggml has no more.
const MAX_DIMENSIONS: u32 = 4;

const DEFAULT_ALIGNMENT: u64 = 32;

/// Bytes read at a time, about.
const PIECE: usize = 1 << 20;

/// An open GGUF file of version 2 or 3, whose header has been checked against its length.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    file: SharedFile,
    version: u32,
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

/// A tensor in a file.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    pub(super) format: &'static Format,
    shape: Vec<usize>,
    /// From the start of the file.
    start: u64,
    bytes: u64,
}

impl GgufTensor {
    /// ggml's name for the format of its numbers, as in "Q4_K".
    pub fn format(&self) -> &'static str {
        self.format.name
    }

    /// Its shape, outermost dimension first (a GGUF file has the innermost first).
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many numbers it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl GgufFile {
    /// Reads the header. Nothing is allocated that the file's length does not bear out.
    ///
    /// # Errors
    /// [`GgufError::Read`], [`GgufError::Magic`], [`GgufError::Version`], [`GgufError::Truncated`],
    /// [`GgufError::Entry`], [`GgufError::TensorType`], [`GgufError::TruncatedTensor`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let read = |source| GgufError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        let mut header = Header {
            path,
            file: BufReader::new(file),
            position: 0,
            length,
            at: "the first 24 bytes".to_owned(),
        };
        let magic = header.bytes()?;
        if magic != MAGIC {
            return Err(GgufError::Magic {
                path: path.to_owned(),
                found: magic,
            });
        }
        let version = header.u32()?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version {
                path: path.to_owned(),
                found: version,
            });
        }
        let (n_tensors, n_keys) = (header.u64()?, header.u64()?);
        let metadata = header.metadata(n_keys)?;
        let tensors = header.tensors(n_tensors, &metadata)?;
        Ok(Self {
            path: path.to_owned(),
            file: header.file.into_inner().into(),
            version,
            metadata,
            tensors,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Keys and values.
    pub fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// A tensor's numbers, row by row.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`], [`GgufError::Read`].
    pub fn numbers(&self, tensor: &str) -> Result<Vec<f32>, GgufError> {
        let mut all = Vec::new();
        self.pieces(tensor, 1, |numbers| {
            all.extend_from_slice(numbers);
            Ok(())
        })?;
        Ok(all)
    }

    /// The error for a tensor that is not there.
    pub(super) fn missing(&self, tensor: &str) -> GgufError {
        GgufError::MissingTensor {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
        }
    }

    /// Calls `piece` with a tensor's numbers, in order, a multiple of `rows` rows at a time (a
    /// tensor of one dimension is a single row).
    pub(super) fn pieces(
        &self,
        tensor: &str,
        rows: usize,
        mut piece: impl FnMut(&mut [f32]) -> Result<(), GgufError>,
    ) -> Result<(), GgufError> {
        let place = match self.tensors.get(tensor) {
            Some(place) => place.clone(),
            None => return Err(self.missing(tensor)),
        };
        // Rows are whole blocks, and the tensor has been checked to lie in the file.
        let columns = place.shape.last().copied().unwrap_or(1);
        let group = (rows * (columns / place.format.block) * place.format.bytes).max(1);
        let longest = (PIECE / group).max(1) * group;
        let mut done = 0;
        let mut bytes = vec![0; place.bytes.min(longest as u64) as usize];
        let mut numbers = Vec::new();
        while done < place.bytes {
            let length = (place.bytes - done).min(longest as u64) as usize;
            let bytes = &mut bytes[..length];
            self.read(&place, done, bytes)
                .map_err(|source| GgufError::Read {
                    path: self.path.clone(),
                    source,
                })?;
            numbers.clear();
            (place.format.decode)(bytes, &mut numbers);
            piece(&mut numbers)?;
            done += length as u64;
        }
        Ok(())
    }

    /// Fills `bytes` with those of a tensor from the `offset`th on.
    pub(super) fn read(
        &self,
        tensor: &GgufTensor,
        offset: u64,
        bytes: &mut [u8],
    ) -> io::Result<()> {
        self.file.read_at(tensor.start + offset, bytes)
    }
}

/// A file up to where its tensors begin.
struct Header<'p> {
    path: &'p Path,
    file: BufReader<File>,
    position: u64,
    length: u64,
    /// What is being read, for errors.
    at: String,
}

impl Header<'_> {
    fn wrong(&self, reason: impl Into<String>) -> GgufError {
        GgufError::Entry {
            path: self.path.to_owned(),
            at: self.at.clone(),
            reason: reason.into(),
        }
    }

    /// That `count` things of at least `each` bytes can follow.
    fn follow(&self, count: u64, each: u64) -> Result<(), GgufError> {
        let expected = count.saturating_mul(each);
        let found = self.length - self.position;
        if expected > found {
            return Err(GgufError::Truncated {
                path: self.path.to_owned(),
                at: self.at.clone(),
                expected,
                found,
            });
        }
        if self.position.saturating_add(expected) > MAX_HEADER {
            return Err(self.wrong(format!(
                "it ends at byte {} at the least, expected the header to be of {MAX_HEADER} at most",
                self.position.saturating_add(expected),
            )));
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), GgufError> {
        self.follow(bytes.len() as u64, 1)?;
        self.file
            .read_exact(bytes)
            .map_err(|source| GgufError::Read {
                path: self.path.to_owned(),
                source,
            })?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn take(&mut self, length: u64) -> Result<Vec<u8>, GgufError> {
        self.follow(length, 1)?;
        // No longer than the file, nor than a header may be.
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, GgufError> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        String::from_utf8(bytes).map_err(|error| self.wrong(format!("its text is {error}")))
    }

    fn metadata(&mut self, count: u64) -> Result<BTreeMap<String, GgufValue>, GgufError> {
        // A length, a type and one byte.
        self.follow(count, 13)?;
        let mut metadata = BTreeMap::new();
        for number in 0..count {
            self.at = format!("key {number} of {count}");
            let key = self.text()?;
            self.at = format!("the key `{}`", short(&key));
            let kind = self.u32()?;
            let value = self.value(kind, 0)?;
            match metadata.entry(key) {
                Entry::Vacant(entry) => entry.insert(value),
                Entry::Occupied(_) => return Err(self.wrong("there are two of it, expected one")),
            };
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<GgufValue, GgufError> {
        match kind {
            8 => self.text().map(GgufValue::Text),
            9 => self.array(depth).map(GgufValue::Array),
            _ => {
                let kind = self.kind(kind)?;
                let bytes = self.take(kind.bytes() as u64)?;
                self.check_flags(kind, &bytes)?;
                Ok(kind.read(&bytes))
            }
        }
    }

    fn kind(&self, kind: u32) -> Result<Kind, GgufError> {
        let unknown = || self.wrong(format!("its value is of type {kind}, expected 0 to 12"));
        Kind::of(kind).ok_or_else(unknown)
    }

    fn check_flags(&self, kind: Kind, bytes: &[u8]) -> Result<(), GgufError> {
        let flag = bytes.iter().find(|&&byte| byte > 1);
        match flag.filter(|_| kind == Kind::Bool) {
            Some(byte) => Err(self.wrong(format!("its flag is {byte}, expected 0 or 1"))),
            None => Ok(()),
        }
    }

    fn array(&mut self, depth: usize) -> Result<GgufArray, GgufError> {
        if depth == MAX_DEPTH {
            return Err(self.wrong(format!("its arrays are more than {MAX_DEPTH} deep")));
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        match kind {
            8 => {
                self.follow(count, 8)?;
                let texts = (0..count).map(|_| self.text());
                texts.collect::<Result<_, _>>().map(GgufArray::Texts)
            }
            9 => {
                self.follow(count, 12)?;
                let arrays = (0..count).map(|_| self.array(depth + 1));
                arrays.collect::<Result<_, _>>().map(GgufArray::Arrays)
            }
            _ => {
                let kind = self.kind(kind)?;
                self.follow(count, kind.bytes() as u64)?;
                let bytes = self.take(count * kind.bytes() as u64)?;
                self.check_flags(kind, &bytes)?;
                Ok(GgufArray::Numbers(GgufNumbers { kind, bytes }))
            }
        }
    }

    fn tensors(
        &mut self,
        count: u64,
        metadata: &BTreeMap<String, GgufValue>,
    ) -> Result<BTreeMap<String, GgufTensor>, GgufError> {
        self.at = "the key `general.alignment`".to_owned();
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(value) => value
                .as_unsigned()
                .filter(|alignment| alignment.is_power_of_two())
                .ok_or_else(|| {
                    self.wrong(format!("it is {}, expected a power of two", value.shown()))
                })?,
        };
        self.at = "the list of tensors".to_owned();
        // A length, the number of dimensions, a type and an offset.
        self.follow(count, 24)?;
        let mut tensors = BTreeMap::new();
        for number in 0..count {
            self.at = format!("tensor {number} of {count}");
            let name = self.text()?;
            self.at = format!("the tensor `{}`", short(&name));
            let tensor = self.tensor(&name, alignment)?;
            match tensors.entry(name) {
                Entry::Vacant(entry) => entry.insert(tensor),
                Entry::Occupied(_) => return Err(self.wrong("there are two of it, expected one")),
            };
        }
        let start = self.position.next_multiple_of(alignment);
        for (name, tensor) in &mut tensors {
            tensor.start = tensor.start.saturating_add(start);
            let end = tensor.start.saturating_add(tensor.bytes);
            if end > self.length {
                return Err(GgufError::TruncatedTensor {
                    path: self.path.to_owned(),
                    tensor: name.clone(),
                    expected: end,
                    found: self.length,
                });
            }
        }
        // No byte belongs to two tensors.
        let mut in_order: Vec<_> = tensors.iter().collect();
        in_order.sort_by_key(|(_, tensor)| (tensor.start, tensor.bytes));
        for pair in in_order.windows(2) {
            let [(before, first), (name, second)] = pair else {
                continue;
            };
            if first.start + first.bytes > second.start {
                self.at = format!("the tensor `{}`", short(name));
                return Err(self.wrong(format!(
                    "it starts at byte {}, before the end of `{before}` at {}",
                    second.start,
                    first.start + first.bytes,
                )));
            }
        }
        Ok(tensors)
    }

    /// A tensor whose place is relative to the others still.
    fn tensor(&mut self, name: &str, alignment: u64) -> Result<GgufTensor, GgufError> {
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(self.wrong(format!(
                "it has {dimensions} dimensions, expected at most {MAX_DIMENSIONS}"
            )));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64()?;
            let fits = usize::try_from(size);
            shape.push(fits.map_err(|_| self.wrong(format!("it has a dimension of {size}")))?);
        }
        let columns = shape.first().copied().unwrap_or(1);
        shape.reverse();
        let id = self.u32()?;
        let format = Format::of(id).ok_or_else(|| GgufError::TensorType {
            path: self.path.to_owned(),
            tensor: name.to_owned(),
            found: Format::unknown(id),
            known: Format::known(),
        })?;
        if columns % format.block != 0 {
            return Err(self.wrong(format!(
                "its rows have {columns} numbers, expected a multiple of {}, the block of {}",
                format.block, format.name,
            )));
        }
        let bytes = shape
            .iter()
            .try_fold(1_usize, |product, &size| product.checked_mul(size))
            .and_then(|elements| (elements / format.block).checked_mul(format.bytes))
            .ok_or_else(|| self.wrong(format!("its shape {shape:?} is of more than can be")))?;
        let start = self.u64()?;
        if start % alignment != 0 {
            return Err(self.wrong(format!(
                "it starts at byte {start} of the data, expected a multiple of {alignment}"
            )));
        }
        Ok(GgufTensor {
            format,
            shape,
            start,
            bytes: bytes as u64,
        })
    }
}

/// A name for a message, cut short: a header may say anything.
fn short(name: &str) -> &str {
    match name.char_indices().nth(80) {
        Some((end, _)) => &name[..end],
        None => name,
    }
}
