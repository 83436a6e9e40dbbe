//! A row's logits in a batch, and by other numbers of threads, against those it has alone.

use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::{FusedKvDecoder, FusedKvDecoderConfig, KvPlan, Logits, TokenBatch};

use crate::models::{model, off};

const VOCAB: usize = 523;

/// Wide enough for every product to be divided among threads; widths that fill no vector.
fn decoder(plan: KvPlan) -> FusedKvDecoder<Flex> {
    let config = FusedKvDecoderConfig::new(VOCAB, plan)
        .with_hidden_size(198)
        .with_n_layers(4)
        .with_n_heads(6)
        .with_n_kv_heads(2)
        .with_head_dim(34)
        .with_ffn_size(301)
        .with_rope_theta(1e4)
        .with_max_positions(2048);
    model(&config, 3)
}

fn prompt(row: usize, len: usize) -> Vec<u32> {
    (0..len)
        .map(|i| ((i * 37 + row * 101 + i * i) % VOCAB) as u32)
        .collect()
}

/// The last logits of a prompt's prefill, and those of each of four decoded tokens, row by row.
fn logits(model: &FusedKvDecoder<Flex>, rows: &[Vec<u32>], threads: usize) -> Vec<Vec<Vec<f32>>> {
    let longest = rows.iter().map(Vec::len).max().unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.unwrap().install(|| {
        let mut cache = model.new_cache(rows.len(), longest + 4).unwrap();
        let mut steps = Vec::new();
        for step in 0..5 {
            let tokens = match step {
                0 => rows.to_vec(),
                step => rows
                    .iter()
                    .map(|row| vec![(row[0] + step) % VOCAB as u32])
                    .collect(),
            };
            let tokens = TokenBatch::from_rows(&tokens, VOCAB, &FlexDevice).unwrap();
            let logits = model
                .forward_cached(tokens, &mut cache, Logits::Last)
                .unwrap();
            let numbers = logits.into_data().to_vec::<f32>().unwrap();
            steps.push(numbers.chunks(VOCAB).map(<[f32]>::to_vec).collect());
        }
        steps
    })
}

/// What is tested of a row in a larger batch, and among rows of other lengths; `generate` says the
/// same.
const BOUND: f64 = 1e-5;

fn prompts(n: usize, len: usize) -> Vec<Vec<u32>> {
    (0..n).map(|row| prompt(row, len)).collect()
}

/// Largest difference of two vectors of logits, relative to the largest logit.
fn difference(found: &[f32], alone: &[f32]) -> f64 {
    let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
    off(&wide(found), &wide(alone))
}

#[test]
fn threads_change_no_bit() {
    for plan in [
        KvPlan::Standard,
        KvPlan::FusedKv { storage_layers: 2 },
        KvPlan::DenseFusion { storage_layers: 3 },
    ] {
        let model = decoder(plan);
        // Keys of several parts, rows for both kinds of products.
        for (n, len) in [(1, 700), (2, 5), (17, 40)] {
            let rows = prompts(n, len);
            let one = logits(&model, &rows, 1);
            for threads in [2, 3, 5] {
                assert_eq!(
                    one,
                    logits(&model, &rows, threads),
                    "{n} rows, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn up_to_sixteen_rows_change_no_bit() {
    let model = decoder(KvPlan::FusedKv { storage_layers: 2 });
    for len in [40, 700] {
        let alone = logits(&model, &prompts(1, len), 2);
        for n in [2, 16] {
            let found = logits(&model, &prompts(n, len), 2);
            for (step, (found, alone)) in found.iter().zip(&alone).enumerate() {
                assert_eq!(found[0], alone[0], "step {step} of {n} rows of {len}");
            }
        }
    }
}

/// That the first row's logits are those it has alone, step by step, but for rounding.
fn assert_near(found: &[Vec<Vec<f32>>], alone: &[Vec<Vec<f32>>], case: &str) {
    for (found, alone) in found.iter().zip(alone) {
        let difference = difference(&found[0], &alone[0]);
        assert!(difference <= BOUND, "{case}: {difference}");
    }
}

#[test]
fn larger_batches_and_other_lengths_change_no_more_than_rounding() {
    let model = decoder(KvPlan::FusedKv { storage_layers: 2 });
    for len in [3, 40] {
        let alone = logits(&model, &prompts(1, len), 2);
        for n in [17, 64] {
            let found = logits(&model, &prompts(n, len), 2);
            assert_near(&found, &alone, &format!("{n} rows of {len}"));
        }
        let ragged = [prompt(0, len), prompt(1, len + 29), prompt(2, 1)];
        let found = logits(&model, &ragged, 2);
        assert_near(&found, &alone, &format!("beside a longer row of {len}"));
    }
}
