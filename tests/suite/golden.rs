//! Logits against the NumPy reference in tests/reference, which shares no code with the crate.

use burn::tensor::{Tensor, TensorData};
use fusedkv::{FusedKvDecoderConfig, KvPlan, Logits, TokenBatch};
use serde_json::Value;

use crate::models::{F64, difference, model};

fn number(config: &Value, key: &str) -> usize {
    config[key].as_u64().unwrap() as usize
}

/// All logits uncached, cached in two chunks, and the reference's must agree.
fn agrees(json: &str) {
    let case: Value = serde_json::from_str(json).unwrap();
    let c = &case["config"];
    let plan: KvPlan = serde_json::from_value(case["kv_plan"].clone()).unwrap();
    let config = FusedKvDecoderConfig::new(number(c, "vocab_size"), plan)
        .with_hidden_size(number(c, "hidden_size"))
        .with_n_layers(number(c, "num_hidden_layers"))
        .with_n_heads(number(c, "num_attention_heads"))
        .with_n_kv_heads(number(c, "num_key_value_heads"))
        .with_head_dim(number(c, "head_dim"))
        .with_ffn_size(number(c, "intermediate_size"))
        .with_rope_theta(c["rope_theta"].as_f64().unwrap())
        .with_rms_norm_eps(c["rms_norm_eps"].as_f64().unwrap())
        .with_tie_embeddings(c["tie_word_embeddings"].as_bool().unwrap())
        .with_max_positions(number(c, "max_position_embeddings"));
    let tokens: Vec<Vec<u32>> = serde_json::from_value(case["tokens"].clone()).unwrap();
    let expected: Vec<Vec<Vec<f64>>> = serde_json::from_value(case["logits"].clone()).unwrap();
    let dims = [expected.len(), expected[0].len(), expected[0][0].len()];
    let expected: Vec<f64> = expected.into_iter().flatten().flatten().collect();
    let expected =
        Tensor::<F64, 3>::from_data(TensorData::new(expected, dims), &Default::default());

    let model = model::<F64>(&config, 0);
    let batch = |rows: &[Vec<u32>]| {
        TokenBatch::<F64>::from_rows(rows, config.vocab_size, &Default::default()).unwrap()
    };
    let uncached = model.forward(batch(&tokens)).unwrap();
    let mut cache = model.new_cache(tokens.len(), tokens[0].len()).unwrap();
    let cached = [0..5, 5..9].map(|range| {
        let chunk: Vec<_> = tokens
            .iter()
            .map(|row| row[range.clone()].to_vec())
            .collect();
        model
            .forward_cached(batch(&chunk), &mut cache, Logits::All)
            .unwrap()
    });
    for logits in [uncached, Tensor::cat(cached.to_vec(), 1)] {
        let difference = difference(&logits, &expected);
        assert!(difference < 1e-6, "{difference}");
    }
}

macro_rules! golden {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            agrees(include_str!(concat!("../golden/", stringify!($name), ".json")));
        }
    )*};
}

golden!(
    standard,
    cla,
    fused_kv,
    fused_kv_lite,
    fused_kv_lite_learnable,
    fused_kv_lite_reversed,
    yoco,
    yoco_plus_plus,
    dense_fusion,
    custom,
    apart,
    fused_kv_untied_mha,
    fused_kv_one_kv_head,
);
