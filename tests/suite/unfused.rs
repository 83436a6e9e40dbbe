//! A FusedKV decoder against a decoder with a standard cache that is fed the materialised keys and
//! values of every layer: fused and unfused caches give the same logits.

use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Bool, DType, Tensor};
use fusedkv::BlockConfig;
use fusedkv::config::RopeConfig;
use fusedkv::decoder::Rope;
use fusedkv::{FusedKvDecoder, KvPart, KvPlan, LayerKv, Logits, TokenBatch};
use proptest::prelude::*;

use crate::models::{F64, VOCAB, any_case, difference};

/// Keys and values of all layers, top ones included: what a standard decoder caches.
type StandardCache = Vec<(Tensor<F64, 4>, Tensor<F64, 4>)>;

/// `x · W + b`, b where there is one.
fn linear(model: &FusedKvDecoder<F64>, name: &str, x: Tensor<F64, 3>) -> Tensor<F64, 3> {
    let weight = model.parameter::<2>(&format!("{name}.weight")).unwrap();
    let product = x.matmul(weight.unsqueeze());
    match model.parameter::<1>(&format!("{name}.bias")) {
        Some(bias) => product + bias.unsqueeze(),
        None => product,
    }
}

/// RMSNorm over the last dimension, its mean in f32 as the decoder's is for every float type.
fn norm<const D: usize>(
    model: &FusedKvDecoder<F64>,
    name: &str,
    x: Tensor<F64, D>,
) -> Tensor<F64, D> {
    let gain = model.parameter::<1>(&format!("{name}.weight")).unwrap();
    let mean = x.clone().cast(DType::F32).square().mean_dim(D - 1);
    let rms = (mean + model.config().rms_norm_eps).sqrt();
    x / rms.cast(DType::F64) * gain.unsqueeze()
}

/// One chunk through a standard decoder's loop: every layer appends its own (here: materialised)
/// keys and values and attends to all it has, in the plainest way.
fn standard_chunk(
    model: &FusedKvDecoder<F64>,
    cache: &mut StandardCache,
    tokens: TokenBatch<F64>,
) -> Tensor<F64, 3> {
    let c = model.config();
    let [batch, seq] = tokens.dims();
    let past = cache.first().map_or(0, |(key, _)| key.dims()[2]);
    let rope = Rope::new(c.head_dim, RopeConfig::new(c.rope_theta));
    let angles = rope.range(past, seq, &Default::default());
    let heads = |x: Tensor<F64, 3>, n: usize| x.reshape([batch, seq, n, c.head_dim]);
    let embedding = model.parameter::<2>("model.embed_tokens.weight").unwrap();
    let ids = tokens.into_tensor().reshape([batch * seq]);
    let mut x = (embedding.clone().select(0, ids)).reshape([batch, seq, c.hidden_size]);
    let mut fresh: StandardCache = vec![];
    for i in 0..c.n_layers {
        let name = |module: &str| format!("model.layers.{i}.{module}");
        let of = |module: &str, x: &Tensor<F64, 3>| linear(model, &name(module), x.clone());
        let y = norm(model, &name("input_layernorm"), x.clone());
        let (key, value) = match model.layout().layer(i) {
            layer if *layer == LayerKv::OWN => {
                let key = heads(of("self_attn.k_proj", &y), c.n_kv_heads);
                let key = norm(model, &name("self_attn.k_norm"), key).swap_dims(1, 2);
                let value = heads(of("self_attn.v_proj", &y), c.n_kv_heads);
                (angles.apply(key).unwrap(), value.swap_dims(1, 2))
            }
            _ => {
                let weights = |part: &str| {
                    let name = name(&format!("self_attn.kv_fusion.{part}_weight"));
                    model.parameter::<3>(&name).unwrap()
                };
                // Both channels of a pair share a weight of keys.
                let a = Tensor::cat(vec![weights("key"); 2], 2);
                let b = weights("value");
                let [s, t] = KvPart::BOTH.map(|part| model.layout().sources(part, i));
                let weighted = |x: &Tensor<F64, 4>, weights: &Tensor<F64, 3>, source: usize| {
                    let weight = weights.clone().narrow(0, source, 1);
                    x.clone() * weight.reshape([1, c.n_kv_heads, 1, c.head_dim])
                };
                let sum = |i: usize| weighted(&fresh[s[i]].0, &a, i);
                let key = sum(0) + sum(1);
                let sum = |i: usize| weighted(&fresh[t[i]].1, &b, i);
                (key, sum(0) + sum(1))
            }
        };
        fresh.push((key.clone(), value.clone()));
        if past == 0 {
            cache.push((key, value));
        } else {
            let (keys, values) = cache[i].clone();
            cache[i] = (
                Tensor::cat(vec![keys, key], 2),
                Tensor::cat(vec![values, value], 2),
            );
        }
        let query = heads(of("self_attn.q_proj", &y), c.n_heads);
        let query = norm(model, &name("self_attn.q_norm"), query);
        let query = angles.apply(query.swap_dims(1, 2)).unwrap();
        let group = c.n_heads / c.n_kv_heads;
        let outputs = (0..c.n_heads).map(|head| {
            let kv = |x: &Tensor<F64, 4>| x.clone().narrow(1, head / group, 1);
            let scores = query
                .clone()
                .narrow(1, head, 1)
                .matmul(kv(&cache[i].0).swap_dims(2, 3));
            let future = Tensor::<F64, 2, Bool>::tril_mask(
                [seq, past + seq],
                past as i64,
                &Default::default(),
            );
            let scores = scores / (c.head_dim as f64).sqrt();
            let scores = scores.mask_fill(future.unsqueeze::<4>(), f64::NEG_INFINITY);
            softmax(scores, 3).matmul(kv(&cache[i].1))
        });
        let output = Tensor::cat(outputs.collect(), 1).swap_dims(1, 2);
        let output = output.reshape([batch, seq, c.n_heads * c.head_dim]);
        x = x + of("self_attn.o_proj", &output);
        let y = norm(model, &name("post_attention_layernorm"), x.clone());
        let gated = silu(of("mlp.gate_proj", &y)) * of("mlp.up_proj", &y);
        x = x + of("mlp.down_proj", &gated);
    }
    let x = norm(model, "model.norm", x);
    let head = model.parameter::<2>("lm_head.weight");
    x.matmul(head.unwrap_or_else(|| embedding.transpose()).unsqueeze())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn fused_cache_is_standard_cache_of_materialised_kv(
        mut case in any_case(2..9),
        n in 2usize..4,
        cut in any::<prop::sample::Index>(),
        biases in any::<bool>(),
    ) {
        case.config.n_layers = case.config.n_layers.max(n + 1);
        // What the loop here computes.
        let block = &mut case.config.block;
        *block = BlockConfig::default();
        [block.qkv_bias, block.output_bias, block.mlp_bias] = [biases; 3];
        let model = case.model_with::<F64>(KvPlan::FusedKv { storage_layers: n });
        let seq = case.tokens[0].len();
        let cut = 1 + cut.index(seq - 1);
        let mut fused = model.new_cache(case.tokens.len(), seq).unwrap();
        let mut standard = vec![];
        for range in [0..cut, cut..seq] {
            let rows: Vec<_> = case.tokens.iter().map(|row| row[range.clone()].to_vec()).collect();
            let batch = TokenBatch::from_rows(&rows, VOCAB, &Default::default()).unwrap();
            let expected = standard_chunk(&model, &mut standard, batch.clone());
            let found = model.forward_cached(batch, &mut fused, Logits::All).unwrap();
            let difference = difference(&found, &expected);
            prop_assert!(difference < 1e-6, "{difference}");
        }
    }
}
