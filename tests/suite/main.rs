//! Properties of the decoder, its plans, cache and generation, over random shapes.

mod equivalence;
mod models;
