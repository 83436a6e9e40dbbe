//! Gemma 4's text model: norms on both sides, of queries and keys and (without a weight) of values,
//! which multiply with their weight as it is; wider heads and partial RoPE in layers with full
//! attention; upper layers that read lower ones' keys and values; an embedding for every layer.

use super::layers::LayerKeys;
use super::rope::RopeKeys;
use super::windows::Windows;
use super::{Format, gemma3};
use crate::config::{BlockConfig, Family};

pub(super) const FORMAT: Format = Format {
    family: Family::Gemma4Text,
    model_type: "gemma4_text",
    architecture: "Gemma4ForCausalLM",
    block: || BlockConfig {
        norm_unit_offset: false,
        value_norm: true,
        layer_scalar: true,
        attention_scale: Some(1.0),
        ..(gemma3::FORMAT.block)()
    },
    windows: Windows::AllButEvery {
        nth: 6,
        key: None,
        default: 512,
        last_is_full: true,
    },
    rope: RopeKeys::ByLayerType {
        sliding_theta: 1e4,
        rotated: Some(0.25),
    },
    query_scalar: None,
    layers: Some(LayerKeys {
        global_head_dim: 512,
        input_size: 256,
    }),
    ..gemma3::FORMAT
};

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::read;
    use crate::checkpoint::error::CheckpointError;
    use crate::checkpoint::keys::Keys;
    use crate::config::{FusedKvDecoderConfig, RopeScaling};
    use crate::plan::KvPlan;

    /// What a configuration of eight layers says that `changes` part of.
    fn read_with(changes: Value) -> Result<FusedKvDecoderConfig, CheckpointError> {
        let mut map = json!({
            "model_type": "gemma4_text",
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        });
        let map = map.as_object_mut().unwrap();
        map.extend(changes.as_object().unwrap().clone());
        read(&Keys::of("config.json".into(), map.clone()))
    }

    /// As the defaults of transformers' `Gemma4TextConfig` have it.
    #[test]
    fn what_files_leave_out() {
        let config = read_with(json!({})).unwrap();
        assert_eq!((config.head_dim, config.max_positions), (256, 131_072));
        assert!(config.tie_embeddings);
        assert_eq!(config.plan, KvPlan::Standard);
        let block = &config.block;
        assert_eq!(block.layer_input_size, Some(256));
        assert_eq!(
            (block.logit_softcap, block.embedding_scale),
            (None, Some(4.0))
        );
        for index in 0..8 {
            let layer = config.layer(index);
            // Every sixth, and the last whatever files say.
            let full = index == 5 || index == 7;
            assert_eq!(layer.kind.window, (!full).then_some(512), "{index}");
            assert_eq!(layer.kv.head_dim, if full { 512 } else { 256 });
            assert_eq!((layer.kv.n_kv_heads, layer.ffn_size), (2, 20));
            assert!(!layer.kind.k_eq_v);
            let rope = layer.kind.rope.unwrap();
            let (theta, scaling) = match full {
                true => (
                    1e6,
                    RopeScaling::Proportional {
                        rotated: 0.25,
                        factor: 1.0,
                    },
                ),
                false => (1e4, RopeScaling::Default),
            };
            assert_eq!((rope.theta, rope.scaling), (theta, scaling));
        }
        let sliding = vec!["sliding_attention"; 8];
        let forced = read_with(json!({ "layer_types": sliding })).unwrap();
        let windows = (0..8).map(|index| forced.layer(index).kind.window);
        assert_eq!(windows.flatten().count(), 7);
    }

    #[test]
    fn widths_are_those_of_a_layer_or_of_its_kind() {
        let global = json!({
            "global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": true
        });
        let config = read_with(global).unwrap();
        let heads = |config: &FusedKvDecoderConfig, index| {
            let layer = config.layer(index);
            (layer.kv.head_dim, layer.kv.n_kv_heads, layer.kind.k_eq_v)
        };
        assert_eq!(heads(&config, 5), (64, 1, true));
        assert_eq!(heads(&config, 4), (256, 2, false));
        // Heads of their own are of layers with one projection alone.
        let apart = read_with(json!({ "num_global_key_value_heads": 1 })).unwrap();
        assert_eq!(heads(&apart, 5), (512, 2, false));
        // What is said of layers replaces what is said of kinds.
        let layers = json!({
            "global_head_dim": 64, "per_layer_config": { "2": { "head_dim": 8 } }
        });
        let config = read_with(layers).unwrap();
        assert_eq!((heads(&config, 2).0, heads(&config, 5).0), (8, 256));
        let shared = json!({ "num_kv_shared_layers": 2, "use_double_wide_mlp": true });
        let config = read_with(shared).unwrap();
        assert_eq!(config.plan, KvPlan::Yoco { storage_layers: 6 });
        assert_eq!(config.block.ffn_sizes, [20, 20, 20, 20, 20, 20, 40, 40]);
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        for (changes, named, expected) in [
            (
                json!({ "enable_moe_block": true }),
                "enable_moe_block",
                "false",
            ),
            (
                json!({ "use_bidirectional_attention": "all" }),
                "use_bidirectional_attention",
                "false",
            ),
            (
                json!({ "vocab_size_per_layer_input": 49 }),
                "vocab_size_per_layer_input",
                "50",
            ),
            (
                json!({ "num_kv_shared_layers": 8 }),
                "num_kv_shared_layers",
                "fewer",
            ),
            (
                json!({ "per_layer_config": { "8": { "head_dim": 8 } } }),
                "per_layer_config.8",
                "below 8",
            ),
            (
                json!({ "per_layer_config": { "1": { "skip": ["mlp"] } } }),
                "per_layer_config.1.skip",
                "num_key_value_heads",
            ),
            (
                json!({ "per_layer_config": { "1": { "head_dim": "wide" } } }),
                "per_layer_config.1.head_dim",
                "a whole number",
            ),
            (
                json!({ "num_hidden_layers": 1_u64 << 40 }),
                "num_hidden_layers",
                "at most",
            ),
        ] {
            let error = read_with(changes.clone()).unwrap_err();
            let CheckpointError::Setting {
                key,
                expected: known,
                ..
            } = &error
            else {
                panic!("{error}");
            };
            assert_eq!(key, named, "{changes}");
            assert!(known.contains(expected), "{error}");
        }
    }
}
