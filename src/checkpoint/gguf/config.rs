//! `config.json` and `generation_config.json`, in the keys of the family's own configuration.

use serde_json::{Map, Value, json};

use super::architectures::Family;
use super::error::GgufError;
use super::keys::Keys;
use super::model::Model;
use super::rope::Rope;
use crate::checkpoint::WeightDtype;

/// llama.cpp's, where files of Gemma 2 do not say.
const GEMMA2_ATTENTION_CAP: f64 = 50.0;
const GEMMA2_LOGIT_CAP: f64 = 30.0;
const GEMMA2_WINDOW: usize = 4096;

/// Which layers of Gemma see everything: every second, every sixth. Files do not say.
const GEMMA2_PATTERN: usize = 2;
const GEMMA3_PATTERN: usize = 6;

/// Layers of Gemma's largest models, whose attention is scaled by the hidden size. Files do not say.
const GEMMA2_27B_LAYERS: usize = 46;
const GEMMA3_27B_LAYERS: usize = 62;

/// Every how manyth layer of SmolLM3 has no RoPE. Files do not say.
const SMOLLM3_NO_ROPE: usize = 4;

/// The `config.json` of a model whose weights are written as `dtype`.
pub(super) fn config(
    keys: &Keys,
    model: &Model,
    rope: &Rope,
    dtype: WeightDtype,
) -> Result<Value, GgufError> {
    let (model_type, class) = model.family.names();
    let eps = ".attention.layer_norm_rms_epsilon";
    let eps = match keys.number(eps)? {
        Some(number) => number,
        None => return Err(keys.wrong(eps, "a number")),
    };
    let mut json = json!({
        "architectures": [class],
        "attention_dropout": 0.0,
        "bos_token_id": keys.token("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": keys.token("tokenizer.ggml.eos_token_id")?,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": keys.needed_count(".context_length")?,
        "model_type": model_type,
        "num_attention_heads": model.n_heads,
        "num_hidden_layers": model.n_layers,
        "num_key_value_heads": model.n_kv_heads,
        "pad_token_id": keys.token("tokenizer.ggml.padding_token_id")?,
        "rms_norm_eps": eps,
        "rope_parameters": rope.parameters(rope.theta, true),
        "rope_theta": rope.theta,
        "tie_word_embeddings": model.tied,
        "torch_dtype": dtype.torch_name(),
        "use_cache": true,
        "vocab_size": model.vocab_size,
    });
    if let Some(scaling) = &rope.scaling {
        json["rope_scaling"] = json!(scaling);
    }
    let own = own_keys(keys, model, rope)?;
    if let (Some(json), Value::Object(own)) = (json.as_object_mut(), own) {
        json.extend(own);
    }
    Ok(json)
}

/// What the family's configuration has and others have not.
fn own_keys(keys: &Keys, model: &Model, rope: &Rope) -> Result<Value, GgufError> {
    let window = keys
        .count(".attention.sliding_window")?
        .filter(|&window| window > 0);
    Ok(match model.family {
        Family::Llama => json!({
            "attention_bias": model.attention_bias,
            "mlp_bias": model.mlp_bias,
            "pretraining_tp": 1,
        }),
        Family::Mistral => {
            if model.attention_bias || model.mlp_bias {
                return Err(
                    keys.wrong(".attention.sliding_window", "none, for a model with biases")
                );
            }
            json!({ "sliding_window": window })
        }
        Family::Qwen2 => json!({ "use_sliding_window": false }),
        Family::Qwen3 => json!({
            "attention_bias": model.attention_bias,
            "use_sliding_window": false,
        }),
        Family::Gemma2 => {
            let cap = |key, usual| Ok::<f64, GgufError>(keys.number(key)?.unwrap_or(usual));
            json!({
                "attention_bias": false,
                "attn_logit_softcapping": cap(".attn_logit_softcapping", GEMMA2_ATTENTION_CAP)?,
                "final_logit_softcapping": cap(".final_logit_softcapping", GEMMA2_LOGIT_CAP)?,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh",
                "layer_types": layer_types(keys, model, GEMMA2_PATTERN)?,
                "query_pre_attn_scalar": query_scalar(keys, model, GEMMA2_27B_LAYERS)?,
                "sliding_window": window.unwrap_or(GEMMA2_WINDOW),
            })
        }
        Family::Gemma3 => {
            let pattern = match window {
                Some(_) => GEMMA3_PATTERN,
                None => 1,
            };
            json!({
                "attention_bias": false,
                "attn_logit_softcapping": keys.number(".attn_logit_softcapping")?,
                "final_logit_softcapping": keys.number(".final_logit_softcapping")?,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh",
                "layer_types": layer_types(keys, model, pattern)?,
                "query_pre_attn_scalar": query_scalar(keys, model, GEMMA3_27B_LAYERS)?,
                "rope_local_base_freq": rope.local_theta,
                "rope_parameters": {
                    "full_attention": rope.parameters(rope.theta, true),
                    "sliding_attention": rope.parameters(rope.local_theta, false),
                },
                "sliding_window": window,
            })
        }
        Family::Phi3 => {
            let original = match keys.count(".rope.scaling.original_context_length")? {
                Some(original) => original,
                None => keys.needed_count(".context_length")?,
            };
            json!({
                "embd_pdrop": 0.0,
                "original_max_position_embeddings": original,
                "partial_rotary_factor": rope.partial_rotary_factor,
                "resid_pdrop": 0.0,
                "sliding_window": window,
            })
        }
        Family::SmolLm3 => {
            let rotates = |layer: usize| u8::from(!(layer + 1).is_multiple_of(SMOLLM3_NO_ROPE));
            let layers: Vec<u8> = (0..model.n_layers).map(rotates).collect();
            json!({
                "attention_bias": model.attention_bias,
                "mlp_bias": model.mlp_bias,
                "no_rope_layer_interval": SMOLLM3_NO_ROPE,
                "no_rope_layers": layers,
                "use_sliding_window": false,
            })
        }
        Family::Olmo2 => json!({ "attention_bias": model.attention_bias }),
    })
}

/// Whether each layer slides, by the file's pattern or else that of the family.
fn layer_types(keys: &Keys, model: &Model, every: usize) -> Result<Vec<&'static str>, GgufError> {
    let key = ".attention.sliding_window_pattern";
    let name = |slides: bool| match slides {
        true => "sliding_attention",
        false => "full_attention",
    };
    let by_period = |every: usize| {
        let layers = 1..=model.n_layers;
        layers
            .map(|layer| name(!layer.is_multiple_of(every)))
            .collect()
    };
    match keys.get(key) {
        None => Ok(by_period(every)),
        Some(value) if value.as_array().is_some() => {
            let slides = keys.numbers(key)?.unwrap_or_default();
            match slides.len() == model.n_layers {
                true => Ok(slides.iter().map(|&slides| name(slides != 0.0)).collect()),
                false => Err(keys.wrong(key, format!("{} flags, one per layer", model.n_layers))),
            }
        }
        Some(_) => keys.needed_count(key).map(by_period),
    }
}

/// What queries are divided by the square root of.
fn query_scalar(keys: &Keys, model: &Model, largest: usize) -> Result<Value, GgufError> {
    let key = ".attention.scale";
    Ok(match keys.number(key)? {
        Some(scale) if scale > 0.0 => {
            let scalar = 1.0 / (scale * scale);
            // It is a whole number in every model; the file has it in f32.
            match (scalar - scalar.round()).abs() < 1e-3 * scalar {
                true => json!(scalar.round() as u64),
                false => json!(scalar),
            }
        }
        Some(_) => return Err(keys.wrong(key, "a number above 0")),
        None if model.n_layers == largest => json!(model.hidden_size / model.n_heads),
        None => json!(model.head_dim),
    })
}

/// The `generation_config.json` of a model that ends with any of `eos`.
pub(super) fn generation_config(keys: &Keys, eos: &[u32]) -> Result<Value, GgufError> {
    let mut json = Map::new();
    let mut insert = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            json.insert(key.to_owned(), value);
        }
    };
    let token = |key| Ok::<_, GgufError>(keys.token(key)?.map(|token| json!(token)));
    insert("bos_token_id", token("tokenizer.ggml.bos_token_id")?);
    insert("pad_token_id", token("tokenizer.ggml.padding_token_id")?);
    insert(
        "eos_token_id",
        match eos {
            [] => None,
            [one] => Some(json!(one)),
            several => Some(json!(several)),
        },
    );
    Ok(Value::Object(json))
}
