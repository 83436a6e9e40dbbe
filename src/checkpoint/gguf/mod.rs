//! GGUF files, the format of llama.cpp: loaded as they are, and turned into directories of Hugging
//! Face's layout.
//!
//! ```no_run
//! use fusedkv::checkpoint::gguf::{GgufOptions, import_gguf};
//!
//! let imported = import_gguf("model.gguf", "model", &GgufOptions::new())?;
//! println!("{} parameters of a {}", imported.parameters, imported.model_type);
//! # Ok::<(), fusedkv::checkpoint::gguf::GgufError>(())
//! ```

mod architectures;
mod config;
mod error;
mod file;
mod formats;
mod keys;
mod load;
mod model;
mod pre_tokenizer;
mod rope;
mod rows;
mod value;
mod vocabulary;
mod weights;

use std::path::Path;

pub use error::GgufError;
pub use file::{GgufFile, GgufTensor};
pub use load::load_gguf;
pub use value::{GgufArray, GgufNumbers, GgufValue};

use self::keys::Keys;
use self::model::Model;
use self::rope::Rope;
use self::vocabulary::Vocabulary;
use super::directory;
use super::numbers::WeightDtype;
use super::save::{is_weights, write_json};
use super::{CONFIG, GENERATION_CONFIG, TOKENIZER};
use crate::decoder::WeightFormat;
use crate::tokenizer::Tokenizer;

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The files of a model beside its weights.
const OF_A_MODEL: [&str; 5] = [
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    // Hugging Face's library prefers it to the template in tokenizer_config.json.
    "chat_template.jinja",
];

/// How a GGUF file is imported.
#[derive(Clone, Debug, Default)]
pub struct GgufOptions {
    dtype: WeightDtype,
    weights: WeightFormat,
}

impl GgufOptions {
    /// Weights in f32, which loses nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes weights as `dtype`.
    #[must_use]
    pub fn with_dtype(self, dtype: WeightDtype) -> Self {
        Self { dtype, ..self }
    }

    /// Writes matrices in a format: [`WeightFormat::Int8`] has the codes and scales of a file of
    /// Q8_0. All else is of the float type.
    #[must_use]
    pub fn with_weights(self, weights: WeightFormat) -> Self {
        Self { weights, ..self }
    }
}

/// What has been imported.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GgufImport {
    /// The architecture in the file, as in "llama".
    pub architecture: String,
    /// The `model_type` that was written.
    pub model_type: String,
    /// Tensors written.
    pub tensors: usize,
    /// Numbers in them.
    pub parameters: u64,
    /// Whether the file has a vocabulary, and a `tokenizer.json` was written.
    pub tokenizer: bool,
}

/// Writes the model of a GGUF file as a directory of Hugging Face's layout: `config.json` in the keys
/// of its family, `model.safetensors` with that family's names, shapes and order of RoPE's channels,
/// and if the file has a vocabulary `tokenizer.json`, `tokenizer_config.json` (with the chat template)
/// and `generation_config.json`.
///
/// Architectures: llama (Mistral's models, too), qwen2, qwen3, gemma2, gemma3, phi3, smollm3, olmo2.
/// Numbers: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K.
///
/// Everything is checked before anything is written, and the directory changes in one step, as with
/// [`save_checkpoint`](super::save_checkpoint). Memory is that of the header and a piece of a tensor.
///
/// # Errors
/// [`GgufError`], naming the file, and the key or the tensor.
pub fn import_gguf(
    path: impl AsRef<Path>,
    directory: impl AsRef<Path>,
    options: &GgufOptions,
) -> Result<GgufImport, GgufError> {
    let file = GgufFile::open(path)?;
    let model = Model::of(&file)?;
    let rope = Rope::read(&file, &model)?;
    let keys = Keys::of(&file, model.architecture.name);
    let mut config = config::config(&keys, &model, &rope, options.dtype)?;
    if options.weights == WeightFormat::Int8 {
        super::config::mark_int8(&mut config);
    }
    let vocabulary = Vocabulary::of(keys, &model)?;
    let mut files = vec![(CONFIG, config)];
    if let Some(vocabulary) = &vocabulary {
        files.push((TOKENIZER, vocabulary.json()?));
        files.push((TOKENIZER_CONFIG, vocabulary.config()?));
        let ends = vocabulary.ends()?;
        files.push((GENERATION_CONFIG, config::generation_config(&keys, &ends)?));
    }
    let tokenizer = vocabulary.is_some();
    // What is there of another model must not stand beside this one.
    let replaced = |name: &str| is_weights(name) || OF_A_MODEL.contains(&name);
    directory::replace(directory.as_ref(), replaced, |partial| {
        for (name, json) in &files {
            write_json(&partial.join(name), json)?;
        }
        if tokenizer {
            check_tokenizer(file.path(), partial)?;
        }
        weights::write(&file, &model, (options.dtype, options.weights), partial)
    })?;
    let numbers = model
        .tensors
        .iter()
        .map(|tensor| tensor.spec.elements() as u64);
    Ok(GgufImport {
        architecture: model.architecture.name.to_owned(),
        model_type: model.family.names().0.to_owned(),
        tensors: model.tensors.len(),
        parameters: numbers.sum(),
        tokenizer,
    })
}

/// That the tokenizer loads: merges may be of tokens that the vocabulary has not.
fn check_tokenizer(path: &Path, directory: &Path) -> Result<(), GgufError> {
    let loaded = Tokenizer::load(directory.join(TOKENIZER));
    loaded.map(drop).map_err(|error| GgufError::Tokenizer {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}
