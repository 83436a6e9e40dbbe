//! From a directory to a decoder, tensor by tensor.

use std::collections::HashMap;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use burn::tensor::backend::Backend;

use super::TOKENIZER;
use super::config::{self, ModelConfig};
use super::error::CheckpointError;
use super::families;
use super::fill::{Filling, Part};
use super::numbers::WeightDtype;
use super::tensors::{FileTensor, TensorFiles, file_tensors};
use super::weights::Weights;
use crate::decoder::{FusedKvDecoder, WeightFormat};
use crate::parameters::{TensorSpec, layer_tensors, tensors};
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

impl LoadOptions {
    pub(super) fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// That a backend has the numbers.
    pub(super) fn check<B: Backend>(
        &self,
        path: &Path,
        device: &B::Device,
    ) -> Result<(), CheckpointError> {
        if !B::supports_dtype(device, self.dtype.in_memory()) {
            return Err(CheckpointError::UnsupportedDtype {
                dtype: self.dtype,
                backend: B::name(device),
            });
        }
        let checked = self.weights.check::<B>(device);
        checked.map_err(|source| CheckpointError::Weight {
            path: path.to_owned(),
            source,
        })
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
/// not bear out. Then tensors are read by all threads, piece by piece to their final places, beside the
/// tokenizer: memory exceeds the weights by 64 MiB, or one tensor, where a device copies what it is
/// given, otherwise by a few pieces.
///
/// Keys of `config.json` that are not of its family are ignored; a `dropout` is 0. A head that repeats a
/// tied embedding is accepted, RoPE's frequencies (`rotary_emb.inv_freq`) are not read. Tokens added to a
/// tokenizer may lie beyond the decoder's vocabulary: a text that has one is an error when it is read.
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
    options.check::<B>(directory, device)?;
    let config = config::read(directory)?;
    let mut weights = Weights::open(directory)?;
    let held = check(&config, &mut weights)?;
    let tokenizer = directory.join(TOKENIZER);
    let load_tokenizer = || match tokenizer.is_file() {
        true => Ok(Some(Tokenizer::load(&tokenizer)?)),
        false => Ok(None),
    };
    let files = (directory, &weights as &dyn TensorFiles, held);
    loaded(config, files, options, load_tokenizer, device)
}

/// A model of tensors that are what its configuration asks for, and its tokenizer.
pub(super) fn loaded<B: Backend, E: From<CheckpointError> + Send>(
    mut config: ModelConfig,
    (path, files, held): (&Path, &dyn TensorFiles, Vec<FileTensor>),
    options: LoadOptions,
    load_tokenizer: impl FnOnce() -> Result<Option<Tokenizer>, E> + Send,
    device: &B::Device,
) -> Result<LoadedCheckpoint<B>, E> {
    let expected = planned(&mut config, options.plan, held, files)?;
    let stopped = AtomicBool::new(false);
    let checked_tokenizer = || {
        let tokenizer = load_tokenizer().and_then(|tokenizer| {
            if let Some(tokenizer) = &tokenizer {
                check_vocabulary(path, tokenizer, config.decoder.vocab_size)?;
            }
            Ok(tokenizer)
        });
        stopped.store(tokenizer.is_err(), Ordering::Relaxed);
        tokenizer
    };
    // A large vocabulary takes as long as the weights of a small model.
    let (tokenizer, model) = thread::scope(|scope| {
        let tokenizer = scope.spawn(checked_tokenizer);
        let filling = Filling {
            files,
            expected,
            dtype: options.dtype,
            format: options.weights,
            stopped: &stopped,
        };
        // Where the threads are that it is read by: from outside, every tensor would wake them.
        let model = rayon::scope(|_| filling.decoder::<B>(&config, device));
        let tokenizer = tokenizer.join();
        (
            tokenizer.unwrap_or_else(|panic| resume_unwind(panic)),
            model,
        )
    });
    Ok(LoadedCheckpoint {
        tokenizer: tokenizer?,
        model: model?,
        eos: config.eos,
    })
}

/// Has a decoder's configuration be of `plan`, where there is one: the parameters that it then has.
fn planned(
    config: &mut ModelConfig,
    plan: Option<KvPlan>,
    held: Vec<FileTensor>,
    files: &dyn TensorFiles,
) -> Result<Vec<Part>, CheckpointError> {
    let parts = parts(held);
    let Some(plan) = plan else {
        return Ok(parts);
    };
    config.decoder.plan = plan;
    let layout = config.decoder.validate();
    let layout = layout.map_err(|source| config.invalid(source))?;
    narrowed(parts, tensors(&config.decoder, &layout), files)
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
    let layout = layout.map_err(|source| config.invalid(source))?;
    let expected = file_tensors(decoder, &layout);
    weights.forget(|tensor| families::is_unread(decoder, tensor));
    weights.check_all(&expected)?;
    Ok(expected)
}

/// Of the parameters that files hold, those that a decoder needs.
fn narrowed(
    held: Vec<Part>,
    needed: Vec<TensorSpec>,
    files: &dyn TensorFiles,
) -> Result<Vec<Part>, CheckpointError> {
    let held = held.into_iter();
    let held: HashMap<String, _> = held.map(|part| (part.spec().name.clone(), part)).collect();
    let find = |spec: TensorSpec| {
        let part = held.get(&spec.name).cloned();
        let part = part.ok_or_else(|| files.missing(&spec))?;
        match part.spec().shape == spec.shape {
            true => Ok(part),
            // Weights of a blend of other sources.
            false => Err(files.shape(&spec, part.spec().shape.clone())),
        }
    };
    needed.into_iter().map(find).collect()
}

/// Every parameter of files' tensors.
fn parts(tensors: Vec<FileTensor>) -> Vec<Part> {
    let tensors = tensors.into_iter().map(Arc::new);
    let parts = |tensor: Arc<FileTensor>| {
        let numbers = 0..tensor.parts.len();
        numbers.map(move |number| Part {
            tensor: tensor.clone(),
            number,
        })
    };
    tensors.flat_map(parts).collect()
}

/// That a decoder has the tokens that texts are made of. Added ones may lie beyond: Gemma 3 has one for
/// images, many a fine-tuned model one for padding. A text that has such a token is refused when it is
/// read.
pub(crate) fn check_vocabulary(
    directory: &Path,
    tokenizer: &Tokenizer,
    vocab_size: usize,
) -> Result<(), CheckpointError> {
    let found = tokenizer.base_vocab_size();
    if found > vocab_size {
        return Err(CheckpointError::Vocabulary {
            directory: directory.to_owned(),
            tokenizer: found,
            decoder: vocab_size,
        });
    }
    Ok(())
}
