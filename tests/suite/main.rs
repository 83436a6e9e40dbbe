//! Properties of the decoder, its plans, cache and generation, over random shapes.

mod attention;
mod batches;
mod cache;
mod cache_dtype;
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
mod tokenizer;
mod unfused;
mod weights;
mod windows;
