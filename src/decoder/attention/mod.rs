//! One layer's attention: its projections, and where the plan has its keys and values come from.

mod module;
mod parameters;
mod source;

use burn::module::Param;
use burn::tensor::{Tensor, backend::Backend};

use super::norm::Norm;
use super::projection::Projection;
use super::span::{Span, last};
use crate::attention::{FusionForm, attend};
use crate::cache::KvStore;
use crate::config::{FusedKvDecoderConfig, QkNorm};
use crate::kernels::{rms_norm, swap_heads};
use crate::plan::{KvPart, KvShape, LayerKv, Reach};
use parameters::Parameters;
#[cfg(feature = "convert")]
pub(super) use parameters::PlanParameters;
use source::{OwnKeys, OwnValues, Source};

/// Grouped-query attention whose keys and values are its own or other layers'.
///
/// As a [module](burn::module::Module) it has its parameters by Hugging Face's names, whatever they are
/// kept in here.
#[derive(Clone, Debug)]
pub struct Attention<B: Backend> {
    /// `[hidden_size, n_heads · head_dim]`.
    pub(crate) q_proj: Projection<B>,
    /// `[n_heads · head_dim, hidden_size]`.
    pub(crate) o_proj: Projection<B>,
    /// Over head_dim or all heads, before RoPE, in blocks that have it.
    pub(crate) q_norm: Option<Norm<B>>,
    key: Source<B, OwnKeys<B>>,
    value: Source<B, OwnValues<B>>,
    settings: Settings,
}

/// What of an attention is no parameter.
#[derive(Clone, Debug)]
struct Settings {
    /// The layer's number, under which it stores.
    index: usize,
    kv: KvShape,
    k_eq_v: bool,
    qk_norm: QkNorm,
    /// ε of the RMSNorm of values, in blocks that have it.
    value_norm: Option<f64>,
    /// What queries are multiplied with beyond 1/√head_dim.
    query_scale: Option<f64>,
    softcap: Option<f64>,
}

/// What the projections of queries, keys and values give of one input.
#[derive(Clone, Debug)]
pub(super) struct Projected<B: Backend> {
    /// `[batch, queries, n_heads · head_dim]`; none where nothing is attended from.
    pub query: Option<Tensor<B, 3>>,
    /// `[batch, positions, n_kv_heads · head_dim]`, of as many positions as are stored or more; none
    /// where the layer stores none.
    pub keys: Option<Tensor<B, 3>>,
    /// As `keys`.
    pub values: Option<Tensor<B, 3>>,
}

impl<B: Backend> Attention<B> {
    pub(super) fn new(
        config: &FusedKvDecoderConfig,
        layer: &LayerKv,
        index: usize,
        device: &B::Device,
    ) -> Self {
        let (block, spec) = (&config.block, config.layer(index));
        let usual_scale = (spec.kv.head_dim as f64).sqrt().recip();
        let settings = Settings {
            index,
            kv: spec.kv,
            k_eq_v: spec.kind.k_eq_v,
            qk_norm: block.qk_norm,
            value_norm: block.value_norm.then_some(config.rms_norm_eps),
            query_scale: (block.attention_scale)
                .map(|scale| scale / usual_scale)
                .filter(|&scale| scale != 1.0),
            softcap: block.attention_softcap,
        };
        Parameters::new(config, layer, index, device).assemble(layer, settings)
    }

    /// Every projection by its name, in the order of files.
    pub(super) fn projections(&self) -> Vec<(&'static str, &Projection<B>)> {
        self.named().projections()
    }

    pub(super) fn projections_mut(&mut self) -> Vec<(&'static str, &mut Projection<B>)> {
        self.named_mut().projections()
    }

    /// The weights with which it blends stored keys, or values.
    pub(crate) fn blend(&self, part: KvPart) -> Option<&Param<Tensor<B, 3>>> {
        let [key, value] = self.named().blends;
        match part {
            KvPart::Key => key,
            KvPart::Value => value,
        }
    }

    /// To fit them.
    #[cfg(feature = "convert")]
    pub(crate) fn blend_mut(&mut self, part: KvPart) -> Option<&mut Param<Tensor<B, 3>>> {
        let [key, value] = self.named_mut().blends;
        match part {
            KvPart::Key => key,
            KvPart::Value => value,
        }
    }

    /// Queries, keys and values, before norms and RoPE, of the last positions of which somebody reads
    /// them.
    ///
    /// # Shapes
    /// - x: `[batch, seq, hidden_size]`, normalised
    pub(super) fn project(&self, x: &Tensor<B, 3>, reach: &Reach) -> Projected<B> {
        let stored = |part, stores: bool| match stores {
            true => reach.stored[part],
            false => 0,
        };
        let keys = stored(KvPart::Key, self.key.own().is_some());
        let values = stored(KvPart::Value, self.value.own().is_some());
        let named = self.named();
        // `k_proj` may give values as well, or values alone.
        let of_k_proj = match named.v_proj {
            Some(_) => keys,
            None => keys.max(values),
        };
        let [by_k_proj, by_v_proj, query] = project_together(
            x,
            [
                (named.k_proj, of_k_proj),
                (named.v_proj, values),
                (Some(&self.q_proj), reach.queries),
            ],
        );
        let values = match self.value.own() {
            Some(OwnValues::Projected(_)) => by_v_proj,
            Some(OwnValues::AsKeys(_) | OwnValues::WithKeys) => by_k_proj.clone(),
            None => None,
        };
        let keys = self.key.own().and(by_k_proj);
        Projected {
            query,
            keys,
            values,
        }
    }

    /// Queries alone, of every position of `x`; shapes as [`project`](Self::project)'s.
    #[cfg(feature = "convert")]
    pub(super) fn query(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.q_proj.forward(x)
    }

    /// Stores the layer's own keys and values of the last positions that somebody reads: post-RoPE keys,
    /// values, and what is added to them of a lower layer's (YOCO++).
    ///
    /// # Shapes
    /// - keys, values: as [`Projected`]'s
    pub(super) fn put(
        &self,
        keys: Option<Tensor<B, 3>>,
        values: Option<Tensor<B, 3>>,
        span: &Span<B>,
        reach: &Reach,
        store: &mut impl KvStore<B>,
    ) {
        let (part, stored) = (KvPart::Key, reach.stored[KvPart::Key]);
        if let (Some(keys), Some(own)) = (keys, self.key.own()) {
            let keys = self.rotated(last(keys, stored), own.k_norm.as_ref(), span);
            let keys = self.key.with_added(part, keys, store);
            store.put(part, self.settings.index, keys);
        }
        let (part, stored) = (KvPart::Value, reach.stored[KvPart::Value]);
        if let Some(values) = values {
            let values = self.normed_values(last(values, stored));
            let values = self.value.with_added(part, values, store);
            store.put(part, self.settings.index, values);
        }
    }

    /// Attention over the keys and values that the plan says.
    ///
    /// # Shapes
    /// - query: as [`Projected`]'s
    /// - output: `[batch, queries, hidden_size]`
    pub(super) fn forward(
        &self,
        form: Option<FusionForm>,
        query: Tensor<B, 3>,
        span: &Span<B>,
        store: &impl KvStore<B>,
    ) -> Tensor<B, 3> {
        self.o_proj.forward(self.heads(form, query, span, store))
    }

    /// [`forward`](Self::forward) before the output projection, `[batch, queries, n_heads · head_dim]`.
    pub(super) fn heads(
        &self,
        form: Option<FusionForm>,
        query: Tensor<B, 3>,
        span: &Span<B>,
        store: &impl KvStore<B>,
    ) -> Tensor<B, 3> {
        let [batch, queries, _] = query.dims();
        let query = self.rotated(query, self.q_norm.as_ref(), span);
        let query = match self.settings.query_scale {
            Some(scale) => query * scale,
            None => query,
        };
        let (index, kv) = (self.settings.index, &self.settings.kv);
        let mut keys = self.key.terms(KvPart::Key, index, kv, store);
        let mut values = self.value.terms(KvPart::Value, index, kv, store);
        // Of sources with windows each has forgotten what it need not have, and no two alike.
        let lens = keys.iter().chain(&values);
        if let Some(kept) = lens.map(|term| term.source.dims()[2]).min() {
            for term in keys.iter_mut().chain(&mut values) {
                term.source = term.source.clone().tail(kept);
            }
        }
        let softcap = self.settings.softcap;
        let output = attend(form, query, keys, values, &span.visibility, softcap);
        let [_, n_heads, _, head_dim] = output.dims();
        swap_heads(output).reshape([batch, queries, n_heads * head_dim])
    }

    /// Queries or keys `[batch, seq, heads · head_dim]` normalised and rotated,
    /// `[batch, heads, seq, head_dim]`.
    fn rotated(&self, x: Tensor<B, 3>, norm: Option<&Norm<B>>, span: &Span<B>) -> Tensor<B, 4> {
        let heads = match norm {
            Some(norm) if self.settings.qk_norm == QkNorm::AllHeads => {
                self.split_heads(norm.forward(x))
            }
            Some(norm) => norm.forward(self.split_heads(x)),
            None => self.split_heads(x),
        };
        match &span.angles {
            Some(angles) => {
                let [_, seq, _, _] = heads.dims();
                angles.last(seq).rotate(heads.swap_dims(1, 2))
            }
            None => swap_heads(heads),
        }
    }

    /// Values `[batch, seq, n_kv_heads · head_dim]`, normalised in blocks that say so,
    /// `[batch, n_kv_heads, seq, head_dim]`.
    fn normed_values(&self, x: Tensor<B, 3>) -> Tensor<B, 4> {
        let values = self.split_heads(x);
        swap_heads(match self.settings.value_norm {
            Some(epsilon) => {
                let numbers = (&values.device(), values.dtype());
                let gain = Tensor::ones([self.settings.kv.head_dim], numbers);
                rms_norm(values, gain, epsilon)
            }
            None => values,
        })
    }

    /// `[batch, seq, heads · head_dim]` to `[batch, seq, heads, head_dim]`.
    fn split_heads(&self, x: Tensor<B, 3>) -> Tensor<B, 4> {
        let [batch, seq, width] = x.dims();
        let head_dim = self.settings.kv.head_dim;
        x.reshape([batch, seq, width / head_dim, head_dim])
    }
}

/// What each projection gives of as many of the last positions of `x` as it is wanted for: one call for
/// all that are wanted for the same, nothing where there is no projection or no position.
fn project_together<B: Backend, const N: usize>(
    x: &Tensor<B, 3>,
    wanted: [(Option<&Projection<B>>, usize); N],
) -> [Option<Tensor<B, 3>>; N] {
    let mut outputs = [const { None }; N];
    for first in 0..N {
        let (_, positions) = wanted[first];
        let left = |&i: &usize| wanted[i].1 == positions && outputs[i].is_none();
        let alike = (first..N).filter(left);
        let alike = alike.filter_map(|i| Some((i, wanted[i].0?)));
        let (places, projections): (Vec<_>, Vec<_>) = alike.unzip();
        if positions == 0 || projections.is_empty() {
            continue;
        }
        let all = Projection::forward_each(&projections, &last(x.clone(), positions));
        for (place, output) in places.into_iter().zip(all) {
            outputs[place] = Some(output);
        }
    }
    outputs
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::module::Initializer;
    use burn::tensor::Distribution;
    use burn_flex::{Flex, FlexDevice};

    use super::*;

    /// Of any positions, wanted alike or not, each projection gives what it gives alone.
    #[test]
    fn projections_are_asked_together_and_answer_apart() {
        let initializer = Initializer::Normal {
            mean: 0.0,
            std: 1.0,
        };
        let projection = |width| Projection::new([8, width], true, &initializer, &FlexDevice);
        let projections: [Projection<Flex>; 3] = [3, 5, 4].map(projection);
        let x = Tensor::<Flex, 3>::random([2, 6, 8], Distribution::Default, &FlexDevice);
        for positions in [[6, 6, 6], [6, 2, 6], [0, 4, 4], [3, 3, 1], [0, 0, 0]] {
            for missing in 0..4 {
                let wanted = [0, 1, 2].map(|i| {
                    let there = (i != missing).then_some(&projections[i]);
                    (there, positions[i])
                });
                let found = project_together(&x, wanted);
                for (found, (projection, positions)) in found.into_iter().zip(wanted) {
                    let expected = projection.filter(|_| positions > 0);
                    let expected = expected.map(|it| it.forward(last(x.clone(), positions)));
                    assert_eq!(
                        found.map(Tensor::into_data),
                        expected.map(Tensor::into_data)
                    );
                }
            }
        }
    }
}
