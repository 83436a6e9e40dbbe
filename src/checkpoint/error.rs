//! What can be wrong with a checkpoint directory.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::numbers::WeightDtype;
use crate::config::ConfigError;
use crate::decoder::{LoraError, WeightError, WeightFormat};
use crate::tokenizer::TokenizerError;

/// A checkpoint directory that cannot be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file that makes a checkpoint directory is not there.
    #[error("{} is no checkpoint directory: it has no {file}", directory.display())]
    MissingFile {
        /// The directory.
        directory: PathBuf,
        /// What is missing.
        file: &'static str,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file or directory cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that should be a JSON object is none.
    #[error("{} is no JSON object: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it stops being one.
        reason: String,
    },
    /// A key that is missing, has a value of another kind, or one that this decoder does not do.
    #[error("{}: `{key}` is {found}, expected {expected}", path.display())]
    Setting {
        /// The file.
        path: PathBuf,
        /// The key, as in "rope_parameters.rope_theta".
        key: String,
        /// Its value as JSON, or "missing".
        found: String,
        /// What it may be.
        expected: String,
    },
    /// The configuration describes no decoder.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
    /// A safetensors file that ends before its header does, or says so.
    #[error(
        "{} is truncated or no safetensors file: its header is said to take {length} bytes, the \
         file has {available}",
        path.display()
    )]
    HeaderLength {
        /// The file.
        path: PathBuf,
        /// What its first 8 bytes say; 8 if they are not there.
        length: u64,
        /// Bytes there are for it.
        available: u64,
    },
    /// A safetensors header that cannot be read.
    #[error("the header of {} cannot be read: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A tensor's entry in the header contradicts itself or the file's other tensors.
    #[error("{}: the header's entry of `{tensor}` is wrong: {reason}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// A tensor lies beyond the end of the file.
    #[error(
        "{} is truncated: `{tensor}` ends at byte {expected}, the file has {found} bytes",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where the tensor ends.
        expected: u64,
        /// Where the file ends.
        found: u64,
    },
    /// Bytes that belong to no tensor.
    #[error("{} has {found} bytes, expected {expected} by its header", path.display())]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// Bytes there are.
        found: u64,
        /// Bytes the header accounts for.
        expected: u64,
    },
    /// The configured decoder has a tensor that no file has.
    #[error("{} has no tensor `{tensor}`, expected one of shape {shape:?}", path.display())]
    MissingTensor {
        /// The file of weights, or the index of several.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A file has a tensor that the configured decoder has not.
    #[error("{} has a tensor `{tensor}`, which {reason}", path.display())]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why it is none of the decoder's.
        reason: &'static str,
    },
    /// A tensor of another shape than the configuration says.
    #[error("{}: `{tensor}` has shape {found:?}, expected {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// What the configuration says.
        expected: Vec<usize>,
    },
    /// A tensor of other numbers than a checkpoint has.
    #[error("{}: `{tensor}` has dtype {found}, expected F32, F16 or BF16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype in the file.
        found: String,
    },
    /// The index of shards names a file that does not have the tensor.
    #[error("{}: `{tensor}` is said to be in `{shard}`, which {reason}", path.display())]
    Shard {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file it names.
        shard: String,
        /// What is wrong with that.
        reason: &'static str,
    },
    /// A block that the decoder's family has no key for.
    #[error(
        "the decoder's block.{field} is none that files of the family \"{family}\" can have, \
         expected another block or another family"
    )]
    Family {
        /// The family's `model_type`.
        family: &'static str,
        /// Where the block differs from all that its files can say.
        field: &'static str,
    },
    /// A number that the type asked for is too small for.
    #[error("{}: `{tensor}` has an element {value:e}, too large for {dtype:?}", path.display())]
    Overflow {
        /// The file read or written.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The element.
        value: f64,
        /// The type asked for.
        dtype: WeightDtype,
    },
    /// Weights that files of this format cannot have.
    #[error("`{tensor}` is in {format}, which is not saved: a float type must be asked for")]
    WeightFormat {
        /// The tensor.
        tensor: String,
        /// What the model has it in.
        format: WeightFormat,
    },
    /// Matrices that cannot be in the format asked for.
    #[error("{}: {source}", path.display())]
    Weight {
        /// The directory, or the file.
        path: PathBuf,
        /// Why not.
        source: WeightError,
    },
    /// Adapters that the decoder cannot have.
    #[error("{}: {source}", path.display())]
    Adapter {
        /// The adapters' configuration.
        path: PathBuf,
        /// Why not.
        source: LoraError,
    },
    /// Adapters that were made for another decoder.
    #[error(
        "{} has adapters of a decoder whose {field} is {found}, expected {expected}",
        path.display()
    )]
    OtherBase {
        /// The file of adapters.
        path: PathBuf,
        /// Where the decoders differ.
        field: String,
        /// Of the decoder they were made for.
        found: String,
        /// Of the one they are loaded beside.
        expected: String,
    },
    /// Nothing to save.
    #[error("the decoder has no adapters, expected some to save")]
    NoAdapter,
    /// Adapters that the directory of a decoder has no place for.
    #[error(
        "the decoder has adapters, expected none: `merge_lora` puts them into the weights, \
         `save_adapter` saves them"
    )]
    Adapted,
    /// Numbers that the backend cannot compute with.
    #[error("weights of {dtype:?} on the backend {backend}, which has no such numbers")]
    UnsupportedDtype {
        /// What was asked for.
        dtype: WeightDtype,
        /// The backend.
        backend: String,
    },
    /// A [`RowWriter`](super::RowWriter) was given more or fewer numbers than its tensor has.
    #[error("{found} numbers for {}, expected {expected}", path.display())]
    Rows {
        /// The file.
        path: PathBuf,
        /// Numbers written.
        found: usize,
        /// Numbers of the tensor.
        expected: usize,
    },
    /// Shards of no bytes.
    #[error("shards of 0 bytes, expected at least 1")]
    ShardBytes,
    /// The tokenizer cannot be read or written.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The tokenizer knows tokens the decoder does not, beside added ones.
    #[error(
        "{}: the tokenizer has {tokenizer} tokens without added ones, expected at most the \
         decoder's {decoder}",
        directory.display()
    )]
    Vocabulary {
        /// The directory.
        directory: PathBuf,
        /// Tokens of the tokenizer, without those added to its vocabulary.
        tokenizer: usize,
        /// Size of the decoder's vocabulary.
        decoder: usize,
    },
}
