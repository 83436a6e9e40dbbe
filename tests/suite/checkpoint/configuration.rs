//! Configurations that do not fit the weights, or the decoder.

use std::fs;

use fusedkv::checkpoint::CheckpointError;
use fusedkv::{ConfigError, PlanError};
use serde_json::json;

use super::broken::Checkpoint;
use super::load;

/// A configuration is believed no further than a header.
#[test]
fn a_configuration_that_lies_about_sizes() {
    for key in [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
    ] {
        for size in [1_u64 << 40, u64::MAX - 1] {
            let c = Checkpoint::fused();
            c.config(key, json!(size));
            let error = c.error(&[]);
            assert!(
                matches!(
                    error,
                    CheckpointError::Shape { .. }
                        | CheckpointError::MissingTensor { .. }
                        | CheckpointError::Setting { .. }
                ),
                "{key}: {error}"
            );
        }
    }
}

#[test]
fn another_configuration() {
    let fused = || Checkpoint::fused();
    let c = fused();
    let error = c
        .config("intermediate_size", json!(11))
        .error(&["[10, 12]", "[11, 12]"]);
    assert!(matches!(error, CheckpointError::Shape { .. }), "{error}");
    let c = fused();
    let error = c
        .config("num_hidden_layers", json!(5))
        .error(&["model.layers.4"]);
    assert!(
        matches!(error, CheckpointError::MissingTensor { .. }),
        "{error}"
    );
    let c = fused();
    let error = c
        .config("num_hidden_layers", json!(3))
        .error(&["model.layers.3"]);
    assert!(
        matches!(error, CheckpointError::UnexpectedTensor { .. }),
        "{error}"
    );
    let c = fused();
    let plan = json!({ "method": "yoco", "storage_layers": 2 });
    let error = c.config("kv_plan", plan).error(&["kv_fusion"]);
    assert!(
        matches!(error, CheckpointError::UnexpectedTensor { .. }),
        "{error}"
    );
    let c = fused();
    let plan = json!({ "method": "fused_kv", "storage_layers": 4 });
    let error = c
        .config("kv_plan", plan)
        .error(&["config.json", "4 storage layers"]);
    assert!(
        matches!(
            error,
            CheckpointError::Config {
                source: ConfigError::Plan(PlanError::StorageLayers { .. }),
                ..
            }
        ),
        "{error}"
    );
    let c = fused();
    let error = c
        .config("num_key_value_heads", json!(3))
        .error(&["config.json", "n_kv_heads"]);
    assert!(matches!(error, CheckpointError::Config { .. }), "{error}");
}

#[test]
fn settings_this_decoder_does_not_have() {
    for (key, value, named, expected) in [
        ("mlp_bias", json!(true), "mlp_bias", "false"),
        (
            "hidden_act",
            json!("relu"),
            "hidden_act",
            "silu, swish, gelu",
        ),
        ("model_type", json!("gpt2"), "model_type", "\"fusedkv\""),
        (
            "base_model_type",
            json!("gpt2"),
            "base_model_type",
            "\"llama\"",
        ),
        ("model_type", json!(null), "model_type", "\"qwen3\""),
        ("model_type", json!("qwen3"), "kv_plan", "none"),
        ("kv_plan", json!(null), "kv_plan", "a plan"),
        (
            "kv_plan",
            json!({ "method": "magic" }),
            "kv_plan",
            "unknown method `magic`",
        ),
        (
            "kv_plan",
            json!({ "method": "yoco" }),
            "kv_plan",
            "storage_layers",
        ),
        (
            "quantization_config",
            json!({ "bits": 4 }),
            "quantization_config",
            "none",
        ),
        ("hidden_size", json!(null), "hidden_size", "a whole number"),
        ("hidden_size", json!(12.5), "hidden_size", "a whole number"),
        ("hidden_size", json!(-12), "hidden_size", "a whole number"),
        (
            "tie_word_embeddings",
            json!("yes"),
            "tie_word_embeddings",
            "true or false",
        ),
        ("rms_norm_eps", json!([]), "rms_norm_eps", "a number"),
        ("rope_theta", json!(5.0), "rope_theta", "10000"),
        (
            "rope_scaling",
            json!({ "rope_type": "yarn" }),
            "rope_scaling.factor",
            "a number",
        ),
        (
            "rope_scaling",
            json!({ "type": "magic" }),
            "rope_scaling.type",
            "\"llama3\", \"yarn\" or \"longrope\"",
        ),
        (
            "rope_parameters",
            json!({ "partial_rotary_factor": 0.5 }),
            "rope_parameters.partial_rotary_factor",
            "1",
        ),
        (
            "layer_types",
            json!(["sliding_attention"]),
            "layer_types",
            "full_attention",
        ),
        ("eos_token_id", json!("end"), "eos_token_id", "a token id"),
        (
            "max_position_embeddings",
            json!(1 << 30),
            "max_position_embeddings",
            "at most",
        ),
    ] {
        let c = Checkpoint::fused();
        c.config(key, value.clone());
        let error = c.error(&["config.json", expected]);
        assert!(
            matches!(&error, CheckpointError::Setting { key, .. } if key == named),
            "{key} {value}: {error}"
        );
    }
    let c = Checkpoint::fused();
    c.edit("config.json", |json| {
        json["use_sliding_window"] = json!(true);
        json["sliding_window"] = json!(16);
        json["max_window_layers"] = json!(2);
    });
    // The upper two layers have a window, and the lower two store.
    let error = c.error(&["config.json", "layer 2 read layers with its own window"]);
    assert!(
        matches!(
            error,
            CheckpointError::Config {
                source: ConfigError::Plan(PlanError::NoStoreOfKind { .. }),
                ..
            }
        ),
        "{error}"
    );
    // From the layer after the last on, nothing slides.
    c.config("max_window_layers", json!(4));
    assert!(load(&c.path("")).is_ok());
}

#[test]
fn files_that_are_no_json() {
    for text in ["{", "[1]", "", "{\"a\": 1} x", &"[".repeat(5000)] {
        for name in ["config.json", "generation_config.json"] {
            let c = Checkpoint::fused();
            fs::write(c.path(name), text).unwrap();
            let error = c.error(&[name]);
            assert!(matches!(error, CheckpointError::Json { .. }), "{error}");
        }
    }
}
