//! Properties of the decoder, its plans, cache and generation, over random shapes; of checkpoint directories and
//! of text. One program, because each that has NdArray compiles its operations anew, for a minute or two.

mod attention;
mod batches;
mod cache;
mod cache_dtype;
mod checkpoint;
mod configuration;
mod conversion;
mod data;
mod equivalence;
mod generation;
mod golden;
mod gradients;
mod lora;
mod models;
mod positions;
mod records;
mod schema;
mod text;
mod tokenizer;
mod unfused;
mod weights;
mod windows;
