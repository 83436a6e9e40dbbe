//! What a backend must compute, against Flex in f32 with the same numbers as parameters.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::config::{
    Activation, BlockConfig, LayerKind, NormPlacement, QkNorm, RopeConfig, RopeScaling,
};
use fusedkv::{
    CacheDtype, CacheError, FusedKvDecoder, FusedKvDecoderConfig, GenerationConfig, KvPlan, Logits,
    TokenBatch, WeightError, WeightFormat, generate,
};

use crate::formula::{model_on, off, plans, values};
use crate::script::{Step, run};

/// A backend to test, and what with.
pub struct Subject<B: Backend> {
    pub device: B::Device,
    /// What numbers its decoders compute with.
    pub dtype: DType,
    /// What numbers caches can keep there; with others a cache is refused.
    pub cache_dtypes: &'static [CacheDtype],
    /// Whether products in f32 round what they multiply to TF32, whose mantissa is f16's: CubeCL does
    /// where tensor cores are the fastest.
    pub tf32: bool,
}

impl<B: Backend> Subject<B> {
    /// How far off logits may be, relative to the largest: several times what rounding to the
    /// numbers computed with makes of it through four layers.
    pub fn tolerance(&self) -> f64 {
        match self.dtype {
            DType::F32 if self.tf32 => 1e-2,
            DType::F32 | DType::F64 => 1e-4,
            DType::F16 => 2e-2,
            DType::BF16 => 1e-1,
            other => panic!("no decoder computes with {other:?}"),
        }
    }

    /// The backend's decoder and Flex's, with the same numbers as parameters.
    fn pair(&self, config: &FusedKvDecoderConfig) -> (FusedKvDecoder<B>, FusedKvDecoder<Flex>) {
        let subject = model_on::<B>(config, SEED, &self.device).map(&mut Cast(self.dtype));
        let reference = model_on::<Flex>(config, SEED, &FlexDevice);
        let reference = match self.dtype {
            DType::F64 => reference,
            dtype => reference.map(&mut Cast(dtype)).map(&mut Cast(DType::F32)),
        };
        (subject, reference)
    }

    /// Asserts that `found` is `expected` but for rounding.
    fn agree(&self, what: &str, found: &[f64], expected: &[f64]) {
        agree(what, found, expected, self.tolerance());
    }

    /// Asserts that `steps` give on both decoders the same logits, each step's by themselves.
    fn run(&self, what: &str, config: &FusedKvDecoderConfig, dtype: CacheDtype, steps: &[Step]) {
        let (subject, reference) = self.pair(config);
        let found = run(&subject, dtype, steps);
        let expected = run(&reference, dtype, steps);
        for ((found, expected), (i, step)) in
            found.iter().zip(&expected).zip(steps.iter().enumerate())
        {
            self.agree(&format!("{what}, step {i}, {step:?}"), found, expected);
        }
    }
}

/// Asserts that numbers are off by no more than `tolerance` of their scale.
fn agree(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    let off = off(found, expected);
    assert!(
        off <= tolerance,
        "{what}: off by {off:.1e} of the scale, allowed are {tolerance:.0e}"
    );
}

const SEED: u64 = 7;

/// Rounds parameters to other numbers.
struct Cast(DType);

impl<B: Backend> ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|x| x.cast(self.0))
    }
}

/// Decoders of four layers whose shapes differ: MHA and GQA, heads of 32 to 128 channels, widths
/// that are multiples of what a GPU's kernels are vectorised by and such that are not, tied heads
/// and others.
fn shape(i: usize, plan: KvPlan) -> FusedKvDecoderConfig {
    let [n_heads, n_kv_heads, head_dim] = [[4, 4, 32], [4, 2, 64], [6, 2, 80], [2, 1, 128]][i % 4];
    let (hidden, ffn, vocab, tied) = [(128, 256, 128, true), (48, 72, 50, false)][i / 4 % 2];
    FusedKvDecoderConfig::new(vocab, plan)
        .with_hidden_size(hidden)
        .with_n_layers(4)
        .with_n_heads(n_heads)
        .with_n_kv_heads(n_kv_heads)
        .with_head_dim(head_dim)
        .with_ffn_size(ffn)
        .with_tie_embeddings(tied)
        .with_max_positions(512)
}

/// `len` tokens below 50, which every shape's vocabulary has.
pub fn tokens(len: usize, row: usize) -> Vec<u32> {
    (0..len)
        .map(|i| ((i * 17 + i * i * 3 + row * 11) % 50) as u32)
        .collect()
}

fn rows(lens: &[usize]) -> Vec<Vec<u32>> {
    let row = |(row, &len): (usize, &usize)| tokens(len, row);
    lens.iter().enumerate().map(row).collect()
}

/// Without a cache and through it, in chunks and single tokens, at lengths that are multiples of
/// vectors, tiles and planes, and at others.
pub fn every_plan<B: Backend>(subject: &Subject<B>) {
    for (i, plan) in plans(4).into_iter().enumerate() {
        let config = shape(i, plan);
        let what = format!("{} ({i})", config.plan.method());
        let (model, reference) = subject.pair(&config);
        let all = rows(&[100, 100]);
        let expected = whole(&reference, &FlexDevice, &all);
        subject.agree(&what, &whole(&model, &subject.device, &all), &expected);

        let mut steps = Vec::new();
        let mut from = 0;
        for len in [31, 1, 31, 1, 1 + i % 4, 34 - i % 4, 1] {
            let chunk = all.iter().map(|row| row[from..from + len].to_vec());
            steps.push(Step::Append(chunk.collect(), Logits::All));
            from += len;
        }
        assert_eq!(from, 100);
        let mut position = 0;
        for (found, step) in run(&model, CacheDtype::Model, &steps).iter().zip(&steps) {
            let Step::Append(chunk, _) = step else {
                unreachable!()
            };
            let (vocab, len) = (config.vocab_size, chunk[0].len());
            let rows = expected.chunks(100 * vocab);
            let expected = rows
                .flat_map(|row| &row[position * vocab..][..len * vocab])
                .copied();
            let what = format!("{what}: {len} tokens after {position}");
            subject.agree(&what, found, &expected.collect::<Vec<_>>());
            position += len;
        }
    }
}

/// The logits `[batch, seq, vocab_size]` of a pass without a cache.
fn whole<B: Backend>(model: &FusedKvDecoder<B>, device: &B::Device, rows: &[Vec<u32>]) -> Vec<f64> {
    let batch = TokenBatch::from_rows(rows, model.config().vocab_size, device).unwrap();
    values(&model.forward(batch).unwrap())
}

/// A token at a time, at every length.
pub fn every_length<B: Backend>(subject: &Subject<B>) {
    for (i, plan) in [KvPlan::Standard, KvPlan::FusedKv { storage_layers: 2 }]
        .into_iter()
        .enumerate()
    {
        let config = FusedKvDecoderConfig {
            n_layers: 2 + i,
            ..shape(4 * i, plan)
        };
        let single = |&token| Step::Append(vec![vec![token]], Logits::Last);
        let steps: Vec<Step> = tokens(300, 0).iter().map(single).collect();
        subject.run(config.plan.method(), &config, CacheDtype::Model, &steps);
    }
}

/// Rows of different lengths, padded on the left: without a cache, and through it.
pub fn ragged_batches<B: Backend>(subject: &Subject<B>) {
    for (i, plan) in [
        KvPlan::Standard,
        KvPlan::Cla { factor: 2 },
        KvPlan::FusedKv { storage_layers: 2 },
        KvPlan::YocoPlusPlus { storage_layers: 2 },
    ]
    .into_iter()
    .enumerate()
    {
        let config = shape(i + 1, plan);
        let prompts = rows(&[9, 40, 1, 17, 32, 33, 24, 40]);
        let (model, reference) = subject.pair(&config);
        let what = config.plan.method();
        let (vocab, longest) = (config.vocab_size, 40);
        let found = whole(&model, &subject.device, &prompts);
        for (row, prompt) in prompts.iter().enumerate() {
            let found = &found[row * longest * vocab..][(longest - prompt.len()) * vocab..];
            let alone = whole(&reference, &FlexDevice, std::slice::from_ref(prompt));
            subject.agree(&format!("{what} row {row}"), &found[..alone.len()], &alone);
        }
        let mut steps = vec![Step::Append(prompts, Logits::Last)];
        for i in 0..4 {
            steps.push(Step::Append(rows(&[1; 8]), Logits::Last));
            if i == 1 {
                steps.push(Step::Append(rows(&[3, 1, 2, 3, 3, 1, 1, 2]), Logits::Last));
            }
        }
        subject.run(what, &config, CacheDtype::Model, &steps);
    }
}

/// Blocks of other families than Qwen3, each under a plan: windows with a RoPE of their own, layers
/// without, norms in all places, biases, soft caps, partial rotation. Rows of different lengths,
/// through a cache that forgets, with tokens taken back.
pub fn every_block<B: Backend>(subject: &Subject<B>) {
    let kind = |window, rope| LayerKind {
        window,
        rope,
        ..LayerKind::default()
    };
    let rope = |rotary_dim, scaling| RopeConfig {
        theta: 1e4,
        rotary_dim,
        scaling,
    };
    let mut gemma = BlockConfig::default();
    gemma.norm_placement = NormPlacement::Sandwich;
    gemma.norm_unit_offset = true;
    gemma.activation = Activation::GeluTanh;
    gemma.embedding_scale = Some(7.0);
    gemma.attention_scale = Some(0.15);
    gemma.attention_softcap = Some(8.0);
    gemma.logit_softcap = Some(20.0);
    let local = kind(
        Some(12),
        Some(rope(None, RopeScaling::Linear { factor: 2.0 })),
    );
    let global = kind(None, Some(rope(None, RopeScaling::Default)));
    gemma.layers = vec![local.clone(), global.clone(), local, global];
    let mut gemma4 = gemma.clone();
    gemma4.norm_unit_offset = false;
    gemma4.attention_softcap = None;
    (gemma4.value_norm, gemma4.layer_scalar) = (true, true);
    gemma4.layer_input_size = Some(24);
    gemma4.ffn_sizes = vec![48, 48, 96, 96];
    for global in [1, 3] {
        let rotated = 0.25;
        let factor = 1.0;
        gemma4.layers[global] = LayerKind {
            rope: Some(rope(None, RopeScaling::Proportional { rotated, factor })),
            head_dim: Some(96),
            n_kv_heads: Some(1),
            k_eq_v: true,
            ..LayerKind::default()
        };
    }
    let mut olmo = BlockConfig::default();
    olmo.norm_placement = NormPlacement::Post;
    olmo.qk_norm = QkNorm::AllHeads;
    olmo.activation = Activation::Gelu;
    let mut phi = BlockConfig::default();
    phi.qk_norm = QkNorm::None;
    phi.rotary_dim = Some(16);
    [phi.qkv_bias, phi.output_bias, phi.mlp_bias] = [true; 3];
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: 1.1,
        truncate: true,
        positions: 32,
    };
    phi.layers = vec![kind(Some(9), Some(rope(Some(16), yarn))); 4];
    let mut no_rope = BlockConfig::default();
    no_rope.layers = vec![kind(Some(40), None); 4];
    for (i, (block, plan)) in [
        (gemma.clone(), KvPlan::Yoco { storage_layers: 2 }),
        (gemma, KvPlan::Standard),
        (gemma4.clone(), KvPlan::Yoco { storage_layers: 2 }),
        (gemma4, KvPlan::FusedKv { storage_layers: 3 }),
        (olmo, KvPlan::FusedKv { storage_layers: 2 }),
        (phi, KvPlan::FusedKv { storage_layers: 2 }),
        (no_rope, KvPlan::FusedKvLiteLearnable { storage_layers: 3 }),
    ]
    .into_iter()
    .enumerate()
    {
        let config = shape(i, plan).with_block(block);
        let steps = [
            Step::Append(rows(&[33, 12, 90]), Logits::Last),
            Step::Append(rows(&[1; 3]), Logits::Last),
            Step::Append(rows(&[2, 5, 1]), Logits::Last),
            Step::Append(rows(&[7; 3]), Logits::All),
            Step::Append(rows(&[1; 3]), Logits::Last),
            Step::TruncateRows(vec![39, 20, 100]),
            Step::Append(rows(&[1; 3]), Logits::Last),
            Step::Append(rows(&[70, 70, 70]), Logits::Last),
            Step::Append(rows(&[1; 3]), Logits::Last),
        ];
        subject.run(&format!("block {i}"), &config, CacheDtype::Model, &steps);
    }
}

/// Caches of every kind of numbers the backend has; others are refused.
pub fn cache_dtypes<B: Backend>(subject: &Subject<B>) {
    let config = shape(2, KvPlan::FusedKv { storage_layers: 2 });
    for dtype in [
        CacheDtype::Model,
        CacheDtype::F32,
        CacheDtype::F16,
        CacheDtype::Bf16,
        CacheDtype::Int8,
    ] {
        let (model, reference) = subject.pair(&config);
        if !subject.cache_dtypes.contains(&dtype) {
            let refused = model.new_cache_of(dtype, 1, 1);
            assert!(
                matches!(refused, Err(CacheError::UnsupportedDtype { .. })),
                "{dtype}"
            );
            continue;
        }
        let mut steps = vec![Step::Append(rows(&[64, 50]), Logits::Last)];
        steps.extend((0..4).map(|_| Step::Append(rows(&[1, 1]), Logits::Last)));
        steps.push(Step::SelectRows(vec![1, 0, 1]));
        steps.push(Step::Append(rows(&[1, 1, 1]), Logits::Last));
        let (found, expected) = (run(&model, dtype, &steps), run(&reference, dtype, &steps));
        for (found, expected) in found.iter().zip(&expected) {
            agree(
                &dtype.to_string(),
                found,
                expected,
                subject.tolerance() + rounding(dtype),
            );
        }
    }
}

/// How far off logits may be since a number that lies between two of the cache's may be rounded to
/// either.
pub fn rounding(dtype: CacheDtype) -> f64 {
    match dtype {
        CacheDtype::F16 => 2e-3,
        CacheDtype::Bf16 | CacheDtype::Int8 => 2e-2,
        _ => 0.0,
    }
}

/// Matrices in fewer bits: what the backend has numbers for as on Flex, the rest refused.
pub fn weight_formats<B: Backend>(subject: &Subject<B>) {
    for (i, (format, numbers)) in [
        (WeightFormat::F16, CacheDtype::F16),
        (WeightFormat::Bf16, CacheDtype::Bf16),
        (WeightFormat::Int8, CacheDtype::Int8),
        (WeightFormat::Int4, CacheDtype::Int8),
    ]
    .into_iter()
    .enumerate()
    {
        let config = shape(i + 2, KvPlan::FusedKv { storage_layers: 2 });
        let (model, reference) = subject.pair(&config);
        let model = model.with_weights(format);
        if !subject.cache_dtypes.contains(&numbers) {
            let refused = matches!(model, Err(WeightError::Unsupported { .. }));
            assert!(refused, "{format}");
            continue;
        }
        let (model, reference) = (model.unwrap(), reference.with_weights(format).unwrap());
        let mut steps = vec![Step::Append(rows(&[40, 33]), Logits::All)];
        steps.extend((0..3).map(|_| Step::Append(rows(&[1, 1]), Logits::Last)));
        let found = run(&model, CacheDtype::Model, &steps);
        let expected = run(&reference, CacheDtype::Model, &steps);
        // The second row's first seven tokens are padding, whose logits mean nothing.
        let padding = 40 * config.vocab_size..47 * config.vocab_size;
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let read = |logits: &[f64]| match i {
                0 => [&logits[..padding.start], &logits[padding.end..]].concat(),
                _ => logits.to_vec(),
            };
            subject.agree(&format!("{format} weights"), &read(found), &read(expected));
        }
    }
}

/// Tokens taken back, rows moved together, reordered, repeated and dropped, a copy that goes its own way.
pub fn edited_caches<B: Backend>(subject: &Subject<B>) {
    for (i, plan) in [KvPlan::Standard, KvPlan::FusedKv { storage_layers: 2 }]
        .into_iter()
        .enumerate()
    {
        let config = shape(i + 2, plan);
        let one = |row: usize| Step::Append(vec![tokens(1, row); 3], Logits::Last);
        let steps = [
            Step::Append(rows(&[33, 12, 20]), Logits::Last),
            one(1),
            one(2),
            Step::Truncate(33),
            one(3),
            Step::Fork,
            one(4),
            Step::TruncateRows(vec![30, 10, 21]),
            one(5),
            Step::Compact,
            one(8),
            Step::SelectRows(vec![2, 0, 0]),
            one(6),
            Step::Append(rows(&[4, 4, 4]), Logits::All),
            Step::Return,
            one(7),
        ];
        subject.run(config.plan.method(), &config, CacheDtype::Model, &steps);
    }
}

/// Greedy text of eight prompts of different lengths. A row may part from Flex's where Flex's two
/// best logits are a tie: within the tolerance.
pub fn greedy_text<B: Backend>(subject: &Subject<B>) {
    for (i, plan) in [
        KvPlan::Standard,
        KvPlan::FusedKv { storage_layers: 2 },
        KvPlan::FusedKvLite { storage_layers: 2 },
    ]
    .into_iter()
    .enumerate()
    {
        let config = shape(i + 1, plan);
        let (model, reference) = subject.pair(&config);
        let prompts = rows(&[5, 40, 1, 17, 32, 33, 24, 8]);
        let settings = GenerationConfig::new().with_max_new_tokens(24);
        let found = text(&model, &prompts, &settings);
        let expected = text(&reference, &prompts, &settings);
        for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let what = format!("{}, row {row}", config.plan.method());
            let tolerance = subject.tolerance();
            agree_but_for_ties(
                &what,
                &reference,
                &prompts[row],
                [found, expected],
                tolerance,
            );
        }
    }
}

/// Asserts that a greedy text goes on as expected, or parts from it where the two best logits of the
/// reference are a tie: both off by `tolerance` of the largest.
pub fn agree_but_for_ties(
    what: &str,
    reference: &FusedKvDecoder<Flex>,
    prompt: &[u32],
    [found, expected]: [&[u32]; 2],
    tolerance: f64,
) {
    let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) else {
        assert_eq!(found.len(), expected.len(), "{what}");
        return;
    };
    let logits = whole(
        reference,
        &FlexDevice,
        &[[prompt, &expected[..at]].concat()],
    );
    let last = &logits[logits.len() - reference.config().vocab_size..];
    let scale = last.iter().fold(0f64, |max, x| max.max(x.abs()));
    let gap = (last[expected[at] as usize] - last[found[at] as usize]) / scale;
    assert!(
        gap <= 2.0 * tolerance,
        "{what}: token {at} is {} instead of {}, whose logit is {gap:.1e} higher",
        found[at],
        expected[at],
    );
}

fn text<B: Backend>(
    model: &FusedKvDecoder<B>,
    prompts: &[Vec<u32>],
    settings: &GenerationConfig,
) -> Vec<Vec<u32>> {
    let mut rows = vec![Vec::new(); prompts.len()];
    for token in generate(model, prompts, settings).unwrap() {
        let token = token.unwrap();
        rows[token.row].push(token.id);
    }
    rows
}

/// The suite for one backend.
macro_rules! conformance {
    ($backend:ty, $subject:expr) => {
        conformance!(@ $backend, $subject, crate::checks:
            every_plan, every_block, every_length, ragged_batches, cache_dtypes, weight_formats,
            edited_caches, greedy_text);
        conformance!(@ $backend, $subject, crate::road: whole_road);
    };
    (training $backend:ty, $subject:expr) => {
        conformance!(@ $backend, $subject, crate::training:
            gradients, ten_steps, checkpoints);
    };
    (@ $backend:ty, $subject:expr, $($module:ident)::+ : $($check:ident),+) => {
        conformance!(@@ [$backend] [$subject] [$($module)::+] $($check)+);
    };
    (@@ $backend:tt $subject:tt $module:tt $($check:ident)+) => {
        $(conformance!(@test $backend $subject $module $check);)+
    };
    (@test [$backend:ty] [$subject:expr] [$($module:ident)::+] $check:ident) => {
        #[test]
        fn $check() {
            $($module)::+::$check::<$backend>(&$subject);
        }
    };
}
