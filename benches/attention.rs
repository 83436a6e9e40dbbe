//! Attention alone over a standard cache, Lite's and FusedKV's, a decoded token's over caches of every
//! format, and the append of one token at two capacities, on Flex.
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
    BlendWeights, CacheDtype, FusedKvDecoderConfig, FusionInit, KvFusion, KvFusionConfig, KvPart,
    KvPlan, KvShape, KvSource, Logits, TokenBatch, fused_attention,
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

/// Times a decoded token after `past` others, in a decoder that has little but attention.
fn decode(
    bencher: Bencher,
    (plan, n_kv_heads): (KvPlan, usize),
    [past, capacity]: [usize; 2],
    dtype: CacheDtype,
) {
    let config = FusedKvDecoderConfig::new(VOCAB, plan)
        .with_hidden_size(64)
        .with_n_layers(4)
        .with_n_heads(HEADS)
        .with_n_kv_heads(n_kv_heads)
        .with_head_dim(HEAD_DIM)
        .with_ffn_size(64)
        .with_max_positions(past + 1);
    let model = config
        .init::<Flex>(&FlexDevice)
        .expect("the shape is valid");
    let tokens = |len: usize| {
        let row: Vec<u32> = (0..len).map(|i| (i % VOCAB) as u32).collect();
        TokenBatch::<Flex>::from_rows(&[row], VOCAB, &FlexDevice).expect("ids are known")
    };
    let cache = model.new_cache_of(dtype, 1, capacity);
    let mut cache = cache.expect("capacity is not 0");
    let mut feed = |len: usize| {
        let logits = model.forward_cached(tokens(len), &mut cache, Logits::Last);
        black_box(logits.expect("the cache has room"));
        cache.truncate(past).expect("they are in use");
    };
    feed(past);
    bencher.bench_local(|| feed(1));
}

const FUSED: KvPlan = KvPlan::FusedKv { storage_layers: 2 };

/// Formats, and tokens there are before the one that is decoded.
const CACHES: [(CacheDtype, usize); 9] = {
    use CacheDtype::{F16, Int8, Model};
    [
        (Model, 512),
        (F16, 512),
        (Int8, 512),
        (Model, 2048),
        (F16, 2048),
        (Int8, 2048),
        (Model, 8192),
        (F16, 8192),
        (Int8, 8192),
    ]
};

/// A decoded token of four layers.
#[divan::bench(args = CACHES)]
fn decode_standard(bencher: Bencher, (dtype, past): (CacheDtype, usize)) {
    decode(bencher, (KvPlan::Standard, HEADS), [past, past + 1], dtype);
}

/// Of four layers whose query heads share keys and values in threes.
#[divan::bench(args = CACHES)]
fn decode_gqa(bencher: Bencher, (dtype, past): (CacheDtype, usize)) {
    decode(
        bencher,
        (KvPlan::Standard, HEADS / 3),
        [past, past + 1],
        dtype,
    );
}

/// Of four layers, of which the upper two blend two sources.
#[divan::bench(args = CACHES)]
fn decode_fused_kv(bencher: Bencher, (dtype, past): (CacheDtype, usize)) {
    decode(bencher, (FUSED, HEADS), [past, past + 1], dtype);
}

/// A decoded token after 16 others, in caches of two capacities.
#[divan::bench(args = [1024, 65_536])]
fn append(bencher: Bencher, capacity: usize) {
    decode(bencher, (FUSED, HEADS), [16, capacity], CacheDtype::Model);
}

fn main() {
    divan::main();
}
