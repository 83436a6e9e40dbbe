//! Random decoders.

#[path = "../formula/mod.rs"]
mod formula;

use std::ops::Range;

use burn::tensor::{Tensor, backend::Backend};
use burn_ndarray::NdArray;
use fusedkv::{FusedKvDecoder, FusedKvDecoderConfig, KvPlan};
use proptest::prelude::*;

pub use formula::{off, plans, values};

/// f64, so that what should be equal is equal to many digits. (Burn's RmsNorm takes its mean in
/// f32 on every backend, which is why tolerances are not tighter.)
pub type F64 = NdArray<f64>;

/// A random decoder shape with tokens to read.
#[derive(Clone, Debug)]
pub struct Case {
    pub config: FusedKvDecoderConfig,
    pub tokens: Vec<Vec<u32>>,
    pub seed: u64,
}

impl Case {
    pub fn model<B: Backend>(&self) -> FusedKvDecoder<B> {
        model(&self.config, self.seed)
    }

    /// The same weights wherever both plans have them: values go by name.
    pub fn model_with<B: Backend>(&self, plan: KvPlan) -> FusedKvDecoder<B> {
        let mut config = self.config.clone();
        config.plan = plan;
        model(&config, self.seed)
    }
}

/// A decoder of `config` with the formula's values on the default device.
pub fn model<B: Backend>(config: &FusedKvDecoderConfig, seed: u64) -> FusedKvDecoder<B> {
    formula::model_on(config, seed, &Default::default())
}

/// A decoder of 4 layers, 12 wide, of tokens below [`VOCAB`].
pub fn small(plan: KvPlan) -> FusedKvDecoderConfig {
    FusedKvDecoderConfig::new(VOCAB, plan)
        .with_hidden_size(12)
        .with_n_layers(4)
        .with_n_heads(4)
        .with_n_kv_heads(2)
        .with_head_dim(4)
        .with_ffn_size(10)
}

/// [`small`] with heads of 6 channels that reads up to 64 tokens.
pub fn fixed(plan: KvPlan) -> FusedKvDecoderConfig {
    small(plan)
        .with_head_dim(6)
        .with_rope_theta(1e4)
        .with_max_positions(64)
}

prop_compose! {
    /// A small decoder of any plan and grouping, with one to three rows of `seq` tokens.
    pub fn any_case(seq: Range<usize>)(
        n_layers in 2usize..6,
        n_kv_heads in 1usize..4,
        group in 1usize..4,
        pairs in 1usize..4,
        tie in any::<bool>(),
    )(
        plan in prop::sample::select(plans(n_layers)),
        tokens in rows(seq.clone()),
        seed in any::<u64>(),
        shape in Just((n_layers, n_kv_heads, group, 2 * pairs, tie)),
    ) -> Case {
        let (n_layers, n_kv_heads, group, head_dim, tie) = shape;
        let config = small(plan)
            .with_n_layers(n_layers)
            .with_n_heads(n_kv_heads * group)
            .with_n_kv_heads(n_kv_heads)
            .with_head_dim(head_dim)
            .with_tie_embeddings(tie)
            .with_rope_theta(100.0)
            .with_max_positions(64);
        Case { config, tokens, seed }
    }
}

pub const VOCAB: usize = 11;

fn rows(seq: Range<usize>) -> impl Strategy<Value = Vec<Vec<u32>>> {
    (1usize..4, seq).prop_flat_map(|(batch, seq)| {
        prop::collection::vec(prop::collection::vec(0..VOCAB as u32, seq), batch)
    })
}

/// Largest absolute difference, relative to the larger tensor's largest element.
pub fn difference<B: Backend, const D: usize>(a: &Tensor<B, D>, b: &Tensor<B, D>) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (values(a), values(b));
    let largest = off(&a, &b).min(off(&b, &a));
    assert!(largest.is_finite(), "not a number");
    largest
}
