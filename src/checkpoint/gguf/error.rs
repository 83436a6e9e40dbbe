//! What can be wrong with a GGUF file.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::checkpoint::CheckpointError;

/// A GGUF file that cannot be read or imported.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file does not begin as GGUF files do.
    #[error("{} is no GGUF file: it begins with {found:02x?}, expected \"GGUF\"", path.display())]
    Magic {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        found: [u8; 4],
    },
    /// A version of the format that is not known.
    #[error("{} is of GGUF version {found}, expected 2 or 3, little-endian", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version, read as little-endian.
        found: u32,
    },
    /// The file ends before its header does, or the header lies about a length.
    #[error(
        "{} is truncated in {at}: {expected} more bytes expected, the file has {found}",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Where in the header, as in "the key `general.name`".
        at: String,
        /// Bytes that the header says follow.
        expected: u64,
        /// Bytes that do.
        found: u64,
    },
    /// An entry of the header that cannot be or contradicts others.
    #[error("{}: {at} is wrong: {reason}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// Where in the header, as in "the tensor `output.weight`".
        at: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// A tensor lies beyond the end of the file.
    #[error(
        "{} is truncated: `{tensor}` ends at byte {expected}, the file has {found} bytes",
        path.display()
    )]
    TruncatedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where the tensor ends.
        expected: u64,
        /// Where the file ends.
        found: u64,
    },
    /// Numbers in a format that is not known.
    #[error("{}: `{tensor}` has numbers of type {found}, expected one of {known}", path.display())]
    TensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type's number in ggml, and its name where there is one.
        found: String,
        /// The types that can be read.
        known: String,
    },
    /// A model of an architecture that is not known.
    #[error("{} has a model of architecture {found:?}, expected one of {known}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// `general.architecture`.
        found: String,
        /// The architectures that can be imported.
        known: String,
    },
    /// A key that is missing, has a value of another kind, or one that cannot be imported.
    #[error("{}: `{key}` is {found}, expected {expected}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value, or "missing".
        found: String,
        /// What it may be.
        expected: String,
    },
    /// The model has a tensor that the file has not.
    #[error("{} has no tensor `{tensor}`", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in GGUF.
        tensor: String,
    },
    /// The file has a tensor that models of its architecture have not.
    #[error(
        "{} has a tensor `{tensor}`, which a model of architecture {architecture:?} has not",
        path.display()
    )]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in GGUF.
        tensor: String,
        /// The architecture.
        architecture: String,
    },
    /// A tensor of another shape than the metadata says.
    #[error("{}: `{tensor}` has shape {found:?}, expected {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's name in GGUF.
        tensor: String,
        /// Its shape in the file, outermost dimension first.
        found: Vec<usize>,
        /// What the metadata says.
        expected: Vec<usize>,
    },
    /// The vocabulary makes no tokenizer.
    #[error("the tokenizer of {} cannot be made: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The directory cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}
