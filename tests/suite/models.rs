//! Random decoders.

#[path = "../formula/mod.rs"]
mod formula;

use std::collections::VecDeque;
use std::ops::Range;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData, backend::Backend};
use burn_ndarray::NdArray;
use fusedkv::backend::Flex;
use fusedkv::config::{
    Activation, BlockConfig, LayerKind, NormPlacement, QkNorm, RopeConfig, RopeScaling,
};
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

    /// With all layers of the first one's kind, so that every plan fits.
    pub fn of_one_kind(mut self) -> Self {
        let BlockConfig {
            layers, ffn_sizes, ..
        } = &mut self.config.block;
        if let Some(first) = layers.first().cloned() {
            *layers = vec![first; self.config.n_layers];
        }
        if let Some(&first) = ffn_sizes.first() {
            ffn_sizes.resize(self.config.n_layers, first);
        }
        self
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
    /// A small decoder of any plan, grouping and block, with one to three rows of `seq` tokens.
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
        block in any_block(n_layers, n_kv_heads * group, 2 * pairs),
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
            .with_max_positions(512)
            .with_block(block);
        let case = Case { config, tokens, seed };
        match case.config.validate() {
            Ok(_) => case,
            // The plan reads layers of another kind.
            Err(_) => case.of_one_kind(),
        }
    }
}

/// A block of any kind; every second one is Qwen3's.
fn any_block(
    n_layers: usize,
    n_heads: usize,
    head_dim: usize,
) -> impl Strategy<Value = BlockConfig> {
    let norms = (
        prop::sample::select(vec![
            NormPlacement::Pre,
            NormPlacement::Sandwich,
            NormPlacement::Post,
        ]),
        prop::sample::select(vec![QkNorm::None, QkNorm::PerHead, QkNorm::AllHeads]),
        any::<bool>(),
    );
    let activations = vec![Activation::Silu, Activation::Gelu, Activation::GeluTanh];
    let numbers = prop::collection::vec(prop::option::of(0.5f64..3.0), 4);
    let block = (
        norms,
        any::<[bool; 3]>(),
        prop::sample::select(activations),
        numbers,
        any_rope(head_dim),
        any_layers(n_layers, n_heads, head_dim),
        (
            any::<[bool; 2]>(),
            // A norm of one channel is a step, which magnifies rounding.
            prop::option::of(4usize..9),
            prop_oneof![
                Just(Vec::new()),
                prop::collection::vec(1usize..12, n_layers)
            ],
        ),
    );
    let block = block.prop_map(
        |(norms, biases, activation, numbers, rope, layers, gemma4)| {
            let mut block = BlockConfig::default();
            (block.norm_placement, block.qk_norm, block.norm_unit_offset) = norms;
            [block.qkv_bias, block.output_bias, block.mlp_bias] = biases;
            block.activation = activation;
            block.embedding_scale = numbers[0];
            block.attention_scale = numbers[1];
            // Scores and logits within reach of the bend.
            block.attention_softcap = numbers[2].map(|cap| 2.0 * cap);
            block.logit_softcap = numbers[3].map(|cap| 4.0 * cap);
            block.rotary_dim = rope.rotary_dim;
            block.rope_scaling = rope.scaling;
            block.layers = layers;
            (
                [block.value_norm, block.layer_scalar],
                block.layer_input_size,
                block.ffn_sizes,
            ) = gemma4;
            block
        },
    );
    prop_oneof![Just(BlockConfig::default()), block]
}

/// Window, RoPE and widths of every layer, of two kinds in any order; or nothing.
fn any_layers(
    n_layers: usize,
    n_heads: usize,
    head_dim: usize,
) -> impl Strategy<Value = Vec<LayerKind>> {
    let shares = (1..=n_heads).filter(|&n| n_heads.is_multiple_of(n));
    let shares: Vec<usize> = shares.collect();
    let kind = move || {
        let kind = (
            prop::option::of(1usize..7),
            prop::option::of((1usize..4).prop_map(|pairs| 2 * pairs)),
            prop::option::of(prop::sample::select(shares.clone())),
            any::<bool>(),
        );
        kind.prop_flat_map(move |(window, own_dim, n_kv_heads, k_eq_v)| {
            let rope = prop::option::weighted(0.8, any_rope(own_dim.unwrap_or(head_dim)));
            rope.prop_map(move |rope| LayerKind {
                window,
                rope,
                head_dim: own_dim,
                n_kv_heads,
                k_eq_v,
            })
        })
    };
    let layers = (
        kind(),
        kind(),
        prop::collection::vec(any::<bool>(), n_layers),
    );
    let layers = layers.prop_map(|(a, b, which)| {
        let kinds = which.iter().map(|&first| if first { &a } else { &b });
        kinds.cloned().collect()
    });
    prop_oneof![Just(Vec::new()), layers]
}

/// A RoPE whose angles do not depend on how long the text is.
fn any_rope(head_dim: usize) -> impl Strategy<Value = RopeConfig> {
    let scaling = prop_oneof![
        Just(RopeScaling::Default),
        (1.0f64..4.0).prop_map(|factor| RopeScaling::Linear { factor }),
        (0.0f64..1.0, 1.0f64..4.0)
            .prop_map(|(rotated, factor)| RopeScaling::Proportional { rotated, factor }),
        (1.0f64..4.0).prop_map(|factor| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 0.5,
            high_freq_factor: 2.0,
            positions: 9,
        }),
        (1.0f64..4.0, any::<bool>()).prop_map(|(factor, truncate)| RopeScaling::Yarn {
            factor,
            beta_fast: 2.0,
            beta_slow: 0.1,
            attention_factor: 0.1 * factor.ln() + 1.0,
            truncate,
            positions: 9,
        }),
    ];
    let rotary = 1..=head_dim / 2;
    (50.0f64..200.0, rotary, scaling).prop_map(move |(theta, pairs, scaling)| RopeConfig {
        theta,
        rotary_dim: (2 * pairs < head_dim).then_some(2 * pairs),
        scaling,
    })
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

/// A decoder of which one parameter is what `change` makes of it.
pub fn changed<B: Backend, const D: usize>(
    model: FusedKvDecoder<B>,
    name: &str,
    change: impl FnOnce(Tensor<B, D>) -> Tensor<B, D>,
) -> FusedKvDecoder<B> {
    let old: Tensor<B, D> = model.parameter(name).unwrap();
    let mut replace = Replace {
        path: vec!["model".to_owned()],
        name: name.replace("norm.weight", "norm.gamma"),
        new: Some(change(old)),
    };
    let model = model.map(&mut replace);
    assert!(replace.new.is_none(), "{name}");
    model
}

struct Replace<B: Backend, const D: usize> {
    path: Vec<String>,
    name: String,
    new: Option<Tensor<B, D>>,
}

impl<B: Backend, const D: usize> ModuleMapper<B> for Replace<B, D> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const E: usize>(&mut self, param: Param<Tensor<B, E>>) -> Param<Tensor<B, E>> {
        let path = self.path.join(".");
        if path != self.name && path.strip_prefix("model.") != Some(&self.name) {
            return param;
        }
        let new = self.new.take().unwrap().into_primitive();
        param.map(|_| Tensor::from_primitive(new))
    }
}

/// A decoder of the case, with a model's parameters in f64.
pub fn exact(case: &Case, model: &FusedKvDecoder<Flex>) -> FusedKvDecoder<F64> {
    /// Parameters in the order in which they are visited.
    struct Numbers(VecDeque<TensorData>);

    impl ModuleVisitor<Flex> for Numbers {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Flex, D>>) {
            self.0.push_back(param.val().into_data());
        }
    }

    impl ModuleMapper<F64> for Numbers {
        fn map_float<const D: usize>(
            &mut self,
            param: Param<Tensor<F64, D>>,
        ) -> Param<Tensor<F64, D>> {
            let data = self.0.pop_front().unwrap().convert::<f64>();
            param.map(|old| Tensor::from_data(data, &old.device()))
        }
    }

    let mut numbers = Numbers(VecDeque::new());
    model.visit(&mut numbers);
    let exact = case.model::<F64>().map(&mut numbers);
    assert!(numbers.0.is_empty());
    exact
}

/// Whether two ways in f32 agree to 1e-3, or where f32 itself is further from what f64 gives, to a few
/// times that. Some random blocks magnify every rounding a thousandfold, as a norm of the little that
/// GELU leaves of negative numbers does; a wrong scale or offset is off by far more.
pub fn agree(found: &[f64], other: &[f64], exact: &[f64]) -> bool {
    off(found, other) < f64::max(1e-3, 4.0 * off(other, exact))
}
