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
use divan::Bencher;
use divan::counter::ItemsCount;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::{
    BlendWeights, FusedKvDecoderConfig, FusionInit, KvFusion, KvFusionConfig, KvPart, KvPlan,
    KvShape, KvSource, Logits, TokenBatch, fused_attention,
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
    let blended = KvSource::Blend {
        sources: vec![0, 1],
        weights: BlendWeights::PerChannel,
    };
    let config = KvFusionConfig {
        kv: KvShape {
            n_kv_heads: HEADS,
            head_dim: HEAD_DIM,
            rotary_dim: HEAD_DIM,
        },
        key: blended.clone(),
        value: blended,
        init: FusionInit::equal().with_noise(0.1),
    };
    config.init(&FlexDevice).expect("the blend has weights")
}

/// Σ wₛ ⊙ xₛ, formed.
fn blend(sources: &[Tensor<Flex, 4>], weights: Option<Vec<Tensor<Flex, 4>>>) -> Tensor<Flex, 4> {
    let weights = weights.expect("the blend has weights");
    let mut terms = sources.iter().zip(weights).map(|(x, w)| x.clone() * w);
    let first = terms.next().expect("two sources");
    terms.fold(first, |sum, term| sum + term)
}

/// The inputs of one attention.
struct Case {
    query: Tensor<Flex, 4>,
    sources: Vec<Tensor<Flex, 4>>,
    fusion: KvFusion<Flex>,
}

impl Case {
    fn new([queries, keys]: [usize; 2]) -> Self {
        Self {
            query: random(queries),
            sources: (0..4).map(|_| random(keys)).collect(),
            fusion: fusion(),
        }
    }

    fn attend(
        &self,
        keys: &[Tensor<Flex, 4>],
        values: &[Tensor<Flex, 4>],
        fusion: Option<&KvFusion<Flex>>,
    ) -> Tensor<Flex, 4> {
        let (keys, values) = (keys.to_vec(), values.to_vec());
        fused_attention(self.query.clone(), keys, values, fusion).expect("shapes fit")
    }
}

/// Queries and keys: decoding after three contexts, and a prefill.
const SIZES: [[usize; 2]; 4] = [[1, 2048], [1, 8192], [1, 32_768], [2048, 2048]];

/// Times `attend` after one call that is not timed, and counts its pairs of query and key.
fn time(bencher: Bencher, size: [usize; 2], attend: impl Fn(&Case) -> Tensor<Flex, 4> + Sync) {
    let case = Case::new(size);
    attend(&case);
    bencher
        .counter(ItemsCount::new(size[0] * size[1]))
        .bench_local(|| attend(&case));
}

#[divan::bench(args = SIZES)]
fn standard(bencher: Bencher, size: [usize; 2]) {
    time(bencher, size, |case| {
        case.attend(&case.sources[..1], &case.sources[1..2], None)
    });
}

#[divan::bench(args = SIZES)]
fn fused_kv(bencher: Bencher, size: [usize; 2]) {
    time(bencher, size, |case| {
        case.attend(&case.sources[..2], &case.sources[2..], Some(&case.fusion))
    });
}

#[divan::bench(args = SIZES)]
fn fused_kv_materialised(bencher: Bencher, size: [usize; 2]) {
    time(bencher, size, |case| {
        let keys = blend(&case.sources[..2], case.fusion.weights(KvPart::Key));
        let values = blend(&case.sources[2..], case.fusion.weights(KvPart::Value));
        case.attend(&[keys], &[values], None)
    });
}

/// A decoded token after 16 others, in caches of two capacities.
#[divan::bench(args = [1024, 65_536])]
fn append(bencher: Bencher, capacity: usize) {
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let config = FusedKvDecoderConfig::new(VOCAB, plan)
        .with_hidden_size(64)
        .with_n_layers(4)
        .with_n_heads(HEADS)
        .with_n_kv_heads(HEADS)
        .with_head_dim(HEAD_DIM)
        .with_ffn_size(64)
        .with_max_positions(1024);
    let model = config
        .init::<Flex>(&FlexDevice)
        .expect("the shape is valid");
    let tokens = |len: usize| {
        let row: Vec<u32> = (0..len).map(|i| (i % VOCAB) as u32).collect();
        TokenBatch::<Flex>::from_rows(&[row], VOCAB, &FlexDevice).expect("ids are known")
    };
    let mut cache = model.new_cache(1, capacity).expect("capacity is not 0");
    let mut feed = |len: usize| {
        let logits = model.forward_cached(tokens(len), &mut cache, Logits::Last);
        black_box(logits.expect("the cache has room"));
        cache.truncate(16).expect("16 are in use at least");
    };
    feed(16);
    bencher.bench_local(|| feed(1));
}

fn main() {
    divan::main();
}
