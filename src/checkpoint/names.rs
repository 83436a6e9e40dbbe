//! The tensors of a checkpoint: their names and shapes, and the parameters they are.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::config::FusedKvDecoderConfig;
use crate::decoder::FusedKvDecoder;
use crate::plan::{KvLayout, LayerKv};

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// A tensor as files have it: Linear weights are [out, in].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorSpec {
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
pub(super) fn layer_tensors(
    config: &FusedKvDecoderConfig,
    layer: &LayerKv,
    index: usize,
) -> Vec<TensorSpec> {
    let (hidden, ffn, head_dim) = (config.hidden_size, config.ffn_size, config.head_dim);
    // A configuration may say anything.
    let q = config.n_heads.saturating_mul(head_dim);
    let kv = config.n_kv_heads.saturating_mul(head_dim);
    let named = |name: &str| format!("model.layers.{index}.{name}");
    let weight = |name: &str, shape: &[usize]| TensorSpec::new(named(name) + ".weight", shape);
    let stores = matches!(layer, LayerKv::Store { .. });
    let mut tensors = vec![weight("input_layernorm", &[hidden])];
    tensors.push(weight("self_attn.q_proj", &[q, hidden]));
    if stores {
        tensors.push(weight("self_attn.k_proj", &[kv, hidden]));
        tensors.push(weight("self_attn.v_proj", &[kv, hidden]));
    }
    tensors.push(weight("self_attn.o_proj", &[hidden, q]));
    tensors.push(weight("self_attn.q_norm", &[head_dim]));
    if stores {
        tensors.push(weight("self_attn.k_norm", &[head_dim]));
    }
    match layer {
        LayerKv::Store { residual: None } => {}
        LayerKv::Store { residual: Some(_) } => {
            for name in ["key", "value"] {
                let name = named(&format!("self_attn.kv_residual.{name}_weight"));
                tensors.push(TensorSpec::new(name, [1]));
            }
        }
        LayerKv::Reuse { key, value } => {
            for (name, mix, channels) in [("key", key, head_dim / 2), ("value", value, head_dim)] {
                if let Some(shape) = mix.weights_shape(config.n_kv_heads, channels) {
                    let name = named(&format!("self_attn.kv_fusion.{name}_weight"));
                    tensors.push(TensorSpec::new(name, shape));
                }
            }
        }
    }
    tensors.extend([
        weight("post_attention_layernorm", &[hidden]),
        weight("mlp.gate_proj", &[ffn, hidden]),
        weight("mlp.up_proj", &[ffn, hidden]),
        weight("mlp.down_proj", &[hidden, ffn]),
    ]);
    tensors
}

/// All tensors of a decoder, in the order of its modules.
pub(super) fn tensors(config: &FusedKvDecoderConfig, layout: &KvLayout) -> Vec<TensorSpec> {
    let embedding = [config.vocab_size, config.hidden_size];
    let mut tensors = vec![TensorSpec::new(EMBEDDING.to_owned(), embedding)];
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
pub(super) struct ModulePath(Vec<(String, bool)>);

impl ModulePath {
    pub fn enter(&mut self, name: &str, container: &str) {
        self.0.push((name.to_owned(), container == "Struct:Linear"));
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

    /// Whether the parameter is a Linear weight: [in, out] in Burn, [out, in] in files.
    pub fn is_linear(&self) -> bool {
        matches!(self.0.last(), Some((_, true)))
    }
}

/// Calls a function for every parameter of a decoder, in order.
pub(super) fn visit<B: Backend>(model: &FusedKvDecoder<B>, visitor: &mut impl ParameterVisitor<B>) {
    model.visit(&mut Named {
        path: ModulePath::default(),
        visitor,
    });
}

/// What is done with a parameter.
pub(super) trait ParameterVisitor<B: Backend> {
    fn parameter<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<B, D>>);
}

struct Named<'v, V> {
    path: ModulePath,
    visitor: &'v mut V,
}

impl<B: Backend, V: ParameterVisitor<B>> ModuleVisitor<B> for Named<'_, V> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.visitor.parameter(&self.path, param);
    }
}
