//! From a decoder to a directory, all of it or nothing.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{Tensor, backend::Backend};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};

use super::directory;
use super::error::CheckpointError;
use super::load::check_vocabulary;
use super::names::{self, ParameterVisitor};
use super::numbers::{Overflow, WeightDtype, encode};
use super::tensors::{FileTensor, file_tensors};
use super::weights::int8_tensors;
use super::{CONFIG, GENERATION_CONFIG, INDEX, TOKENIZER, WEIGHTS, config};
use crate::decoder::{FusedKvDecoder, Weight, WeightFormat};
use crate::file;
use crate::parameters::{ModulePath, TensorSpec};
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
    /// Weights as the model has them (f32 for f64), shards of 5 GB, no tokenizer, no eos.
    pub fn new() -> Self {
        Self {
            dtype: None,
            shard_bytes: SHARD_BYTES,
            tokenizer: None,
            eos: Vec::new(),
        }
    }

    /// Saves all weights as `dtype`, those in fewer bits too.
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
/// type; [`CheckpointError::WeightFormat`] for weights of 4 bits where `options` has no float type;
/// [`CheckpointError::Vocabulary`] for a tokenizer with more tokens than the model, added ones aside;
/// [`CheckpointError::Adapted`]; [`CheckpointError::ShardBytes`].
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
    if model.lora().is_some() {
        return Err(CheckpointError::Adapted);
    }
    let planned = planned(model, options.dtype)?;
    let dtype = options
        .dtype
        .unwrap_or(WeightDtype::of_model(model.dtype()));
    let int8 = planned.iter().any(|tensor| tensor.dtype == Saved::Int8);
    let json = config::to_json(model.config(), dtype, int8, &options.eos)?;
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
        write_weights(partial, model, planned, options.shard_bytes)
    })
}

/// A tensor to be written.
struct Planned {
    tensor: FileTensor,
    dtype: Saved,
}

/// What a tensor's numbers are written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saved {
    Float(WeightDtype),
    Int8,
}

impl Saved {
    /// What a matrix of this format is; `model` is the float type of the model's.
    pub fn of(format: WeightFormat, model: WeightDtype) -> Option<Self> {
        match format {
            WeightFormat::Model => Some(Self::Float(model)),
            WeightFormat::F16 => Some(Self::Float(WeightDtype::F16)),
            WeightFormat::Bf16 => Some(Self::Float(WeightDtype::Bf16)),
            WeightFormat::Int8 => Some(Self::Int8),
            // The format has no tensors of others.
            _ => None,
        }
    }

    /// What a tensor is in a file.
    pub fn entries(self, spec: &TensorSpec) -> Vec<(TensorSpec, Dtype)> {
        match self {
            Self::Float(dtype) => vec![(spec.clone(), dtype.stored())],
            Self::Int8 => int8_tensors(spec).to_vec(),
        }
    }
}

impl Planned {
    fn entries(&self) -> Vec<(TensorSpec, Dtype)> {
        self.dtype.entries(&self.tensor.spec)
    }

    fn bytes(&self) -> u64 {
        let bytes = |(spec, dtype): (TensorSpec, Dtype)| spec.elements() * dtype.bitsize() / 8;
        self.entries().into_iter().map(bytes).sum::<usize>() as u64
    }
}

/// The tensors of a model, each as `dtype` or else as the model has it.
fn planned<B: Backend>(
    model: &FusedKvDecoder<B>,
    dtype: Option<WeightDtype>,
) -> Result<Vec<Planned>, CheckpointError> {
    let of_model = WeightDtype::of_model(model.dtype());
    let mut formats = HashMap::new();
    for (name, weight) in model.weights() {
        formats.insert(name, weight.format());
    }
    let planned = |tensor: FileTensor| {
        let of_part = |part: &TensorSpec| formats.get(&part.name).copied().unwrap_or_default();
        let format = of_part(&tensor.parts[0]);
        // One tensor has one type.
        let of_one = tensor.parts.iter().all(|part| of_part(part) == format);
        let saved = match dtype {
            Some(dtype) => Some(Saved::Float(dtype)),
            None if of_one => Saved::of(format, of_model),
            None => Some(Saved::Float(of_model)),
        };
        let Some(saved) = saved else {
            return Err(CheckpointError::WeightFormat {
                tensor: tensor.spec.name,
                format,
            });
        };
        Ok(Planned {
            tensor,
            dtype: saved,
        })
    };
    let tensors = file_tensors(model.config(), model.layout());
    tensors.into_iter().map(planned).collect()
}

/// `model.safetensors`, `model-00001-of-00002.safetensors`, the index.
pub(super) fn is_weights(name: &str) -> bool {
    let shard = name
        .strip_prefix("model-")
        .and_then(|n| n.strip_suffix(".safetensors"));
    let shard = shard.and_then(|numbers| numbers.split_once("-of-"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    name == WEIGHTS || name == INDEX || shard.is_some_and(|(n, of)| digits(n) && digits(of))
}

pub(super) fn write_json(path: &Path, json: &Value) -> Result<(), CheckpointError> {
    file::write(path, format!("{json:#}\n")).map_err(|source| CheckpointError::Write {
        path: path.to_owned(),
        source,
    })
}

fn write_weights<B: Backend>(
    directory: &Path,
    model: &FusedKvDecoder<B>,
    tensors: Vec<Planned>,
    shard_bytes: u64,
) -> Result<(), CheckpointError> {
    let mut shards: Vec<Vec<Planned>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.bytes();
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
        for tensor in &shard {
            total += tensor.bytes();
            for (spec, _) in tensor.entries() {
                index.insert(spec.name, json!(name));
            }
        }
        planned.push((directory.join(name), shard));
    }
    if count > 1 {
        let json = json!({ "metadata": { "total_size": total }, "weight_map": index });
        write_json(&directory.join(INDEX), &json)?;
    }
    let mut writer = ShardWriter {
        weights: model.weights().into_iter().collect(),
        shards: planned.into_iter(),
        current: None,
        failed: None,
    };
    names::visit(model, &mut writer);
    writer.finish()
}

/// Writes every parameter to the shard that it is planned for.
struct ShardWriter<'m, B: Backend> {
    weights: HashMap<String, &'m Weight<B>>,
    shards: std::vec::IntoIter<(PathBuf, Vec<Planned>)>,
    current: Option<Shard>,
    failed: Option<CheckpointError>,
}

struct Shard {
    path: PathBuf,
    file: BufWriter<File>,
    /// The parameters to come.
    left: std::vec::IntoIter<(TensorSpec, Saved)>,
    /// Scales of 8-bit codes, which stand behind all else.
    scales: Vec<u8>,
}

impl Shard {
    fn start(path: PathBuf, tensors: Vec<Planned>) -> Result<Self, CheckpointError> {
        let write = |source| CheckpointError::Write {
            path: path.clone(),
            source,
        };
        let mut file = BufWriter::new(File::create(&path).map_err(write)?);
        let specs = tensors.iter().map(|t| (&t.tensor.spec, t.dtype));
        file.write_all(&file_header(specs)).map_err(write)?;
        // Rows that follow one another in a tensor do so in the file.
        let parts = tensors.into_iter().flat_map(|Planned { tensor, dtype }| {
            let parts = tensor.parts.into_iter();
            parts.map(move |part| (part, dtype))
        });
        Ok(Self {
            left: parts.collect::<Vec<_>>().into_iter(),
            path,
            file,
            scales: Vec::new(),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let written = self.file.write_all(bytes);
        written.map_err(|source| CheckpointError::Write {
            path: self.path.clone(),
            source,
        })
    }

    fn finish(mut self) -> Result<(), CheckpointError> {
        let scales = std::mem::take(&mut self.scales);
        self.write(&scales)?;
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

/// What a file begins with that holds tensors as these: scales stand behind all else.
pub(super) fn file_header<'s>(tensors: impl Iterator<Item = (&'s TensorSpec, Saved)>) -> Vec<u8> {
    let (mut entries, mut scales) = (Vec::new(), Vec::new());
    for (spec, saved) in tensors {
        let mut of_tensor = saved.entries(spec).into_iter();
        entries.extend(of_tensor.next());
        scales.extend(of_tensor);
    }
    entries.extend(scales);
    header(&entries)
}

/// The start of a safetensors file of these tensors, one after the other.
pub(super) fn header(tensors: &[(TensorSpec, Dtype)]) -> Vec<u8> {
    header_with(tensors, [])
}

/// [`header`] with metadata of its own.
pub(super) fn header_with<const N: usize>(
    tensors: &[(TensorSpec, Dtype)],
    more: [(&str, String); N],
) -> Vec<u8> {
    let mut entries = Map::new();
    // What PyTorch's loaders look for.
    let mut metadata = json!({ "format": "pt" });
    for (key, value) in more {
        metadata[key] = json!(value);
    }
    entries.insert("__metadata__".to_owned(), metadata);
    let mut end = 0;
    for (spec, dtype) in tensors {
        let start = end;
        end += spec.elements() * dtype.bitsize() / 8;
        let info = TensorInfo {
            dtype: *dtype,
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

impl<B: Backend> ShardWriter<'_, B> {
    /// The next tensor, and the shard it goes to.
    fn next(&mut self) -> Result<(&mut Shard, TensorSpec, Saved), CheckpointError> {
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
            self.current = Some(Shard::start(path, tensors)?);
        }
        let shard = self.current.as_mut().expect("one was started");
        let (spec, dtype) = shard.left.next().expect("no shard is empty");
        Ok((shard, spec, dtype))
    }

    fn write<const D: usize>(
        &mut self,
        path: &ModulePath,
        param: &Param<Tensor<B, D>>,
    ) -> Result<(), CheckpointError> {
        let packed = match self.weights.get(&path.tensor()) {
            Some(Weight::Packed(packed)) => Some(packed.matrix.clone()),
            _ => None,
        };
        let (shard, spec, dtype) = self.next()?;
        assert_eq!(spec.name, path.tensor(), "`parameters` names them in order");
        let dtype = match (dtype, packed) {
            (Saved::Float(dtype), _) => dtype,
            (Saved::Int8, packed) => {
                let packed = packed.expect("planned for a packed matrix").into_rows();
                shard.scales.extend(packed.scale_bytes());
                return shard.write(&packed.code_bytes());
            }
        };
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
        shard.write(bytes)
    }

    fn finish(self) -> Result<(), CheckpointError> {
        match (self.failed, self.current) {
            (Some(error), _) => Err(error),
            (None, Some(shard)) => shard.finish(),
            (None, None) => Ok(()),
        }
    }
}

impl<B: Backend> ParameterVisitor<B> for ShardWriter<'_, B> {
    fn parameter<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<B, D>>) {
        if self.failed.is_none() {
            self.failed = self.write(path, param).err();
        }
    }
}
