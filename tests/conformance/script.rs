//! What is done to a cache, step by step, the same on every backend.

use burn::tensor::backend::Backend;
use fusedkv::{CacheDtype, FusedKvDecoder, Logits, TokenBatch};

use crate::formula::values;

#[derive(Clone, Debug)]
pub enum Step {
    /// Reads rows of tokens.
    Append(Vec<Vec<u32>>, Logits),
    Truncate(usize),
    TruncateRows(Vec<usize>),
    SelectRows(Vec<usize>),
    /// Moves every row's tokens together.
    Compact,
    /// Goes on with a copy.
    Fork,
    /// Goes on with what the last copy was made of.
    Return,
}

/// The logits of every step; none of those that read nothing.
pub fn run<B: Backend>(
    model: &FusedKvDecoder<B>,
    dtype: CacheDtype,
    steps: &[Step],
) -> Vec<Vec<f64>> {
    let device = model.device();
    let appended = |step: &Step| match step {
        Step::Append(rows, _) => rows.iter().map(Vec::len).max().unwrap(),
        _ => 0,
    };
    let Step::Append(rows, _) = &steps[0] else {
        panic!("the first step reads")
    };
    let capacity = steps.iter().map(appended).sum();
    let mut cache = model.new_cache_of(dtype, rows.len(), capacity).unwrap();
    let mut kept = Vec::new();
    let step = |step: &Step| {
        match step {
            Step::Append(rows, logits) => {
                let vocab_size = model.config().vocab_size;
                let batch = TokenBatch::from_rows(rows, vocab_size, &device).unwrap();
                let logits = model.forward_cached(batch, &mut cache, *logits).unwrap();
                return values(&logits);
            }
            Step::Truncate(len) => cache.truncate(*len).unwrap(),
            Step::TruncateRows(lens) => cache.truncate_rows(lens).unwrap(),
            Step::SelectRows(rows) => cache.select_rows(rows).unwrap(),
            Step::Compact => cache.compact(),
            Step::Fork => kept.push(cache.clone()),
            Step::Return => cache = kept.pop().unwrap(),
        }
        Vec::new()
    };
    steps.iter().map(step).collect()
}
