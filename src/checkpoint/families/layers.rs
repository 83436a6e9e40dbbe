//! How layers differ in more than their windows: in their widths, in whether values have a projection
//! of their own, in whose keys and values they read, in what they are given of the tokens.

use serde_json::{Map, Value, json};

use super::super::error::CheckpointError;
use super::super::keys::Keys;
use super::super::plan::{MAX_LAYERS, of_upper_layers, too_many_layers};
use super::Format;
use crate::config::{FusedKvDecoderConfig, LayerKind};
use crate::plan::KvPlan;

/// A family whose files have keys for that, and what they mean where they leave them out.
pub(super) struct LayerKeys {
    /// Channels per head of layers with full attention.
    pub global_head_dim: usize,
    /// Width of what layers are given of the tokens.
    pub input_size: usize,
}

/// Widths of single layers: of every family's where they are not what its own keys can say.
const OVERRIDES: &str = "per_layer_config";
const HEAD_DIM: &str = "head_dim";
const KV_HEADS: &str = "num_key_value_heads";
const FFN_SIZE: &str = "intermediate_size";

/// The upper layers that read the last keys and values of their own kind.
const SHARED: &str = "num_kv_shared_layers";

/// Adds to a decoder what files say of its layers, and, where they have no plan (`own`), the family's
/// own.
pub(super) fn read(
    keys: &Keys,
    format: &Format,
    own: bool,
    config: &mut FusedKvDecoderConfig,
) -> Result<(), CheckpointError> {
    let overrides = keys.object(OVERRIDES)?;
    if format.layers.is_none() && overrides.as_ref().is_none_or(Keys::is_empty) {
        return Ok(());
    }
    let n_layers = config.n_layers;
    if n_layers > MAX_LAYERS {
        return Err(too_many_layers(keys, "num_hidden_layers"));
    }
    let mut kinds: Vec<LayerKind> = (0..n_layers)
        .map(|index| config.layer(index).kind)
        .collect();
    let mut ffn_sizes = vec![config.ffn_size; n_layers];
    if let Some(told) = &format.layers {
        keys.only("enable_moe_block", &json!(false))?;
        config.block.layer_input_size = input_size(keys, told, config.vocab_size)?;
        let k_eq_v = keys.flag("attention_k_eq_v")?.unwrap_or(false);
        let head_dim = keys.optional_count("global_head_dim")?;
        let n_kv_heads = keys.optional_count("num_global_key_value_heads")?;
        for kind in kinds.iter_mut().filter(|kind| kind.window.is_none()) {
            kind.k_eq_v = k_eq_v;
            if overrides.is_none() {
                kind.head_dim = Some(head_dim.unwrap_or(told.global_head_dim));
                kind.n_kv_heads = n_kv_heads.filter(|_| k_eq_v).or(kind.n_kv_heads);
            }
        }
        let shared = keys.optional_count(SHARED)?.filter(|&shared| shared > 0);
        if let Some(shared) = shared {
            let (plan, storage_layers) = of_upper_layers(keys, SHARED, shared, n_layers)?;
            if own {
                config.plan = plan;
            }
            if keys.flag("use_double_wide_mlp")?.unwrap_or(false) {
                ffn_sizes[storage_layers..].fill(config.ffn_size.saturating_mul(2));
            }
        }
    }
    for (overrides, name) in overrides
        .iter()
        .flat_map(|o| o.names().map(move |name| (o, name)))
    {
        let index = name.parse().ok().filter(|&index: &usize| index < n_layers);
        let index = index.ok_or_else(|| {
            let expected = format!("the numbers of layers, below {n_layers}, alone");
            overrides.wrong(name, expected)
        })?;
        let Some(sizes) = overrides.object(name)? else {
            continue;
        };
        for key in sizes.names() {
            let size = || sizes.count(key);
            match key {
                HEAD_DIM => kinds[index].head_dim = Some(size()?),
                KV_HEADS => kinds[index].n_kv_heads = Some(size()?),
                FFN_SIZE => ffn_sizes[index] = size()?,
                _ => {
                    let known = [HEAD_DIM, KV_HEADS, FFN_SIZE].join(", ");
                    return Err(sizes.wrong(key, format!("none but {known}")));
                }
            }
        }
    }
    // The decoder's own sizes go without saying.
    for kind in &mut kinds {
        kind.head_dim = kind.head_dim.filter(|&size| size != config.head_dim);
        kind.n_kv_heads = kind.n_kv_heads.filter(|&size| size != config.n_kv_heads);
    }
    let differs = |kind: &LayerKind| has_widths(kind) || kind.k_eq_v;
    if kinds.iter().any(differs) {
        config.block.layers = kinds;
    }
    if ffn_sizes.iter().any(|&size| size != config.ffn_size) {
        config.block.ffn_sizes = ffn_sizes;
    }
    Ok(())
}

fn has_widths(kind: &LayerKind) -> bool {
    kind.head_dim.is_some() || kind.n_kv_heads.is_some()
}

/// Width of what layers are given of the tokens, which has a row for every token.
fn input_size(
    keys: &Keys,
    told: &LayerKeys,
    vocab_size: usize,
) -> Result<Option<usize>, CheckpointError> {
    let size = keys.optional_count("hidden_size_per_layer_input")?;
    let size = Some(size.unwrap_or(told.input_size)).filter(|&size| size > 0);
    let rows = "vocab_size_per_layer_input";
    match keys.optional_count(rows)? {
        Some(found) if found != vocab_size && size.is_some() => {
            Err(keys.wrong(rows, format!("{vocab_size}, as `vocab_size`")))
        }
        _ => Ok(size),
    }
}

/// Whether the family's own files can say a decoder's plan and its layers' widths.
pub(super) fn is_own(format: &Format, config: &FusedKvDecoderConfig) -> bool {
    let ffn_sizes = |times: &dyn Fn(usize) -> usize| {
        let is =
            |layer| config.layer(layer).ffn_size == config.ffn_size.saturating_mul(times(layer));
        (0..config.n_layers).all(is)
    };
    let alike = ffn_sizes(&|_| 1);
    match (&config.plan, &format.layers) {
        (KvPlan::Standard, None) => alike && !config.block.layers.iter().any(has_widths),
        (KvPlan::Standard, Some(_)) => alike,
        (&KvPlan::Yoco { storage_layers }, Some(_)) => {
            alike || ffn_sizes(&|layer| 1 + usize::from(layer >= storage_layers))
        }
        _ => false,
    }
}

/// Whether nothing reads a tensor that the family's own files may have: those of keys and values that
/// a layer does not have, because it reads others'.
pub(super) fn is_unread(format: &Format, config: &FusedKvDecoderConfig, tensor: &str) -> bool {
    let KvPlan::Yoco { storage_layers } = config.plan else {
        return false;
    };
    let place = tensor.strip_prefix("model.layers.");
    let Some((layer, module)) = place.and_then(|place| place.split_once(".self_attn.")) else {
        return false;
    };
    let of_values = |module: &str| {
        let modules = ["k_proj.", "v_proj.", "k_norm."];
        modules.iter().any(|known| module.starts_with(known))
    };
    let layer = layer.parse::<usize>();
    of_values(module)
        && layer.is_ok_and(|layer| (storage_layers..config.n_layers).contains(&layer))
        && is_own(format, config)
}

/// Writes what `config.json` says of layers beside their windows.
pub(super) fn write(json: &mut Value, config: &FusedKvDecoderConfig, format: &Format) {
    let own = is_own(format, config);
    let mut overrides = Map::new();
    for index in 0..config.n_layers {
        let spec = config.layer(index);
        let mut sizes = Map::new();
        for (key, size, usual) in [
            (HEAD_DIM, spec.kv.head_dim, config.head_dim),
            (KV_HEADS, spec.kv.n_kv_heads, config.n_kv_heads),
            (FFN_SIZE, spec.ffn_size, config.ffn_size),
        ] {
            if size != usual && !(own && key == FFN_SIZE) {
                sizes.insert(key.to_owned(), json!(size));
            }
        }
        if !sizes.is_empty() {
            overrides.insert(index.to_string(), Value::Object(sizes));
        }
    }
    if format.layers.is_none() && overrides.is_empty() {
        return;
    }
    json[OVERRIDES] = Value::Object(overrides);
    if format.layers.is_none() {
        return;
    }
    let shared = match config.plan {
        KvPlan::Yoco { storage_layers } if own => config.n_layers - storage_layers,
        _ => 0,
    };
    let mut specs = (0..config.n_layers).map(|index| config.layer(index));
    let full = specs.find(|spec| spec.kind.window.is_none());
    json["attention_k_eq_v"] = json!(full.as_ref().is_some_and(|spec| spec.kind.k_eq_v));
    json["enable_moe_block"] = json!(false);
    json["hidden_size_per_layer_input"] = json!(config.block.layer_input_size.unwrap_or(0));
    json["vocab_size_per_layer_input"] = json!(config.vocab_size);
    json[SHARED] = json!(shared);
    json["use_double_wide_mlp"] = json!(own && specs.any(|spec| spec.ffn_size > config.ffn_size));
    if let Some(full) = full {
        // For readers that do not know overrides.
        json["global_head_dim"] = json!(full.kv.head_dim);
        json["num_global_key_value_heads"] = json!(full.kv.n_kv_heads);
    }
}
