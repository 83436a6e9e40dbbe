//! The projections of one layer's attention: queries always, keys and values where the plan has the
//! layer store them, fusion weights where it has the layer blend.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use super::projection::{Projection, projections};
use super::{Norm, Span, last};
use crate::attention::{FusionForm, KvFusion, KvFusionConfig, KvResidual, attend, terms};
use crate::cache::KvStore;
use crate::config::{FusedKvDecoderConfig, QkNorm};
use crate::kernels::operands::Term;
use crate::kernels::{rms_norm, same_for_all_tokens, swap_heads};
use crate::plan::{KvLayout, KvPart, KvSource, Reach};

/// Grouped-query attention whose keys and values are its own or other layers'.
///
/// Field names are Hugging Face's. Which of the optional ones there are follows from the decoder's
/// block and plan; a pass panics where one of the plan's has been taken away by hand.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    /// `[hidden_size, n_heads · head_dim]`.
    pub q_proj: Projection<B>,
    /// `[hidden_size, n_kv_heads · head_dim]`, in layers that store keys, or values without a
    /// projection of their own.
    pub k_proj: Option<Projection<B>>,
    /// `[hidden_size, n_kv_heads · head_dim]`, in layers that store values; none where they are what
    /// `k_proj` gives.
    pub v_proj: Option<Projection<B>>,
    /// `[n_heads · head_dim, hidden_size]`.
    pub o_proj: Projection<B>,
    /// Over head_dim or all heads, before RoPE, in blocks that have it.
    pub q_norm: Option<Norm<B>>,
    /// The same of keys, in layers that store them.
    pub k_norm: Option<Norm<B>>,
    /// Weights of the blend, in layers whose plan has any.
    pub kv_fusion: Option<KvFusion<B>>,
    /// α of YOCO++, in storing layers that add a lower layer's keys or values.
    pub kv_residual: Option<KvResidual<B>>,
    head_dim: usize,
    #[module(skip)]
    qk_norm: QkNorm,
    /// ε of the RMSNorm of values, in blocks that have it.
    #[module(skip)]
    value_norm: Option<f64>,
    /// What queries are multiplied with beyond 1/√head_dim.
    query_scale: Option<f64>,
    softcap: Option<f64>,
}

projections!(Attention: q_proj, o_proj; k_proj, v_proj);

impl<B: Backend> Attention<B> {
    pub(super) fn new(
        config: &FusedKvDecoderConfig,
        layout: &KvLayout,
        index: usize,
        device: &B::Device,
    ) -> Self {
        let (block, spec, hidden) = (&config.block, config.layer(index), config.hidden_size);
        let (q_width, kv_width) = (spec.q_width(), spec.kv.width());
        let projection = |shape, bias| Projection::new(shape, bias, &config.initializer(), device);
        let norm = |width: Option<usize>| width.map(|width| Norm::new(width, config, device));
        let [q_norm, k_norm] = spec.qk_norm_widths(block.qk_norm);
        let stores = |part| layout.stores(part, index);
        let [k_proj, v_proj] = spec.kind.projects(KvPart::BOTH.map(stores));
        let own = || projection([hidden, kv_width], block.qkv_bias);
        let layer = layout.layer(index);
        let fusion = KvFusionConfig {
            kv: spec.kv,
            key: layer.key.clone(),
            value: layer.value.clone(),
            init: config.fusion_init,
        };
        let usual_scale = (spec.kv.head_dim as f64).sqrt().recip();
        Self {
            q_proj: projection([hidden, q_width], block.qkv_bias),
            k_proj: k_proj.then(own),
            v_proj: v_proj.then(own),
            o_proj: projection([q_width, hidden], block.output_bias),
            q_norm: norm(q_norm),
            k_norm: norm(k_norm.filter(|_| stores(KvPart::Key))),
            kv_fusion: fusion.init(device),
            kv_residual: KvResidual::new(layer, config.fusion_init.residual, device),
            head_dim: spec.kv.head_dim,
            qk_norm: block.qk_norm,
            value_norm: block.value_norm.then_some(config.rms_norm_eps),
            query_scale: (block.attention_scale)
                .map(|scale| scale / usual_scale)
                .filter(|&scale| scale != 1.0),
            softcap: block.attention_softcap,
        }
    }

    /// Puts what layer `index` stores of the last positions that somebody reads: post-RoPE keys,
    /// values, and what it adds to them of a lower layer (YOCO++).
    ///
    /// # Shapes
    /// - x: `[batch, seq, hidden_size]`, normalised
    pub(super) fn put(
        &self,
        layout: &KvLayout,
        index: usize,
        x: &Tensor<B, 3>,
        span: &Span<B>,
        reach: &Reach,
        store: &mut impl KvStore<B>,
    ) {
        let stored = &reach.stored;
        let project = |projection: &Projection<B>, len| projection.forward(last(x.clone(), len));
        let keys = self.k_proj.as_ref().map(|k_proj| match &self.v_proj {
            Some(_) => project(k_proj, stored[KvPart::Key]),
            // Of values as well, or of keys alone.
            None => project(k_proj, stored[KvPart::Key].max(stored[KvPart::Value])),
        });
        let values = match &self.v_proj {
            Some(v_proj) => Some(project(v_proj, stored[KvPart::Value])),
            None => keys.clone(),
        };
        for (part, projected) in [(KvPart::Key, keys), (KvPart::Value, values)] {
            if !layout.stores(part, index) {
                continue;
            }
            let projected = projected.expect("a layer has projections of what it stores");
            let own = self.own(part, last(projected, stored[part]), span);
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

    /// The layer's own post-RoPE keys, or its values, `[batch, n_kv_heads, seq, head_dim]`, of what
    /// their projection gives.
    fn own(&self, part: KvPart, projected: Tensor<B, 3>, span: &Span<B>) -> Tensor<B, 4> {
        match part {
            KvPart::Key => self.rotated(projected, self.k_norm.as_ref(), span),
            KvPart::Value => {
                let values = self.split_heads(projected);
                swap_heads(match self.value_norm {
                    Some(epsilon) => {
                        let numbers = (&values.device(), values.dtype());
                        let gain = Tensor::ones([self.head_dim], numbers);
                        rms_norm(values, gain, epsilon)
                    }
                    None => values,
                })
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
        self.o_proj
            .forward(self.heads(form, layout, index, x, span, store))
    }

    /// [`forward`](Self::forward) before the output projection, `[batch, queries, n_heads · head_dim]`.
    pub(super) fn heads(
        &self,
        form: Option<FusionForm>,
        layout: &KvLayout,
        index: usize,
        x: Tensor<B, 3>,
        span: &Span<B>,
        store: &impl KvStore<B>,
    ) -> Tensor<B, 3> {
        let [batch, queries, _] = x.dims();
        let query = self.rotated(self.q_proj.forward(x), self.q_norm.as_ref(), span);
        let query = match self.query_scale {
            Some(scale) => query * scale,
            None => query,
        };
        let mut terms = KvPart::BOTH.map(|part| self.terms(layout, index, part, store));
        // Of sources with windows each has forgotten what it need not have, and no two alike.
        let lens = terms.iter().flatten().map(|term| term.source.dims()[2]);
        let kept = lens.min().expect("every layer reads one");
        for term in terms.iter_mut().flatten() {
            term.source = term.source.clone().tail(kept);
        }
        let [keys, values] = terms;
        let output = attend(form, query, keys, values, &span.visibility, self.softcap);
        let [_, n_heads, _, head_dim] = output.dims();
        swap_heads(output).reshape([batch, queries, n_heads * head_dim])
    }

    /// Queries or keys `[batch, seq, heads · head_dim]` normalised and rotated,
    /// `[batch, heads, seq, head_dim]`.
    fn rotated(&self, x: Tensor<B, 3>, norm: Option<&Norm<B>>, span: &Span<B>) -> Tensor<B, 4> {
        let heads = match (norm, self.qk_norm) {
            (Some(norm), QkNorm::AllHeads) => self.split_heads(norm.forward(x)),
            (Some(norm), _) => norm.forward(self.split_heads(x)),
            (None, QkNorm::None) => self.split_heads(x),
            (None, _) => panic!("a block with norms of queries and keys has them"),
        };
        match &span.angles {
            Some(angles) => {
                let [_, seq, _, _] = heads.dims();
                angles.last(seq).rotate(heads.swap_dims(1, 2))
            }
            None => swap_heads(heads),
        }
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
