//! The parameters of a decoder, told by its configuration and plan alone: what files hold, and what
//! there is to count. Loading checks every one against the modules.

use crate::config::FusedKvDecoderConfig;
use crate::plan::{KvLayout, KvPart, LayerKv};

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
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
    let (hidden, ffn, head_dim) = (config.hidden_size, config.ffn_size, config.head_dim);
    // A configuration may say anything.
    let q = config.n_heads.saturating_mul(head_dim);
    let kv = config.n_kv_heads.saturating_mul(head_dim);
    let named = |name: &str| format!("model.layers.{index}.{name}");
    let weight = |name: &str, shape: &[usize]| TensorSpec::new(named(name) + ".weight", shape);
    let stores = |part| layer.part(part).is_stored_by(index);
    let mut tensors = vec![weight("input_layernorm", &[hidden])];
    tensors.push(weight("self_attn.q_proj", &[q, hidden]));
    if stores(KvPart::Key) {
        tensors.push(weight("self_attn.k_proj", &[kv, hidden]));
    }
    if stores(KvPart::Value) {
        tensors.push(weight("self_attn.v_proj", &[kv, hidden]));
    }
    tensors.push(weight("self_attn.o_proj", &[hidden, q]));
    tensors.push(weight("self_attn.q_norm", &[head_dim]));
    if stores(KvPart::Key) {
        tensors.push(weight("self_attn.k_norm", &[head_dim]));
    }
    let parts = [(KvPart::Key, "key"), (KvPart::Value, "value")];
    for (part, name) in parts {
        let shape = layer
            .part(part)
            .weights_shape(part, config.n_kv_heads, head_dim);
        if let Some(shape) = shape {
            let name = named(&format!("self_attn.kv_fusion.{name}_weight"));
            tensors.push(TensorSpec::new(name, shape));
        }
    }
    for (part, name) in parts {
        if layer.part(part).residual().is_some() {
            let name = named(&format!("self_attn.kv_residual.{name}_weight"));
            tensors.push(TensorSpec::new(name, [1]));
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
pub(crate) fn tensors(config: &FusedKvDecoderConfig, layout: &KvLayout) -> Vec<TensorSpec> {
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
