//! Attention alone over a standard cache, Lite's and FusedKV's, and the append of one token at two
//! capacities, on Flex.
//!
//! ```sh
//! cargo bench --bench attention
//! ```
//!
//! The longest context is larger than any processor cache: there a standard layer reads two tensors
//! and a FusedKV layer four, so that memory bounds its throughput to half of standard's, and to 2/3
//! over all layers, of which half are standard ones.

use std::hint::black_box;

use burn::tensor::{Distribution, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::{
    BlendWeights, FusedKvDecoderConfig, FusionInit, KvFusion, KvFusionConfig, KvPlan, Logits, Mix,
    TokenBatch, fused_attention,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HEADS: usize = 12;
const HEAD_DIM: usize = 64;
const VOCAB: usize = 64;

fn random(seq: usize) -> Tensor<Flex, 4> {
    let distribution = Distribution::Normal(0.0, 1.0);
    Tensor::random([1, HEADS, seq, HEAD_DIM], distribution, &FlexDevice)
}

fn fusion() -> KvFusion<Flex> {
    let mix = Mix::Blend {
        sources: vec![0, 1],
        weights: BlendWeights::PerChannel,
    };
    let config = KvFusionConfig {
        n_kv_heads: HEADS,
        head_dim: HEAD_DIM,
        key: mix.clone(),
        value: mix,
        init: FusionInit::equal().with_noise(0.1),
    };
    config.init(&FlexDevice).expect("the mix has weights")
}

/// Σ wₛ ⊙ xₛ, formed.
fn blend(sources: &[Tensor<Flex, 4>], weights: Option<Vec<Tensor<Flex, 4>>>) -> Tensor<Flex, 4> {
    let weights = weights.expect("the mix has weights");
    let mut terms = sources.iter().zip(weights).map(|(x, w)| x.clone() * w);
    let first = terms.next().expect("two sources");
    terms.fold(first, |sum, term| sum + term)
}

fn attention(c: &mut Criterion) {
    let fusion = fusion();
    for (name, cases) in [
        ("decode", vec![(1, 2048), (1, 8192), (1, 32_768)]),
        ("prefill", vec![(2048, 2048)]),
    ] {
        let mut group = c.benchmark_group(format!("attention/{name}"));
        for (queries, keys) in cases {
            group.throughput(Throughput::Elements((queries * keys) as u64));
            if queries > 1 {
                group.sample_size(10);
            }
            let query = random(queries);
            let sources: Vec<_> = (0..4).map(|_| random(keys)).collect();
            let attend = |keys: &[_], values: &[_], fusion| {
                let output = fused_attention(query.clone(), keys.to_vec(), values.to_vec(), fusion);
                black_box(output.expect("shapes fit"))
            };
            group.bench_function(BenchmarkId::new("standard", keys), |b| {
                b.iter(|| attend(&sources[..1], &sources[1..2], None));
            });
            group.bench_function(BenchmarkId::new("fused_kv", keys), |b| {
                b.iter(|| attend(&sources[..2], &sources[2..], Some(&fusion)));
            });
            group.bench_function(BenchmarkId::new("fused_kv materialised", keys), |b| {
                b.iter(|| {
                    let keys = blend(&sources[..2], fusion.key_weights());
                    let values = blend(&sources[2..], fusion.value_weights());
                    attend(&[keys], &[values], None)
                });
            });
        }
        group.finish();
    }
}

/// A decoded token after 16 others, in caches of two capacities.
fn append(c: &mut Criterion) {
    let mut group = c.benchmark_group("append");
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let config = FusedKvDecoderConfig::new(VOCAB, 64, 4, HEADS, HEADS, HEAD_DIM, 64, plan)
        .with_max_positions(1024);
    let model = config
        .init::<Flex>(&FlexDevice)
        .expect("the shape is valid");
    let tokens = |len: usize| {
        let row: Vec<u32> = (0..len).map(|i| (i % VOCAB) as u32).collect();
        TokenBatch::<Flex>::from_rows(&[row], VOCAB, &FlexDevice).expect("ids are known")
    };
    for capacity in [1024, 65_536] {
        let mut cache = model.new_cache(1, capacity).expect("capacity is not 0");
        let feed = |cache: &mut _, tokens| {
            let logits = model.forward_cached(tokens, cache, Logits::Last);
            black_box(logits.expect("the cache has room"));
        };
        feed(&mut cache, tokens(16));
        group.bench_function(BenchmarkId::new("capacity", capacity), |b| {
            b.iter(|| {
                feed(&mut cache, tokens(1));
                cache.truncate(16).expect("17 are in use");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, attention, append);
criterion_main!(benches);
