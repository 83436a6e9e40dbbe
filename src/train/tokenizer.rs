//! Text to token ids and back: byte-level BPE, trained on the spot or loaded.

use std::path::Path;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::TrainError;
use super::files::write_atomically;

/// The one special token of [`train_bpe`]'s tokenizers: ends a document.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// All bytes and [`END_OF_TEXT`]: the smallest vocabulary that can spell any text.
pub const MIN_VOCAB_SIZE: usize = 257;

/// Trains byte-level BPE on `text`. Any UTF-8 text round-trips; a short text may yield fewer than
/// `vocab_size` tokens.
///
/// # Errors
/// [`TrainError::VocabSize`] below [`MIN_VOCAB_SIZE`].
pub fn train_bpe(text: &str, vocab_size: usize) -> Result<Tokenizer, TrainError> {
    if vocab_size < MIN_VOCAB_SIZE {
        return Err(TrainError::VocabSize { vocab_size });
    }
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .build();
    tokenizer.train(
        &mut TrainerWrapper::BpeTrainer(trainer),
        text.split_inclusive('\n'),
    )?;
    Ok(tokenizer)
}

/// Loads a `tokenizer.json`.
///
/// # Errors
/// [`TrainError::File`] naming the file if it cannot be read or is not a tokenizer.
pub fn load_tokenizer(path: &Path) -> Result<Tokenizer, TrainError> {
    Tokenizer::from_file(path).map_err(|error| TrainError::file(path, error))
}

/// Saves a `tokenizer.json`, whole or not at all.
///
/// # Errors
/// [`TrainError::File`] naming the file if it cannot be written.
pub fn save_tokenizer(tokenizer: &Tokenizer, path: &Path) -> Result<(), TrainError> {
    let json = tokenizer.to_string(true)?;
    write_atomically(path, |temporary| std::fs::write(temporary, json))
}

/// Token ids of `text`, without added special tokens.
///
/// # Errors
/// [`TrainError::Tokenizer`] if the tokenizer refuses the text.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, TrainError> {
    Ok(tokenizer.encode_fast(text, false)?.get_ids().to_vec())
}

/// Token ids back to text as they come. Holds bytes back until they make a character.
pub struct TextStream<'t> {
    stream: DecodeStream<'t>,
}

type DecodeStream<'t> = tokenizers::tokenizer::DecodeStream<
    't,
    tokenizers::ModelWrapper,
    tokenizers::NormalizerWrapper,
    tokenizers::PreTokenizerWrapper,
    tokenizers::PostProcessorWrapper,
    tokenizers::DecoderWrapper,
>;

impl<'t> TextStream<'t> {
    /// Starts with nothing; special tokens are left out of the text.
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self {
            stream: tokenizer.decode_stream(true),
        }
    }

    /// The text that `id` completes; empty if it ends within a character.
    ///
    /// # Errors
    /// [`TrainError::Tokenizer`] if the tokenizer cannot decode it.
    pub fn push(&mut self, id: u32) -> Result<String, TrainError> {
        Ok(self.stream.step(id)?.unwrap_or_default())
    }
}
