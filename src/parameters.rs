//! The parameters of a decoder, told by its configuration and plan alone: what files hold, and what
//! there is to count. Loading checks every one against the modules, by the name of its place among them.

use crate::config::{FusedKvDecoderConfig, NormPlacement};
use crate::plan::{KvLayout, KvPart, LayerKv};

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Of blocks whose layers are given something of the tokens themselves: embeddings for all layers side
/// by side, and the projection of a token's own.
pub(crate) const LAYER_EMBEDDING: &str = "model.embed_tokens_per_layer.weight";
pub(crate) const LAYER_INPUT: &str = "model.per_layer_model_projection.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// A tensor as files have it: projections are [out, in].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn new(name: String, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name,
            shape: shape.into(),
        }
    }

    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The tensors of a layer, in the order of its modules.
pub(crate) fn layer_tensors(
    config: &FusedKvDecoderConfig,
    layer: &LayerKv,
    index: usize,
) -> Vec<TensorSpec> {
    let (hidden, block, spec) = (config.hidden_size, &config.block, config.layer(index));
    let (q, kv, ffn) = (spec.q_width(), spec.kv.width(), spec.ffn_size);
    let mut tensors = Vec::new();
    let mut push = |name: String, shape: &[usize]| {
        let name = format!("model.layers.{index}.{name}");
        tensors.push(TensorSpec::new(name, shape));
    };
    macro_rules! projection {
        ($name:literal, $shape:expr, $bias:expr) => {{
            let [output, input]: [usize; 2] = $shape;
            push(format!("{}.weight", $name), &[output, input]);
            if $bias {
                push(format!("{}.bias", $name), &[output]);
            }
        }};
    }
    let stores = |part| layer.part(part).is_stored_by(index);
    if block.norm_placement.is_before() {
        push("input_layernorm.weight".to_owned(), &[hidden]);
    }
    projection!("self_attn.q_proj", [q, hidden], block.qkv_bias);
    let [k_proj, v_proj] = spec.kind.projects(KvPart::BOTH.map(stores));
    if k_proj {
        projection!("self_attn.k_proj", [kv, hidden], block.qkv_bias);
    }
    if v_proj {
        projection!("self_attn.v_proj", [kv, hidden], block.qkv_bias);
    }
    projection!("self_attn.o_proj", [hidden, q], block.output_bias);
    let [q_norm, k_norm] = spec.qk_norm_widths(block.qk_norm);
    if let Some(width) = q_norm {
        push("self_attn.q_norm.weight".to_owned(), &[width]);
    }
    if let (Some(width), true) = (k_norm, stores(KvPart::Key)) {
        push("self_attn.k_norm.weight".to_owned(), &[width]);
    }
    let parts = [(KvPart::Key, "key"), (KvPart::Value, "value")];
    for (part, name) in parts {
        if let Some(shape) = layer.part(part).weights_shape(part, &spec.kv) {
            push(format!("self_attn.kv_fusion.{name}_weight"), &shape);
        }
    }
    for (part, name) in parts {
        if layer.part(part).residual().is_some() {
            push(format!("self_attn.kv_residual.{name}_weight"), &[1]);
        }
    }
    push("post_attention_layernorm.weight".to_owned(), &[hidden]);
    if block.norm_placement == NormPlacement::Sandwich {
        push("pre_feedforward_layernorm.weight".to_owned(), &[hidden]);
    }
    projection!("mlp.gate_proj", [ffn, hidden], block.mlp_bias);
    projection!("mlp.up_proj", [ffn, hidden], block.mlp_bias);
    projection!("mlp.down_proj", [hidden, ffn], block.mlp_bias);
    if block.norm_placement.is_after() {
        push("post_feedforward_layernorm.weight".to_owned(), &[hidden]);
    }
    if let Some(width) = block.layer_input_size {
        projection!("per_layer_input_gate", [width, hidden], false);
        projection!("per_layer_projection", [hidden, width], false);
        push("post_per_layer_input_norm.weight".to_owned(), &[hidden]);
    }
    if block.layer_scalar {
        push("layer_scalar".to_owned(), &[1]);
    }
    tensors
}

/// All tensors of a decoder, in the order of its modules.
pub(crate) fn tensors(config: &FusedKvDecoderConfig, layout: &KvLayout) -> Vec<TensorSpec> {
    let embedding = [config.vocab_size, config.hidden_size];
    let mut tensors = vec![TensorSpec::new(EMBEDDING.to_owned(), embedding)];
    if let Some(width) = config.block.layer_input_size {
        // A configuration that is not checked may say anything.
        let widths = width.saturating_mul(config.n_layers);
        let mut push = |name: &str, shape: &[usize]| {
            tensors.push(TensorSpec::new(name.to_owned(), shape));
        };
        push(LAYER_EMBEDDING, &[config.vocab_size, widths]);
        push(LAYER_INPUT, &[widths, config.hidden_size]);
        push("model.per_layer_projection_norm.weight", &[width]);
    }
    for (index, layer) in layout.layers().iter().enumerate() {
        tensors.extend(layer_tensors(config, layer, index));
    }
    let norm = "model.norm.weight".to_owned();
    tensors.push(TensorSpec::new(norm, [config.hidden_size]));
    if !config.tie_embeddings {
        tensors.push(TensorSpec::new(HEAD.to_owned(), embedding));
    }
    tensors
}

/// Where a walk through a decoder's modules stands.
#[derive(Clone, Debug, Default)]
pub(crate) struct ModulePath(Vec<(String, bool)>);

impl ModulePath {
    pub fn enter(&mut self, name: &str, container: &str) {
        self.0
            .push((name.to_owned(), container == "Struct:Projection"));
    }

    pub fn exit(&mut self) {
        self.0.pop();
    }

    /// The name a checkpoint has for the parameter.
    pub fn tensor(&self) -> String {
        let mut names: Vec<&str> = self.0.iter().map(|(name, _)| &**name).collect();
        if let Some(name @ &mut "gamma") = names.last_mut() {
            *name = "weight";
        }
        if names.first() != Some(&"lm_head") {
            names.insert(0, "model");
        }
        names.join(".")
    }

    /// Whether the parameter is of a projection: [in, out] in memory, [out, in] in files.
    #[cfg(feature = "checkpoint")]
    pub fn is_linear(&self) -> bool {
        matches!(self.0.last(), Some((_, true)))
    }
}
