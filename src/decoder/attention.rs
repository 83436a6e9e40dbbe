//! The projections of one layer's attention: queries always, keys and values if the plan has the
//! layer store them, fusion weights if it has the layer blend.

use burn::module::{Module, Param};
use burn::nn::{Linear, RmsNorm};
use burn::tensor::{Tensor, backend::Backend};

use super::attend::{FusionForm, Term, attend, same_for_all_tokens};
use super::fusion::{KvFusion, KvFusionConfig, KvResidual};
use super::kv::{KeyValue, Stored};
use super::{Span, new_linear, new_norm, project};
use crate::config::FusedKvDecoderConfig;
use crate::kernels::{rms_norm, swap_heads};
use crate::plan::LayerKv;

/// Grouped-query attention with RoPE and a per-head RMSNorm on q and k, whose keys and values are
/// its own or other layers'.
///
/// Field names are those of Hugging Face's Qwen3.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    /// `[hidden_size, n_heads · head_dim]`.
    pub q_proj: Linear<B>,
    /// `[hidden_size, n_kv_heads · head_dim]`, in layers that store.
    pub k_proj: Option<Linear<B>>,
    /// `[hidden_size, n_kv_heads · head_dim]`, in layers that store.
    pub v_proj: Option<Linear<B>>,
    /// `[n_heads · head_dim, hidden_size]`.
    pub o_proj: Linear<B>,
    /// Over head_dim, before RoPE.
    pub q_norm: RmsNorm<B>,
    /// Over head_dim, before RoPE, in layers that store.
    pub k_norm: Option<RmsNorm<B>>,
    /// Weights of the blend, in layers whose plan has any.
    pub kv_fusion: Option<KvFusion<B>>,
    /// α of YOCO++, in storing layers that add a lower layer's keys and values.
    pub kv_residual: Option<KvResidual<B>>,
    head_dim: usize,
}

impl<B: Backend> Attention<B> {
    pub(crate) fn new(config: &FusedKvDecoderConfig, layer: &LayerKv, device: &B::Device) -> Self {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let kv_width = config.n_kv_heads * head_dim;
        let q_width = config.n_heads * head_dim;
        let stores = matches!(layer, LayerKv::Store { .. });
        let own_kv = || stores.then(|| new_linear(hidden, kv_width, config, device));
        Self {
            q_proj: new_linear(hidden, q_width, config, device),
            k_proj: own_kv(),
            v_proj: own_kv(),
            o_proj: new_linear(q_width, hidden, config, device),
            q_norm: new_norm(head_dim, config, device),
            k_norm: stores.then(|| new_norm(head_dim, config, device)),
            kv_fusion: match layer {
                LayerKv::Store { .. } => None,
                LayerKv::Reuse { key, value } => KvFusionConfig {
                    n_kv_heads: config.n_kv_heads,
                    head_dim,
                    key: key.clone(),
                    value: value.clone(),
                    init: config.fusion_init,
                }
                .init(device),
            },
            kv_residual: match layer {
                LayerKv::Store { residual: Some(_) } => {
                    Some(KvResidual::new(config.fusion_init.residual, device))
                }
                _ => None,
            },
            head_dim,
        }
    }

    /// The layer's own post-RoPE keys and values, if it stores.
    ///
    /// # Shapes
    /// - x: `[batch, seq, hidden_size]`, normalised
    /// - output: twice `[batch, n_kv_heads, seq, head_dim]`
    pub(crate) fn own_kv(&self, x: Tensor<B, 3>, span: &Span<B>) -> Option<KeyValue<B>> {
        let (k_proj, v_proj) = (self.k_proj.as_ref()?, self.v_proj.as_ref()?);
        let k_norm = self.k_norm.as_ref()?;
        let key = rms_norm(k_norm, self.split_heads(project(k_proj, x.clone())));
        let value = self.split_heads(project(v_proj, x));
        Some(KeyValue {
            key: span.angles.rotate(key.swap_dims(1, 2)),
            value: swap_heads(value),
        })
    }

    /// `own` plus α times a lower layer's keys and values of the same positions (YOCO++).
    pub(crate) fn add_residual(&self, own: KeyValue<B>, lower: KeyValue<B>) -> KeyValue<B> {
        let Some(residual) = &self.kv_residual else {
            return own;
        };
        let dims = own.key.dims();
        let alpha =
            |weight: &Param<Tensor<B, 1>>| same_for_all_tokens(weight.val().unsqueeze(), dims);
        KeyValue {
            key: own.key + lower.key * alpha(&residual.key_weight),
            value: own.value + lower.value * alpha(&residual.value_weight),
        }
    }

    /// Attention over `keys` and `values`, which are weighted by this layer's fusion weights if it
    /// has any.
    ///
    /// # Shapes
    /// - x, output: `[batch, queries, hidden_size]`, x normalised
    /// - keys, values: each `[batch, n_kv_heads, keys, head_dim]`, in the plan's order of sources
    pub(crate) fn forward(
        &self,
        form: Option<FusionForm>,
        x: Tensor<B, 3>,
        keys: Vec<Stored<B>>,
        values: Vec<Stored<B>>,
        span: &Span<B>,
    ) -> Tensor<B, 3> {
        let [batch, queries, _] = x.dims();
        let query = self.split_heads(project(&self.q_proj, x));
        let query = rms_norm(&self.q_norm, query);
        let query = span.angles.rotate(query.swap_dims(1, 2));
        let fusion = self.kv_fusion.as_ref();
        let keys = terms(keys, fusion.and_then(KvFusion::key_weights));
        let values = terms(values, fusion.and_then(KvFusion::value_weights));
        let output = attend(form, query, keys, values, &span.visibility);
        let [_, n_heads, _, head_dim] = output.dims();
        let output = swap_heads(output).reshape([batch, queries, n_heads * head_dim]);
        project(&self.o_proj, output)
    }

    /// `[batch, seq, heads · head_dim]` to `[batch, seq, heads, head_dim]`.
    fn split_heads(&self, x: Tensor<B, 3>) -> Tensor<B, 4> {
        let [batch, seq, width] = x.dims();
        x.reshape([batch, seq, width / self.head_dim, self.head_dim])
    }
}

/// Each source with its weight, if there are any.
pub(super) fn terms<B: Backend>(
    sources: Vec<Stored<B>>,
    weights: Option<Vec<Tensor<B, 4>>>,
) -> Vec<Term<B>> {
    let mut weights = weights.into_iter().flatten();
    sources
        .into_iter()
        .map(|source| Term {
            source,
            weight: weights.next(),
        })
        .collect()
}
