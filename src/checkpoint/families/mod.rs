//! Families of models: what their files call things, what they leave out, and which block that is.
//!
//! A family is a [`Format`], a table in a file of its own; reading and writing are the same for all.
//! What is written is read again before it counts, so that a family can only be asked to say what it
//! has keys for.

mod gemma2;
mod gemma3;
mod gemma4;
mod layers;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod rope;
mod smollm3;
mod windows;

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::CONFIG;
use super::error::CheckpointError;
use super::keys::Keys;
use crate::config::{Activation, BlockConfig, Family, FusedKvDecoderConfig, LayerSpec};
use crate::plan::KvPlan;
use layers::LayerKeys;
use rope::RopeKeys;
use windows::Windows;

/// What `config.json` calls a decoder whose plan is not one of its family's own files.
const FUSED: &str = "fusedkv";

/// More than any model reads: a larger number is a mistake.
const MAX_POSITIONS: usize = 1 << 24;

const DEFAULT_INIT_STD: f64 = 0.02;

/// A family's files.
struct Format {
    family: Family,
    model_type: &'static str,
    /// The class of Hugging Face's transformers.
    architecture: &'static str,
    /// What every model of the family has.
    block: fn() -> BlockConfig,
    qkv_bias: Told,
    output_bias: Told,
    mlp_bias: Told,
    /// The key of the activation, and its name in files that do not have it.
    activation: (&'static str, &'static str),
    windows: Windows,
    rope: RopeKeys,
    layers: Option<LayerKeys>,
    head_dim: HeadDim,
    /// Gemma's scale of scores, `query_pre_attn_scalar` to the power of −½: that number where files
    /// leave it out.
    query_scalar: Option<f64>,
    /// The soft caps of scores and of logits, with their defaults; none where the family has no key.
    attention_softcap: Option<Option<f64>>,
    logit_softcap: Option<Option<f64>>,
    /// Whether embeddings are multiplied with √hidden_size.
    scales_embedding: bool,
    /// Whether q, k and v are one tensor in its own files, and gate and up another.
    fused_projections: bool,
    defaults: Defaults,
}

/// A property that a family's files tell or not.
#[derive(Clone, Copy)]
enum Told {
    /// It is always so.
    Always(bool),
    /// By a key; without it, not.
    By(&'static str),
}

/// Channels per head where files do not say.
#[derive(Clone, Copy)]
enum HeadDim {
    /// hidden_size over heads.
    OfHidden,
    Of(usize),
}

/// Numbers that files may leave out.
struct Defaults {
    max_positions: usize,
    rope_theta: f64,
    rms_norm_eps: f64,
    tie_embeddings: bool,
}

/// Llama's block and keys, on which most families vary.
const LLAMA: Format = Format {
    family: Family::Llama,
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    block: || BlockConfig {
        qk_norm: crate::config::QkNorm::None,
        ..BlockConfig::default()
    },
    qkv_bias: Told::By("attention_bias"),
    output_bias: Told::By("attention_bias"),
    mlp_bias: Told::By("mlp_bias"),
    activation: ("hidden_act", "silu"),
    windows: Windows::None,
    rope: RopeKeys::Flat,
    layers: None,
    head_dim: HeadDim::OfHidden,
    query_scalar: None,
    attention_softcap: None,
    logit_softcap: None,
    scales_embedding: false,
    fused_projections: false,
    defaults: Defaults {
        max_positions: 2048,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        tie_embeddings: false,
    },
};

/// Every family's.
static FORMATS: [&Format; 10] = [
    &qwen3::FORMAT,
    &llama::FORMAT,
    &mistral::FORMAT,
    &qwen2::FORMAT,
    &smollm3::FORMAT,
    &olmo2::FORMAT,
    &phi3::FORMAT,
    &gemma2::FORMAT,
    &gemma3::FORMAT,
    &gemma4::FORMAT,
];

/// Activations by the names files have; the first of each is written.
const ACTIVATIONS: [(&str, Activation); 5] = [
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
];

impl Format {
    fn of(family: Family) -> &'static Self {
        let format = FORMATS.iter().find(|format| format.family == family);
        format.expect("every family stands in the table")
    }
}

/// Whether files of a decoder have several projections in one tensor.
pub(super) fn fuses_projections(config: &FusedKvDecoderConfig) -> bool {
    let format = Format::of(config.block.family);
    format.fused_projections && layers::is_own(format, config)
}

/// Whether a tensor that a decoder does not have may stand in its family's own files.
pub(super) fn is_unread(config: &FusedKvDecoderConfig, tensor: &str) -> bool {
    // RoPE's frequencies, which older files have beside the numbers they come from.
    tensor.ends_with(".rotary_emb.inv_freq")
        || layers::is_unread(Format::of(config.block.family), config, tensor)
}

/// What `config.json` says.
pub(super) fn read(keys: &Keys) -> Result<FusedKvDecoderConfig, CheckpointError> {
    let (format, plan) = format_and_plan(keys)?;
    keys.absent("quantization_config")?;
    // "vision" is of images alone.
    if keys.get("use_bidirectional_attention") != Some(&json!("vision")) {
        keys.only("use_bidirectional_attention", &json!(false))?;
    }
    let defaults = &format.defaults;
    let n_heads = keys.count("num_attention_heads")?;
    let hidden_size = keys.count("hidden_size")?;
    let n_layers = keys.count("num_hidden_layers")?;
    let head_dim = match (keys.optional_count("head_dim")?, format.head_dim) {
        (Some(head_dim), _) | (None, HeadDim::Of(head_dim)) => head_dim,
        (None, HeadDim::OfHidden) => hidden_size / n_heads.max(1),
    };
    let positions = keys.optional_count("max_position_embeddings")?;
    let positions = positions.unwrap_or(defaults.max_positions);
    if positions > MAX_POSITIONS {
        let expected = format!("at most {MAX_POSITIONS}");
        return Err(keys.wrong("max_position_embeddings", expected));
    }
    let mut block = (format.block)();
    block.family = format.family;
    block.qkv_bias = told(keys, format.qkv_bias, "attention_bias")?;
    block.output_bias = told(keys, format.output_bias, "attention_bias")?;
    block.mlp_bias = told(keys, format.mlp_bias, "mlp_bias")?;
    block.activation = activation(keys, format)?;
    block.embedding_scale = format.scales_embedding.then(|| (hidden_size as f64).sqrt());
    if let Some(default) = format.query_scalar {
        let scalar = keys.number("query_pre_attn_scalar")?.unwrap_or(default);
        block.attention_scale = Some(scalar.sqrt().recip());
    }
    block.attention_softcap = softcap(keys, "attn_logit_softcapping", format.attention_softcap)?;
    block.logit_softcap = softcap(keys, "final_logit_softcapping", format.logit_softcap)?;
    let ropes = rope::read(keys, format, head_dim, positions)?;
    let max_positions = ropes.reach(positions);
    block.layers = format.windows.read(keys, n_layers, &ropes)?;
    let theta = ropes.full.theta;
    block.rotary_dim = ropes.full.rotary_dim;
    block.rope_scaling = ropes.full.scaling;
    let tie = keys.flag("tie_word_embeddings")?;
    let eps = keys.number("rms_norm_eps")?;
    let init_std = keys.number("initializer_range")?;
    let vocab_size = keys.count("vocab_size")?;
    let own = plan.is_none();
    let mut config = FusedKvDecoderConfig::new(vocab_size, plan.unwrap_or(KvPlan::Standard))
        .with_hidden_size(hidden_size)
        .with_n_layers(n_layers)
        .with_n_heads(n_heads)
        .with_n_kv_heads(
            keys.optional_count("num_key_value_heads")?
                .unwrap_or(n_heads),
        )
        .with_head_dim(head_dim)
        .with_ffn_size(keys.count("intermediate_size")?)
        .with_rope_theta(theta)
        .with_rms_norm_eps(eps.unwrap_or(defaults.rms_norm_eps))
        .with_tie_embeddings(tie.unwrap_or(defaults.tie_embeddings))
        .with_max_positions(max_positions)
        .with_init_std(init_std.unwrap_or(DEFAULT_INIT_STD))
        .with_block(block);
    layers::read(keys, format, own, &mut config)?;
    Ok(config)
}

/// The `config.json` of a decoder, but for what is not of the decoder.
///
/// # Errors
/// [`CheckpointError::Family`] if reading it gives another decoder.
pub(super) fn write(config: &FusedKvDecoderConfig) -> Result<Value, CheckpointError> {
    let block = &config.block;
    let format = Format::of(block.family);
    let own = layers::is_own(format, config);
    let mut json = json!({
        "architectures": [if own { format.architecture } else { "FusedKvForCausalLM" }],
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_positions,
        "model_type": if own { format.model_type } else { FUSED },
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        // Without it some families have one of their own, which may lie outside the vocabulary.
        "pad_token_id": null,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    if !own {
        json["kv_plan"] = json!(config.plan);
        if block.family != Family::default() {
            json["base_model_type"] = json!(format.model_type);
        }
    }
    for (told, value) in [
        (format.qkv_bias, block.qkv_bias),
        (format.mlp_bias, block.mlp_bias),
    ] {
        if let Told::By(key) = told {
            json[key] = json!(value);
        }
    }
    let name = ACTIVATIONS
        .iter()
        .find(|(_, known)| *known == block.activation);
    if let Some((name, _)) = name {
        json[format.activation.0] = json!(name);
    }
    if let (Some(_), Some(scale)) = (format.query_scalar, block.attention_scale) {
        let scalar = scale.powi(-2);
        // transformers takes whole numbers alone.
        json["query_pre_attn_scalar"] = match (scalar.round(), (scalar - scalar.round()).abs()) {
            (whole, off) if off < 1e-9 * whole => json!(whole as u64),
            _ => json!(scalar),
        };
    }
    if format.attention_softcap.is_some() {
        json["attn_logit_softcapping"] = json!(block.attention_softcap);
    }
    if format.logit_softcap.is_some() {
        json["final_logit_softcapping"] = json!(block.logit_softcap);
    }
    rope::write(&mut json, config, format);
    format.windows.write(&mut json, config);
    layers::write(&mut json, config, format);
    check_written(&json, config)?;
    Ok(json)
}

/// That a `config.json` says what the decoder is.
fn check_written(json: &Value, config: &FusedKvDecoderConfig) -> Result<(), CheckpointError> {
    let map = json.as_object().cloned().unwrap_or_else(Map::new);
    let read = read(&Keys::of(PathBuf::from(CONFIG), map))?;
    let (said, is) = (&read.block, &config.block);
    let close = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-12 * b.abs(),
        (a, b) => a == b,
    };
    fn layers<T>(config: &FusedKvDecoderConfig, of: fn(LayerSpec) -> T) -> Vec<T> {
        let layers = (0..config.n_layers).map(|layer| of(config.layer(layer)));
        layers.collect()
    }
    let kinds = |config| layers(config, |layer| layer.kind);
    let ffn_sizes = |config| layers(config, |layer| layer.ffn_size);
    for (field, same) in [
        ("norm_placement", said.norm_placement == is.norm_placement),
        (
            "norm_unit_offset",
            said.norm_unit_offset == is.norm_unit_offset,
        ),
        ("qk_norm", said.qk_norm == is.qk_norm),
        ("qkv_bias", said.qkv_bias == is.qkv_bias),
        ("output_bias", said.output_bias == is.output_bias),
        ("mlp_bias", said.mlp_bias == is.mlp_bias),
        ("activation", said.activation == is.activation),
        (
            "embedding_scale",
            close(said.embedding_scale, is.embedding_scale),
        ),
        (
            "attention_scale",
            close(said.attention_scale, is.attention_scale),
        ),
        (
            "attention_softcap",
            close(said.attention_softcap, is.attention_softcap),
        ),
        ("logit_softcap", close(said.logit_softcap, is.logit_softcap)),
        (
            "layers, rope_scaling or rotary_dim",
            kinds(&read) == kinds(config),
        ),
        ("ffn_sizes", ffn_sizes(&read) == ffn_sizes(config)),
        ("value_norm", said.value_norm == is.value_norm),
        (
            "layer_input_size",
            said.layer_input_size == is.layer_input_size,
        ),
        ("layer_scalar", said.layer_scalar == is.layer_scalar),
    ] {
        if !same {
            return Err(CheckpointError::Family {
                family: Format::of(is.family).model_type,
                field,
            });
        }
    }
    Ok(())
}

/// A file's family, and its plan; none where that is the family's own.
fn format_and_plan(keys: &Keys) -> Result<(&'static Format, Option<KvPlan>), CheckpointError> {
    let plan = keys.get("kv_plan").map(|value| {
        serde_json::from_value::<KvPlan>(value.clone())
            .map_err(|error| keys.wrong("kv_plan", format!("a plan ({error})")))
    });
    let plan = plan.transpose()?;
    let known = || {
        let names = FORMATS
            .iter()
            .map(|format| format!("\"{}\"", format.model_type));
        names.collect::<Vec<_>>().join(", ")
    };
    let format = |key: &str, name: &str| {
        let format = FORMATS.iter().find(|format| format.model_type == name);
        format
            .copied()
            .ok_or_else(|| keys.wrong(key, format!("\"{FUSED}\" or one of {}", known())))
    };
    let model_type = keys.get("model_type").and_then(Value::as_str);
    match (model_type.unwrap_or_default(), plan) {
        (FUSED, Some(plan)) => {
            let base = keys.text("base_model_type")?;
            let base = base.unwrap_or_else(|| Format::of(Family::default()).model_type.to_owned());
            Ok((format("base_model_type", &base)?, Some(plan)))
        }
        (FUSED, None) => Err(keys.wrong("kv_plan", "a plan, for the model_type \"fusedkv\"")),
        (name, None | Some(KvPlan::Standard)) => Ok((format("model_type", name)?, None)),
        (name, Some(_)) => {
            format("model_type", name)?;
            Err(keys.wrong("kv_plan", format!("none, for the model_type \"{name}\"")))
        }
    }
}

/// A property; one that the family has no key for, but another has, is refused where it is asked for.
fn told(keys: &Keys, told: Told, others: &str) -> Result<bool, CheckpointError> {
    match told {
        Told::By(key) => Ok(keys.flag(key)?.unwrap_or(false)),
        Told::Always(value) => {
            if !value {
                keys.only(others, &json!(false))?;
            }
            Ok(value)
        }
    }
}

fn activation(keys: &Keys, format: &Format) -> Result<Activation, CheckpointError> {
    let (key, default) = format.activation;
    let find = |name: &str| {
        let known = ACTIVATIONS.iter().find(|(known, _)| *known == name);
        known.map(|(_, activation)| *activation)
    };
    let names = ACTIVATIONS.map(|(name, _)| name).join(", ");
    let read = |value: &Value| find(value.as_str()?);
    let activation = keys.optional(key, read, &format!("one of {names}"))?;
    let activation = activation.or_else(|| find(default));
    Ok(activation.expect("a family's default is known"))
}

/// A soft cap: null is none, and a file without the key has the family's default.
fn softcap(
    keys: &Keys,
    key: &str,
    default: Option<Option<f64>>,
) -> Result<Option<f64>, CheckpointError> {
    let Some(default) = default else {
        return Ok(None);
    };
    match keys.is_null(key) {
        true => Ok(None),
        false => Ok(keys.number(key)?.or(default)),
    }
}
