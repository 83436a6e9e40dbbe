//! A trained model as a directory: what it is, its weights, its tokenizer.
//!
//! This is Burn's own weight format, read by this crate alone. It is not the directory that
//! Hugging Face's libraries read.

use std::fs;
use std::io;
use std::path::Path;

use burn::config::Config;
use burn::tensor::backend::Backend;
use burn_store::{BurnpackStore, ModuleSnapshot};

use super::error::ModelDirError;
use super::file;
use super::tokenizer::Tokenizer;
use crate::config::FusedKvDecoderConfig;
use crate::decoder::FusedKvDecoder;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.bpk";
const TOKENIZER: &str = "tokenizer.json";

/// Writes `config.json`, `model.bpk` and `tokenizer.json` to `directory`, which is made if need be.
/// Each file appears complete, replacing what was there.
///
/// # Errors
/// [`ModelDirError::Vocabulary`] if the tokenizer has tokens the decoder does not,
/// [`ModelDirError::Write`] or [`ModelDirError::Tokenizer`] if a file cannot be written.
pub fn save_model<B: Backend>(
    directory: impl AsRef<Path>,
    model: &FusedKvDecoder<B>,
    tokenizer: &Tokenizer,
) -> Result<(), ModelDirError> {
    let directory = directory.as_ref();
    check_vocabulary(tokenizer, model.config())?;
    let write = |path: &Path| {
        let path = path.to_owned();
        move |source| ModelDirError::Write { path, source }
    };
    fs::create_dir_all(directory).map_err(write(directory))?;
    let weights = directory.join(WEIGHTS);
    file::replace(&weights, |partial| {
        let mut store = BurnpackStore::from_file(partial).overwrite(true);
        model.save_into(&mut store).map_err(io::Error::other)
    })
    .map_err(write(&weights))?;
    tokenizer.save(directory.join(TOKENIZER))?;
    let config = directory.join(CONFIG);
    file::replace(&config, |partial| model.config().save(partial)).map_err(write(&config))
}

/// Reads what [`save_model`] wrote.
///
/// # Errors
/// [`ModelDirError::Missing`] naming the file a model directory would have,
/// [`ModelDirError::Unreadable`], [`ModelDirError::Config`] or [`ModelDirError::Tokenizer`] if one
/// is not what it should be, [`ModelDirError::Weights`] or [`ModelDirError::Vocabulary`] if they do
/// not belong together.
pub fn load_model<B: Backend>(
    directory: impl AsRef<Path>,
    device: &B::Device,
) -> Result<(FusedKvDecoder<B>, Tokenizer), ModelDirError> {
    let directory = directory.as_ref();
    for file in [CONFIG, WEIGHTS, TOKENIZER] {
        if !directory.join(file).is_file() {
            return Err(ModelDirError::Missing {
                directory: directory.to_owned(),
                file,
            });
        }
    }
    let path = directory.join(CONFIG);
    let config = FusedKvDecoderConfig::load(&path).map_err(|error| ModelDirError::Unreadable {
        path,
        reason: error.to_string(),
    })?;
    let tokenizer = Tokenizer::load(directory.join(TOKENIZER))?;
    check_vocabulary(&tokenizer, &config)?;
    let mut model = config.init::<B>(device)?;
    let path = directory.join(WEIGHTS);
    let weights = |reason: String| ModelDirError::Weights {
        path: path.clone(),
        reason,
    };
    let loaded = model
        .load_from(&mut BurnpackStore::from_file(&path))
        .map_err(|error| weights(error.to_string()))?;
    if !loaded.unused.is_empty() {
        return Err(weights(format!("left over: {}", loaded.unused.join(", "))));
    }
    Ok((model, tokenizer))
}

fn check_vocabulary(
    tokenizer: &Tokenizer,
    config: &FusedKvDecoderConfig,
) -> Result<(), ModelDirError> {
    if tokenizer.vocab_size() > config.vocab_size {
        return Err(ModelDirError::Vocabulary {
            tokenizer: tokenizer.vocab_size(),
            decoder: config.vocab_size,
        });
    }
    Ok(())
}
