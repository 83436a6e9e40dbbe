//! From a decoder to a directory, all of it or nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{Tensor, backend::Backend};
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};

use super::directory;
use super::error::CheckpointError;
use super::load::check_vocabulary;
use super::names::{self, ModulePath, ParameterVisitor};
use super::numbers::{Overflow, WeightDtype, encode};
use super::tensors::{FileTensor, file_tensors};
use super::{CONFIG, GENERATION_CONFIG, INDEX, TOKENIZER, WEIGHTS, config};
use crate::decoder::FusedKvDecoder;
use crate::file;
use crate::parameters::{TensorSpec, tensors};
use crate::tokenizer::Tokenizer;

/// Bytes per shard unless told otherwise, as Hugging Face's libraries have it.
const SHARD_BYTES: u64 = 5_000_000_000;

/// How a checkpoint is written, and what beside the model.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    dtype: Option<WeightDtype>,
    shard_bytes: u64,
    tokenizer: Option<Tokenizer>,
    eos: Vec<u32>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl SaveOptions {
    /// The model's own float type (f32 for f64), shards of 5 GB, no tokenizer, no eos.
    pub fn new() -> Self {
        Self {
            dtype: None,
            shard_bytes: SHARD_BYTES,
            tokenizer: None,
            eos: Vec::new(),
        }
    }

    /// Saves weights as `dtype`.
    #[must_use]
    pub fn with_dtype(self, dtype: WeightDtype) -> Self {
        Self {
            dtype: Some(dtype),
            ..self
        }
    }

    /// Starts another shard before a file's tensors exceed `bytes`; a larger tensor has its own.
    #[must_use]
    pub fn with_shard_bytes(self, bytes: u64) -> Self {
        Self {
            shard_bytes: bytes,
            ..self
        }
    }

    /// Saves the tokenizer, too.
    #[must_use]
    pub fn with_tokenizer(self, tokenizer: Tokenizer) -> Self {
        Self {
            tokenizer: Some(tokenizer),
            ..self
        }
    }

    /// Tokens that end a text, for `generation_config.json`.
    #[must_use]
    pub fn with_eos(self, eos: Vec<u32>) -> Self {
        Self { eos, ..self }
    }
}

/// Saves a decoder of any plan.
///
/// The directory changes in one step when everything is written: a process that dies before leaves
/// the old one whole. (Where the system cannot exchange two directories, on neither Linux nor macOS
/// or some network file systems, it takes two steps, and one that dies between them leaves the old
/// one beside its place.) Files in it that are not of a checkpoint stay, and so do `tokenizer.json`
/// and `generation_config.json` where `options` has none. Writing takes one tensor's memory. Two
/// processes should not save to one directory at once.
///
/// `dropout` and `fusion_init` of the configuration are not part of the format.
///
/// # Errors
/// [`CheckpointError::Write`]; [`CheckpointError::Family`] for a block that files of its family cannot
/// have; [`CheckpointError::Overflow`] for weights too large for the float
/// type; [`CheckpointError::NotInFormat`] for parameters the format does not have;
/// [`CheckpointError::Vocabulary`] for a tokenizer with more tokens than the model;
/// [`CheckpointError::ShardBytes`].
pub fn save_checkpoint<B: Backend>(
    directory: impl AsRef<Path>,
    model: &FusedKvDecoder<B>,
    options: &SaveOptions,
) -> Result<(), CheckpointError> {
    let directory = directory.as_ref();
    if options.shard_bytes == 0 {
        return Err(CheckpointError::ShardBytes);
    }
    if let Some(tokenizer) = &options.tokenizer {
        check_vocabulary(directory, tokenizer, model.config().vocab_size)?;
    }
    check_parameters(model)?;
    let model_dtype = model.embed_tokens.weight.val().dtype();
    let dtype = options.dtype.unwrap_or(WeightDtype::of_model(model_dtype));
    let json = config::to_json(model.config(), dtype, &options.eos)?;
    let replaced = |name: &str| {
        name == CONFIG
            || (name == TOKENIZER && options.tokenizer.is_some())
            || (name == GENERATION_CONFIG && !options.eos.is_empty())
            || is_weights(name)
    };
    directory::replace(directory, replaced, |partial| {
        write_json(&partial.join(CONFIG), &json)?;
        if !options.eos.is_empty() {
            let json = config::generation_json(&options.eos);
            write_json(&partial.join(GENERATION_CONFIG), &json)?;
        }
        if let Some(tokenizer) = &options.tokenizer {
            tokenizer.save(partial.join(TOKENIZER))?;
        }
        write_weights(partial, model, dtype, options.shard_bytes)
    })
}

/// That every parameter is a tensor of the format.
fn check_parameters<B: Backend>(model: &FusedKvDecoder<B>) -> Result<(), CheckpointError> {
    let tensors = tensors(model.config(), model.layout());
    let mut unknown = Unknown {
        known: tensors.into_iter().map(|spec| spec.name).collect(),
        found: None,
    };
    names::visit(model, &mut unknown);
    match unknown.found {
        Some(tensor) => Err(CheckpointError::NotInFormat { tensor }),
        None => Ok(()),
    }
}

/// The first parameter that is not known.
struct Unknown {
    known: BTreeSet<String>,
    found: Option<String>,
}

impl<B: Backend> ParameterVisitor<B> for Unknown {
    fn parameter<const D: usize>(&mut self, path: &ModulePath, _: &Param<Tensor<B, D>>) {
        let name = path.tensor();
        if self.found.is_none() && !self.known.contains(&name) {
            self.found = Some(name);
        }
    }
}

/// `model.safetensors`, `model-00001-of-00002.safetensors`, the index.
fn is_weights(name: &str) -> bool {
    let shard = name
        .strip_prefix("model-")
        .and_then(|n| n.strip_suffix(".safetensors"));
    let shard = shard.and_then(|numbers| numbers.split_once("-of-"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    name == WEIGHTS || name == INDEX || shard.is_some_and(|(n, of)| digits(n) && digits(of))
}

fn write_json(path: &Path, json: &Value) -> Result<(), CheckpointError> {
    file::write(path, format!("{json:#}\n")).map_err(|source| CheckpointError::Write {
        path: path.to_owned(),
        source,
    })
}

fn write_weights<B: Backend>(
    directory: &Path,
    model: &FusedKvDecoder<B>,
    dtype: WeightDtype,
    shard_bytes: u64,
) -> Result<(), CheckpointError> {
    let tensors = file_tensors(model.config(), model.layout());
    let bytes = |spec: &TensorSpec| (spec.elements() * dtype.bytes()) as u64;
    let mut shards: Vec<Vec<FileTensor>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let bytes = bytes(&tensor.spec);
        match shards.last_mut() {
            Some(shard) if filled + bytes <= shard_bytes => {
                filled += bytes;
                shard.push(tensor);
            }
            _ => {
                filled = bytes;
                shards.push(vec![tensor]);
            }
        }
    }
    let count = shards.len();
    let mut index = Map::new();
    let mut total = 0;
    let mut planned = Vec::new();
    for (number, shard) in (1..).zip(shards) {
        let name = match count {
            1 => WEIGHTS.to_owned(),
            _ => format!("model-{number:05}-of-{count:05}.safetensors"),
        };
        for FileTensor { spec, .. } in &shard {
            total += bytes(spec);
            index.insert(spec.name.clone(), json!(name));
        }
        planned.push((directory.join(name), shard));
    }
    if count > 1 {
        let json = json!({ "metadata": { "total_size": total }, "weight_map": index });
        write_json(&directory.join(INDEX), &json)?;
    }
    let mut writer = ShardWriter {
        shards: planned.into_iter(),
        dtype,
        current: None,
        failed: None,
    };
    names::visit(model, &mut writer);
    writer.finish()
}

/// Writes every parameter to the shard that it is planned for.
struct ShardWriter {
    shards: std::vec::IntoIter<(PathBuf, Vec<FileTensor>)>,
    dtype: WeightDtype,
    current: Option<Shard>,
    failed: Option<CheckpointError>,
}

struct Shard {
    path: PathBuf,
    file: BufWriter<File>,
    /// The parameters to come.
    left: std::vec::IntoIter<TensorSpec>,
}

impl Shard {
    fn start(
        path: PathBuf,
        tensors: Vec<FileTensor>,
        dtype: WeightDtype,
    ) -> Result<Self, CheckpointError> {
        let write = |source| CheckpointError::Write {
            path: path.clone(),
            source,
        };
        let mut file = BufWriter::new(File::create(&path).map_err(write)?);
        let (specs, parts): (Vec<_>, Vec<_>) = (tensors
            .into_iter()
            .map(|tensor| (tensor.spec, tensor.parts)))
        .unzip();
        file.write_all(&header(&specs, dtype)).map_err(write)?;
        // Rows that follow one another in a tensor do so in the file.
        let parts: Vec<TensorSpec> = parts.into_iter().flatten().collect();
        Ok(Self {
            path,
            file,
            left: parts.into_iter(),
        })
    }

    fn finish(mut self) -> Result<(), CheckpointError> {
        let synced = self
            .file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(|source| CheckpointError::Write {
            path: self.path,
            source,
        })
    }
}

/// The start of a safetensors file of these tensors, one after the other.
pub(super) fn header(tensors: &[TensorSpec], dtype: WeightDtype) -> Vec<u8> {
    let mut entries = Map::new();
    // What PyTorch's loaders look for.
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for spec in tensors {
        let start = end;
        end += spec.elements() * dtype.bytes();
        let info = TensorInfo {
            dtype: dtype.stored(),
            shape: spec.shape.clone(),
            data_offsets: (start, end),
        };
        entries.insert(spec.name.clone(), json!(info));
    }
    let mut json = Value::Object(entries).to_string();
    // The numbers begin at a multiple of 8.
    json.extend(std::iter::repeat_n(
        ' ',
        json.len().next_multiple_of(8) - json.len(),
    ));
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json.into_bytes());
    header
}

impl ShardWriter {
    /// The next tensor, and the shard it goes to.
    fn next(&mut self) -> Result<(&mut Shard, TensorSpec), CheckpointError> {
        if self
            .current
            .as_ref()
            .is_none_or(|shard| shard.left.len() == 0)
        {
            if let Some(shard) = self.current.take() {
                shard.finish()?;
            }
            let (path, tensors) = self
                .shards
                .next()
                .expect("shards are planned for all tensors");
            self.current = Some(Shard::start(path, tensors, self.dtype)?);
        }
        let shard = self.current.as_mut().expect("one was started");
        let spec = shard.left.next().expect("no shard is empty");
        Ok((shard, spec))
    }

    fn write<B: Backend, const D: usize>(
        &mut self,
        path: &ModulePath,
        param: &Param<Tensor<B, D>>,
    ) -> Result<(), CheckpointError> {
        let dtype = self.dtype;
        let (shard, spec) = self.next()?;
        debug_assert_eq!(spec.name, path.tensor());
        let mut tensor = param.val();
        if path.is_linear() && D == 2 {
            tensor = tensor.swap_dims(0, 1);
        }
        let data = tensor.into_data();
        let mut converted = Vec::new();
        let bytes = if data.dtype == dtype.in_memory() {
            data.as_bytes()
        } else {
            encode(data.iter::<f64>(), dtype, &mut converted).map_err(|Overflow(value)| {
                CheckpointError::Overflow {
                    path: shard.path.clone(),
                    tensor: spec.name,
                    value,
                    dtype,
                }
            })?;
            &converted
        };
        shard
            .file
            .write_all(bytes)
            .map_err(|source| CheckpointError::Write {
                path: shard.path.clone(),
                source,
            })
    }

    fn finish(self) -> Result<(), CheckpointError> {
        match (self.failed, self.current) {
            (Some(error), _) => Err(error),
            (None, Some(shard)) => shard.finish(),
            (None, None) => Ok(()),
        }
    }
}

impl<B: Backend> ParameterVisitor<B> for ShardWriter {
    fn parameter<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<B, D>>) {
        if self.failed.is_none() {
            self.failed = self.write(path, param).err();
        }
    }
}
