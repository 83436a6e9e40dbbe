//! The projections of one layer's attention: queries always, keys and values where the plan has the
//! layer store them, fusion weights where it has the layer blend.

use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::{Tensor, backend::Backend};

use super::projection::Projection;
use super::{Span, new_norm};
use crate::attention::{FusionForm, KvFusion, KvFusionConfig, KvResidual, attend, terms};
use crate::cache::KvStore;
use crate::config::FusedKvDecoderConfig;
use crate::kernels::operands::Term;
use crate::kernels::{rms_norm, same_for_all_tokens, swap_heads};
use crate::plan::{KvLayout, KvPart, KvSource};

/// Grouped-query attention with RoPE and a per-head RMSNorm on q and k, whose keys and values are
/// its own or other layers'.
///
/// Field names are those of Hugging Face's Qwen3. Which of the optional ones there are follows from
/// the decoder's plan; a pass panics where one has been taken away by hand.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    /// `[hidden_size, n_heads · head_dim]`.
    pub q_proj: Projection<B>,
    /// `[hidden_size, n_kv_heads · head_dim]`, in layers that store keys.
    pub k_proj: Option<Projection<B>>,
    /// `[hidden_size, n_kv_heads · head_dim]`, in layers that store values.
    pub v_proj: Option<Projection<B>>,
    /// `[n_heads · head_dim, hidden_size]`.
    pub o_proj: Projection<B>,
    /// Over head_dim, before RoPE.
    pub q_norm: RmsNorm<B>,
    /// Over head_dim, before RoPE, in layers that store keys.
    pub k_norm: Option<RmsNorm<B>>,
    /// Weights of the blend, in layers whose plan has any.
    pub kv_fusion: Option<KvFusion<B>>,
    /// α of YOCO++, in storing layers that add a lower layer's keys or values.
    pub kv_residual: Option<KvResidual<B>>,
    head_dim: usize,
}

impl<B: Backend> Attention<B> {
    pub(super) fn new(
        config: &FusedKvDecoderConfig,
        layout: &KvLayout,
        index: usize,
        device: &B::Device,
    ) -> Self {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let kv_width = config.n_kv_heads * head_dim;
        let q_width = config.n_heads * head_dim;
        let projection = |shape| Projection::new(shape, &config.initializer(), device);
        let stores = |part| layout.stores(part, index);
        let layer = layout.layer(index);
        let fusion = KvFusionConfig {
            n_kv_heads: config.n_kv_heads,
            head_dim,
            key: layer.key.clone(),
            value: layer.value.clone(),
            init: config.fusion_init,
        };
        Self {
            q_proj: projection([hidden, q_width]),
            k_proj: stores(KvPart::Key).then(|| projection([hidden, kv_width])),
            v_proj: stores(KvPart::Value).then(|| projection([hidden, kv_width])),
            o_proj: projection([q_width, hidden]),
            q_norm: new_norm(head_dim, config, device),
            k_norm: stores(KvPart::Key).then(|| new_norm(head_dim, config, device)),
            kv_fusion: fusion.init(device),
            kv_residual: KvResidual::new(layer, config.fusion_init.residual, device),
            head_dim,
        }
    }

    /// Puts what layer `index` stores of the new positions: post-RoPE keys, values, and what it adds
    /// to them of a lower layer (YOCO++).
    ///
    /// # Shapes
    /// - x: `[batch, seq, hidden_size]`, normalised
    pub(super) fn put(
        &self,
        layout: &KvLayout,
        index: usize,
        x: &Tensor<B, 3>,
        span: &Span<B>,
        store: &mut impl KvStore<B>,
    ) {
        for part in KvPart::BOTH {
            if !layout.stores(part, index) {
                continue;
            }
            let own = self.own(part, x.clone(), span);
            let own = match layout.layer(index).part(part).residual() {
                None => own,
                Some(lower) => {
                    let [_, _, seq, _] = own.dims();
                    let lower = store.get(part, lower).tail(seq).float(own.dtype());
                    let alpha = self.kv_residual.as_ref().and_then(|r| r.weight(part));
                    let alpha = alpha.expect("a layer that adds a lower one's has an α");
                    own + same_for_all_tokens(alpha.val().unsqueeze(), lower.dims()) * lower
                }
            };
            store.put(part, index, own);
        }
    }

    /// The layer's own post-RoPE keys, or its values, `[batch, n_kv_heads, seq, head_dim]`.
    fn own(&self, part: KvPart, x: Tensor<B, 3>, span: &Span<B>) -> Tensor<B, 4> {
        match part {
            KvPart::Key => {
                let (k_proj, k_norm) = (self.k_proj.as_ref(), self.k_norm.as_ref());
                let (k_proj, k_norm) = k_proj
                    .zip(k_norm)
                    .expect("a layer that stores keys has them");
                let key = rms_norm(k_norm, self.split_heads(k_proj.forward(x)));
                span.angles.rotate(key.swap_dims(1, 2))
            }
            KvPart::Value => {
                let v_proj = self
                    .v_proj
                    .as_ref()
                    .expect("a layer that stores values has them");
                swap_heads(self.split_heads(v_proj.forward(x)))
            }
        }
    }

    /// Attention of layer `index` over the keys and values that its plan says.
    ///
    /// # Shapes
    /// - x, output: `[batch, queries, hidden_size]`, x normalised
    pub(super) fn forward(
        &self,
        form: Option<FusionForm>,
        layout: &KvLayout,
        index: usize,
        x: Tensor<B, 3>,
        span: &Span<B>,
        store: &impl KvStore<B>,
    ) -> Tensor<B, 3> {
        let [batch, queries, _] = x.dims();
        let query = self.split_heads(self.q_proj.forward(x));
        let query = rms_norm(&self.q_norm, query);
        let query = span.angles.rotate(query.swap_dims(1, 2));
        let [keys, values] = KvPart::BOTH.map(|part| self.terms(layout, index, part, store));
        let output = attend(form, query, keys, values, &span.visibility);
        let [_, n_heads, _, head_dim] = output.dims();
        let output = swap_heads(output).reshape([batch, queries, n_heads * head_dim]);
        self.o_proj.forward(output)
    }

    /// What layer `index` reads of stored keys, or of stored values, with the weights it has for it.
    fn terms(
        &self,
        layout: &KvLayout,
        index: usize,
        part: KvPart,
        store: &impl KvStore<B>,
    ) -> Vec<Term<B>> {
        let sources = layout.sources(part, index).iter();
        let sources = sources.map(|&source| store.get(part, source)).collect();
        let weights = match layout.layer(index).part(part) {
            KvSource::Own { .. } | KvSource::AsIs(_) => None,
            KvSource::Blend { .. } => {
                let weights = self.kv_fusion.as_ref().and_then(|f| f.weights(part));
                Some(weights.expect("a layer that blends has weights"))
            }
        };
        terms(sources, weights)
    }

    /// `[batch, seq, heads · head_dim]` to `[batch, seq, heads, head_dim]`.
    fn split_heads(&self, x: Tensor<B, 3>) -> Tensor<B, 4> {
        let [batch, seq, width] = x.dims();
        x.reshape([batch, seq, width / self.head_dim, self.head_dim])
    }
}
