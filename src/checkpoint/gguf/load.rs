//! From a file to a decoder.

use std::path::Path;

use burn::tensor::backend::Backend;
use serde_json::Value;

use super::config::config;
use super::error::GgufError;
use super::file::GgufFile;
use super::keys::Keys;
use super::model::Model;
use super::rope::Rope;
use super::rows::GgufTensors;
use super::vocabulary::Vocabulary;
use crate::checkpoint::load::loaded;
use crate::checkpoint::tensors::file_tensors;
use crate::checkpoint::{self, LoadOptions, LoadedCheckpoint};
use crate::tokenizer::Tokenizer;

/// Loads a GGUF file: the decoder that [`load_checkpoint`](crate::checkpoint::load_checkpoint) loads from
/// what [`import_gguf`](super::import_gguf) writes, without the directory. Tensors of Q8_0 are the codes of
/// [`WeightFormat::Int8`](crate::WeightFormat) as they lie, and memory is as for a directory.
///
/// # Errors
/// [`GgufError`], naming the file, and the key or the tensor.
pub fn load_gguf<B: Backend>(
    path: impl AsRef<Path>,
    options: impl Into<LoadOptions>,
    device: &B::Device,
) -> Result<LoadedCheckpoint<B>, GgufError> {
    let options = options.into();
    options.check::<B>(path.as_ref(), device)?;
    let file = GgufFile::open(path)?;
    let model = Model::of(&file)?;
    let rope = Rope::read(&file, &model)?;
    let keys = Keys::of(&file, model.architecture.name);
    let json = match config(&keys, &model, &rope, options.dtype())? {
        Value::Object(json) => json,
        _ => Default::default(),
    };
    let vocabulary = Vocabulary::of(keys, &model)?;
    let eos = match &vocabulary {
        Some(vocabulary) => Some(vocabulary.ends()?).filter(|ends| !ends.is_empty()),
        None => None,
    };
    let json = checkpoint::keys::Keys::of(file.path().to_owned(), json);
    let config = checkpoint::config::of_keys(&json, eos)?;
    let layout = config.decoder.validate();
    let layout = layout.map_err(|source| config.invalid(source))?;
    let held = file_tensors(&config.decoder, &layout);
    let tensors = GgufTensors::new(&file, &model);
    tensors.check(&held)?;
    let tokenizer = || {
        let Some(vocabulary) = vocabulary else {
            return Ok(None);
        };
        let tokenizer = Tokenizer::from_json(&vocabulary.json()?.to_string());
        tokenizer.map(Some).map_err(|error| GgufError::Tokenizer {
            path: file.path().to_owned(),
            reason: error.to_string(),
        })
    };
    loaded(
        config,
        (file.path(), &tensors, held),
        options,
        tokenizer,
        device,
    )
}
