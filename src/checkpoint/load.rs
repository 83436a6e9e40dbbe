//! From a directory to a decoder, tensor by tensor.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::rc::Rc;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Tensor, TensorData, backend::Backend, bf16, f16};

use super::TOKENIZER;
use super::config::{self, ModelConfig};
use super::error::CheckpointError;
use super::families;
use super::numbers::{Number, WeightDtype};
use super::tensors::{FileTensor, file_tensors};
use super::weights::Weights;
use crate::config::ConfigError;
use crate::decoder::{FusedKvDecoder, Weight, WeightFormat};
use crate::kernels::packed::Packed;
use crate::parameters::{ModulePath, TensorSpec, layer_tensors, tensors};
use crate::plan::{KvPlan, LayerKv};
use crate::tokenizer::Tokenizer;

/// What a checkpoint directory holds.
#[derive(Clone, Debug)]
pub struct LoadedCheckpoint<B: Backend> {
    /// The decoder; its configuration is [`FusedKvDecoder::config`].
    pub model: FusedKvDecoder<B>,
    /// That of `tokenizer.json`, if there is one.
    pub tokenizer: Option<Tokenizer>,
    /// Tokens that end a text: `eos_token_id` of `generation_config.json` or else of `config.json`.
    pub eos: Vec<u32>,
}

/// What a decoder is loaded as.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    dtype: WeightDtype,
    weights: WeightFormat,
    plan: Option<KvPlan>,
}

impl LoadOptions {
    /// A decoder of f32 and of the directory's plan.
    pub fn new() -> Self {
        Self::default()
    }

    /// The float type of the decoder, which it computes in, whatever the files have.
    #[must_use]
    pub fn with_dtype(self, dtype: WeightDtype) -> Self {
        Self { dtype, ..self }
    }

    /// What its matrices are kept in: each is packed as it is read, and one that the files have in
    /// this format is taken as it is.
    #[must_use]
    pub fn with_weights(self, weights: WeightFormat) -> Self {
        Self { weights, ..self }
    }

    /// Another plan than the directory's: projections and norms of keys and values that layers do
    /// not store under `plan` are left in the file. What `plan` needs must be there; `convert` makes
    /// fusion weights that are not.
    #[must_use]
    pub fn with_plan(self, plan: KvPlan) -> Self {
        Self {
            plan: Some(plan),
            ..self
        }
    }
}

impl From<WeightDtype> for LoadOptions {
    fn from(dtype: WeightDtype) -> Self {
        Self::new().with_dtype(dtype)
    }
}

/// Loads a decoder of any plan: [`LoadOptions`], or the float type alone.
///
/// Everything is checked before any weight is read: the configuration, the headers against the
/// files' lengths, the tensors against the configuration. Nothing is allocated that the files do
/// not bear out. Then each tensor is read in pieces into its final place, so that memory never
/// exceeds the weights by more than a tensor that a device copies.
///
/// Keys of `config.json` that are not of its family are ignored; a `dropout` is 0. A head that repeats a
/// tied embedding is accepted.
///
/// ```
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::checkpoint::{LoadOptions, SaveOptions, load_checkpoint, save_checkpoint};
/// use fusedkv::{FusedKvDecoderConfig, KvPart, KvPlan, WeightFormat};
///
/// # let directory = tempfile::tempdir()?;
/// # let directory = directory.path().join("model");
/// let device = FlexDevice::default();
/// let standard = FusedKvDecoderConfig::tiny(256, KvPlan::Standard).init::<Flex>(&device)?;
/// save_checkpoint(&directory, &standard, &SaveOptions::new())?;
///
/// let options = LoadOptions::new()
///     .with_plan(KvPlan::Yoco { storage_layers: 3 })
///     .with_weights(WeightFormat::Int8);
/// let loaded = load_checkpoint::<Flex>(&directory, options, &device)?;
/// assert_eq!(loaded.model.layout().n_stored(KvPart::Key), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`CheckpointError`], naming the file, and the tensor or the key.
pub fn load_checkpoint<B: Backend>(
    directory: impl AsRef<Path>,
    options: impl Into<LoadOptions>,
    device: &B::Device,
) -> Result<LoadedCheckpoint<B>, CheckpointError> {
    load(directory.as_ref(), options.into(), device)
}

fn load<B: Backend>(
    directory: &Path,
    options: LoadOptions,
    device: &B::Device,
) -> Result<LoadedCheckpoint<B>, CheckpointError> {
    let LoadOptions {
        dtype,
        weights: format,
        plan,
    } = options;
    if !B::supports_dtype(device, dtype.in_memory()) {
        return Err(CheckpointError::UnsupportedDtype {
            dtype,
            backend: B::name(device),
        });
    }
    let in_directory = |source| CheckpointError::Weight {
        path: directory.to_owned(),
        source,
    };
    format.check::<B>(device).map_err(in_directory)?;
    let mut config = config::read(directory)?;
    let mut weights = Weights::open(directory)?;
    let held = check(&config, &mut weights)?;
    let mut expected = parts(held);
    if let Some(plan) = plan {
        config.decoder.plan = plan;
        let layout = config.decoder.validate();
        let layout = layout.map_err(|source| in_config(&config, source))?;
        expected = narrowed(expected, tensors(&config.decoder, &layout), &weights)?;
    }
    let tokenizer = match directory.join(TOKENIZER) {
        path if path.is_file() => Some(Tokenizer::load(path)?),
        _ => None,
    };
    if let Some(tokenizer) = &tokenizer {
        check_vocabulary(directory, tokenizer, config.decoder.vocab_size)?;
    }
    // Parameters have no memory before they are used, or replaced.
    let model = config.decoder.init::<B>(device);
    let mut model = model.map_err(|source| in_config(&config, source))?;
    let mut later = HashSet::new();
    if format != WeightFormat::Model {
        later.extend(model.weights().into_iter().map(|(name, _)| name));
    }
    let expected = (expected.into_iter())
        .map(|(file, part)| (file.parts[part].name.clone(), (file, part)))
        .collect();
    let mut filler = Filler {
        path: ModulePath::default(),
        expected,
        later,
        weights,
        dtype,
        device,
        failed: None,
    };
    model = model.map(&mut filler);
    if let Some(error) = filler.failed.take() {
        return Err(error);
    }
    if format != WeightFormat::Model {
        model.try_for_each_weight(|name, weight, outputs| {
            *weight = filler.weight(name, weight.id(), format, outputs)?;
            Ok::<(), CheckpointError>(())
        })?;
    }
    Ok(LoadedCheckpoint {
        model,
        tokenizer,
        eos: config.eos,
    })
}

fn in_config(config: &ModelConfig, source: ConfigError) -> CheckpointError {
    CheckpointError::Config {
        path: config.path.clone(),
        source,
    }
}

/// The tensors the configuration asks for, if they are what the files have. Nothing is made as
/// large as the configuration says before the files are found to be.
fn check(config: &ModelConfig, weights: &mut Weights) -> Result<Vec<FileTensor>, CheckpointError> {
    let decoder = &config.decoder;
    if decoder.n_layers > weights.len() {
        // Among more layers than tensors, one has none.
        for index in 0..decoder.n_layers {
            let of_layer = layer_tensors(decoder, &LayerKv::OWN, index);
            // One that no family has in another tensor.
            let norm = of_layer
                .iter()
                .find(|spec| spec.name.ends_with("norm.weight"));
            if let Some(norm) = norm.filter(|norm| !weights.contains(&norm.name)) {
                return Err(weights.missing(norm));
            }
        }
    }
    let layout = decoder.validate();
    let layout = layout.map_err(|source| in_config(config, source))?;
    let expected = file_tensors(decoder, &layout);
    weights.forget(|tensor| families::is_unread(decoder, tensor));
    weights.check_all(&expected)?;
    Ok(expected)
}

/// Of the tensors that files hold, the parameters that a decoder needs.
fn narrowed(
    held: Vec<(Rc<FileTensor>, usize)>,
    needed: Vec<TensorSpec>,
    weights: &Weights,
) -> Result<Vec<(Rc<FileTensor>, usize)>, CheckpointError> {
    let held = held.into_iter();
    let held: HashMap<String, _> = held
        .map(|(file, part)| (file.parts[part].name.clone(), (file, part)))
        .collect();
    let find = |spec: TensorSpec| {
        let place = held.get(&spec.name).cloned();
        let (file, part) = place.ok_or_else(|| weights.missing(&spec))?;
        let found = &file.parts[part].shape;
        match *found == spec.shape {
            true => Ok((file, part)),
            // Weights of a blend of other sources.
            false => Err(weights.shape(&spec, found.clone())),
        }
    };
    needed.into_iter().map(find).collect()
}

/// Every parameter: the tensor it is in, and the number of its part.
fn parts(tensors: Vec<FileTensor>) -> Vec<(Rc<FileTensor>, usize)> {
    let tensors = tensors.into_iter().map(Rc::new);
    let parts = |tensor: Rc<FileTensor>| {
        let parts = 0..tensor.parts.len();
        parts.map(move |part| (tensor.clone(), part))
    };
    tensors.flat_map(parts).collect()
}

pub(crate) fn check_vocabulary(
    directory: &Path,
    tokenizer: &Tokenizer,
    vocab_size: usize,
) -> Result<(), CheckpointError> {
    if tokenizer.vocab_size() > vocab_size {
        return Err(CheckpointError::Vocabulary {
            directory: directory.to_owned(),
            tokenizer: tokenizer.vocab_size(),
            decoder: vocab_size,
        });
    }
    Ok(())
}

/// Replaces every parameter by its tensor.
struct Filler<'d, B: Backend> {
    path: ModulePath,
    /// By parameter: the tensor it is in, and the number of its part.
    expected: HashMap<String, (Rc<FileTensor>, usize)>,
    /// Matrices that become something else than a parameter of the decoder's float type.
    later: HashSet<String>,
    weights: Weights,
    dtype: WeightDtype,
    device: &'d B::Device,
    failed: Option<CheckpointError>,
}

impl<B: Backend> Filler<'_, B> {
    fn take(&mut self, name: &str) -> (Rc<FileTensor>, usize) {
        let place = self.expected.remove(name);
        place.expect("checkpoints have the decoder's parameters")
    }

    fn tensor<const D: usize>(
        &mut self,
        file: &FileTensor,
        part: usize,
    ) -> Result<Tensor<B, D>, CheckpointError> {
        // A bias is a vector.
        let transposed = self.path.is_linear() && D == 2;
        match self.dtype {
            WeightDtype::F32 => self.tensor_of::<f32, D>(file, part, transposed),
            WeightDtype::F16 => self.tensor_of::<f16, D>(file, part, transposed),
            WeightDtype::Bf16 => self.tensor_of::<bf16, D>(file, part, transposed),
        }
    }

    fn tensor_of<T: Number, const D: usize>(
        &mut self,
        file: &FileTensor,
        part: usize,
        transposed: bool,
    ) -> Result<Tensor<B, D>, CheckpointError> {
        let numbers = self.weights.numbers::<T>(file, part, transposed)?;
        let mut shape = file.parts[part].shape.clone();
        if transposed {
            shape.reverse();
        }
        let data = TensorData::new(numbers, shape);
        Ok(Tensor::from_data(data, (self.device, T::DTYPE.in_memory())))
    }

    /// A matrix in a format that is not the decoder's float type; as it lies in the file, which has
    /// a row for each output.
    fn weight(
        &mut self,
        name: &str,
        id: ParamId,
        format: WeightFormat,
        outputs: usize,
    ) -> Result<Weight<B>, CheckpointError> {
        let (file, part) = self.take(name);
        if let Some(codes) = format.codes() {
            let rows = self.weights.packed(&file, part, codes, format)?;
            let matrix = Packed::new(rows, self.device);
            return Ok(Weight::packed(
                id,
                match outputs {
                    0 => matrix,
                    _ => matrix.transpose(),
                },
            ));
        }
        let matrix: Tensor<B, 2> = match format {
            WeightFormat::F16 => self.tensor_of::<f16, 2>(&file, part, false)?,
            _ => self.tensor_of::<bf16, 2>(&file, part, false)?,
        };
        let matrix = match outputs {
            0 => matrix,
            _ => matrix.transpose(),
        };
        Ok(Param::initialized(id, matrix).into())
    }
}

impl<B: Backend> ModuleMapper<B> for Filler<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let name = self.path.tensor();
        if self.failed.is_some() || self.later.contains(&name) {
            return param;
        }
        let (file, part) = self.take(&name);
        let id = param.id;
        match self.tensor(&file, part) {
            Ok(tensor) => param.transform_for_load(tensor, id),
            Err(error) => {
                self.failed = Some(error);
                param
            }
        }
    }
}
