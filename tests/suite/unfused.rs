//! A FusedKV decoder against a decoder with a standard cache that is fed the materialised keys and
//! values of every layer: fused and unfused caches give the same logits.

use burn::module::Param;
use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Bool, Distribution, Tensor};
use fusedkv::BlockConfig;
use fusedkv::config::RopeConfig;
use fusedkv::decoder::{Projection, Rope};
use fusedkv::{FusedKvDecoder, KvPart, KvPlan, LayerKv, Logits, TokenBatch};
use proptest::prelude::*;

use crate::models::{F64, VOCAB, any_case, difference};

/// Keys and values of all layers, top ones included: what a standard decoder caches.
type StandardCache = Vec<(Tensor<F64, 4>, Tensor<F64, 4>)>;

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
    let mut x = (model.embed_tokens).forward(tokens.into_tensor(), model.dtype());
    let mut fresh: StandardCache = vec![];
    for (i, layer) in model.layers.iter().enumerate() {
        let attn = &layer.self_attn;
        let y = layer.input_layernorm.as_ref().unwrap().forward(x.clone());
        let (key, value) = match model.layout().layer(i) {
            layer if *layer == LayerKv::OWN => {
                let key = heads(
                    attn.k_proj.as_ref().unwrap().forward(y.clone()),
                    c.n_kv_heads,
                );
                let key = attn.k_norm.as_ref().unwrap().forward(key).swap_dims(1, 2);
                let value = heads(
                    attn.v_proj.as_ref().unwrap().forward(y.clone()),
                    c.n_kv_heads,
                );
                (angles.apply(key).unwrap(), value.swap_dims(1, 2))
            }
            _ => {
                let fusion = attn.kv_fusion.as_ref().unwrap();
                let [a, b] = KvPart::BOTH.map(|part| fusion.weights(part).unwrap());
                let [s, t] = KvPart::BOTH.map(|part| model.layout().sources(part, i));
                let blend = |i: usize| {
                    (
                        fresh[s[i]].0.clone() * a[i].clone(),
                        fresh[t[i]].1.clone() * b[i].clone(),
                    )
                };
                let ((k0, v0), (k1, v1)) = (blend(0), blend(1));
                (k0 + k1, v0 + v1)
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
        let query = attn
            .q_norm
            .as_ref()
            .unwrap()
            .forward(heads(attn.q_proj.forward(y), c.n_heads));
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
        x = x + attn.o_proj.forward(output);
        let y = layer.post_attention_layernorm.forward(x.clone());
        let mlp = &layer.mlp;
        let gated = silu(mlp.gate_proj.forward(y.clone())) * mlp.up_proj.forward(y);
        x = x + mlp.down_proj.forward(gated);
    }
    let x = model.norm.forward(x);
    match &model.lm_head {
        Some(head) => head.forward(x),
        None => x.matmul(model.embed_tokens.weight.val().transpose().unsqueeze()),
    }
}

/// Gives every projection a bias.
fn set_biases(model: &mut FusedKvDecoder<F64>) {
    let set = |projection: &mut Projection<F64>| {
        let [_, output] = projection.weight.dims();
        let bias = Tensor::random([output], Distribution::Default, &Default::default());
        projection.bias = Some(Param::from_tensor(bias));
    };
    for layer in &mut model.layers {
        let (attn, mlp) = (&mut layer.self_attn, &mut layer.mlp);
        let kv = attn.k_proj.iter_mut().chain(&mut attn.v_proj);
        [&mut attn.q_proj, &mut attn.o_proj]
            .into_iter()
            .chain(kv)
            .for_each(set);
        let mlp = [&mut mlp.gate_proj, &mut mlp.up_proj, &mut mlp.down_proj];
        mlp.into_iter().for_each(set);
    }
    model.lm_head.iter_mut().for_each(set);
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
        case.config.block = BlockConfig::default();
        let mut model = case.model_with::<F64>(KvPlan::FusedKv { storage_layers: n });
        if biases {
            set_biases(&mut model);
        }
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
