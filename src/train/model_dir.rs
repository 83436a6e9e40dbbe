//! A trained model on disk: configuration, weights and tokenizer in one directory.
//!
//! The weights are a Burn record. Hugging Face's directory layout is another format, for exchange
//! with other programs.

use std::path::Path;

use burn::config::Config;
use burn::module::Module;
use burn::record::{DefaultRecorder, FileRecorder, Recorder};
use burn::tensor::backend::Backend;
use tokenizers::Tokenizer;

use super::TrainError;
use super::files::write_atomically;
use super::tokenizer::{load_tokenizer, save_tokenizer};
use crate::{FusedKvDecoder, FusedKvDecoderConfig};

const CONFIG: &str = "model.json";
const WEIGHTS: &str = "model.mpk";
const TOKENIZER: &str = "tokenizer.json";

/// Saves a decoder and its tokenizer; each file is there whole or not at all.
///
/// # Errors
/// [`TrainError::File`] naming the file that cannot be written.
pub fn save_model<B: Backend>(
    directory: &Path,
    model: &FusedKvDecoder<B>,
    tokenizer: &Tokenizer,
) -> Result<(), TrainError> {
    std::fs::create_dir_all(directory).map_err(|error| TrainError::file(directory, error))?;
    write_atomically(&directory.join(CONFIG), |path| model.config().save(path))?;
    save_tokenizer(tokenizer, &directory.join(TOKENIZER))?;
    write_atomically(&directory.join(WEIGHTS), |path| {
        DefaultRecorder::default().record(model.clone().into_record(), path.to_path_buf())
    })
}

/// Loads what [`save_model`] saved.
///
/// # Errors
/// [`TrainError::File`] naming the file that is missing or not what it should be,
/// [`TrainError::Config`] if the configuration is none a decoder can have.
pub fn load_model<B: Backend>(
    directory: &Path,
    device: &B::Device,
) -> Result<(FusedKvDecoder<B>, Tokenizer), TrainError> {
    let config = directory.join(CONFIG);
    let model = FusedKvDecoderConfig::load(&config)
        .map_err(|error| TrainError::file(&config, error))?
        .init::<B>(device)?;
    let weights = directory.join(WEIGHTS);
    debug_assert_eq!(
        weights.extension().and_then(|e| e.to_str()),
        Some(<DefaultRecorder as FileRecorder<B>>::file_extension()),
    );
    let record = DefaultRecorder::default()
        .load(weights.clone(), device)
        .map_err(|error| TrainError::file(&weights, error))?;
    let tokenizer = load_tokenizer(&directory.join(TOKENIZER))?;
    Ok((model.load_record(record), tokenizer))
}
