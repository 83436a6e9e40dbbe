//! From text to text: chats, streams, stop strings, and what generation gives them.

mod chats;
mod conversations;
mod directories;
mod generators;
mod samples;
mod stops;
mod streams;

use std::sync::LazyLock;

use burn::tensor::backend::Backend;
use fusedkv::text::TextGenerator;
use fusedkv::tokenizer::Tokenizer;
use fusedkv::{FusedKvDecoderConfig, KvPlan};

use crate::models;

/// Every byte, some merges, and the end of text.
pub fn tokenizer() -> Tokenizer {
    static TRAINED: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::train_bpe("to be or not to be é漢🙂 to be", 280).unwrap());
    TRAINED.clone()
}

/// A decoder of random weights for [`tokenizer`].
pub fn config(plan: KvPlan) -> FusedKvDecoderConfig {
    let config = models::fixed(plan);
    FusedKvDecoderConfig {
        vocab_size: tokenizer().vocab_size(),
        max_positions: 128,
        ..config
    }
}

pub fn generator<B: Backend>(seed: u64) -> TextGenerator<B> {
    let config = config(KvPlan::FusedKv { storage_layers: 2 });
    TextGenerator::new(models::model(&config, seed), tokenizer())
}
