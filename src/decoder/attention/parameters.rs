//! An attention's parameters by the names that checkpoints and records have.

use burn::module::{EmptyRecord, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::source::{Added, OwnKeys, OwnValues, Source, needed};
use super::{Attention, Settings};
use crate::attention::KvFusionConfig;
use crate::config::FusedKvDecoderConfig;
use crate::decoder::listed::listed;
use crate::decoder::norm::Norm;
use crate::decoder::projection::Projection;
use crate::plan::{KvPart, LayerKv};

/// What an [`Attention`] is made of and taken apart to; which of the optional parts there are follows
/// from block and plan. Records are of this.
#[derive(Module, Debug)]
pub struct Parameters<B: Backend> {
    q_proj: Projection<B>,
    k_proj: Option<Projection<B>>,
    v_proj: Option<Projection<B>>,
    o_proj: Projection<B>,
    q_norm: Option<Norm<B>>,
    k_norm: Option<Norm<B>>,
    kv_fusion: Option<Blends<B>>,
    kv_residual: Option<KvResidual<B>>,
    // Each a byte of binary records, for a field of old that was no parameter.
    head_dim: EmptyRecord,
    qk_norm: EmptyRecord,
    value_norm: EmptyRecord,
    query_scale: EmptyRecord,
    softcap: EmptyRecord,
}

/// The weights of a layer's blends, as [`KvFusion`](crate::KvFusion) has them.
#[derive(Module, Debug)]
pub struct Blends<B: Backend> {
    key_weight: Option<Param<Tensor<B, 3>>>,
    value_weight: Option<Param<Tensor<B, 3>>>,
    // As those of `Parameters`.
    rotated_pairs: EmptyRecord,
}

/// The α of YOCO++ (arXiv 2604.13556), `[1]` each: times them, a lower layer's keys and values are added
/// to those that a layer stores.
#[derive(Module, Debug)]
pub struct KvResidual<B: Backend> {
    key_weight: Option<Param<Tensor<B, 1>>>,
    value_weight: Option<Param<Tensor<B, 1>>>,
}

/// What an attention has beyond that of a standard decoder, by its names: the weights with which a plan
/// has it read other layers' keys and values.
#[derive(Module, Debug)]
pub struct PlanParameters<B: Backend> {
    kv_fusion: Option<Blends<B>>,
    kv_residual: Option<KvResidual<B>>,
}

listed!(ParametersRecord: q_proj, k_proj, v_proj, o_proj, q_norm, k_norm, kv_fusion, kv_residual);
listed!(BlendsRecord: key_weight, value_weight);
listed!(KvResidualRecord: key_weight, value_weight);
listed!(PlanParametersRecord: kv_fusion, kv_residual);

/// The parameters of an attention wherever it has them: `P` are projections, `N` norms, `A` the α of
/// YOCO++, `W` weights of blends, or references to them; those of keys before those of values.
pub(super) struct Named<P, N, A, W> {
    pub q_proj: P,
    pub k_proj: Option<P>,
    pub v_proj: Option<P>,
    pub o_proj: P,
    pub q_norm: Option<N>,
    pub k_norm: Option<N>,
    pub alphas: [Option<A>; 2],
    pub blends: [Option<W>; 2],
}

impl<P, N, A, W> Named<P, N, A, W> {
    /// Every projection by its name, in the order of files.
    pub fn projections(self) -> Vec<(&'static str, P)> {
        let all = [
            ("q_proj", Some(self.q_proj)),
            ("k_proj", self.k_proj),
            ("v_proj", self.v_proj),
            ("o_proj", Some(self.o_proj)),
        ];
        let all = all.into_iter();
        all.filter_map(|(name, projection)| Some((name, projection?)))
            .collect()
    }
}

type Owned<B> = Named<Projection<B>, Norm<B>, Param<Tensor<B, 1>>, Param<Tensor<B, 3>>>;
pub(super) type NamedRef<'a, B> =
    Named<&'a Projection<B>, &'a Norm<B>, &'a Param<Tensor<B, 1>>, &'a Param<Tensor<B, 3>>>;
pub(super) type NamedMut<'a, B> = Named<
    &'a mut Projection<B>,
    &'a mut Norm<B>,
    &'a mut Param<Tensor<B, 1>>,
    &'a mut Param<Tensor<B, 3>>,
>;

/// [`Named`] of an attention or of a reference to one.
macro_rules! named {
    ($attention:expr) => {{
        let Attention {
            q_proj,
            o_proj,
            q_norm,
            key,
            value,
            ..
        } = $attention;
        let (own_keys, key_alpha, key_blend) = parts!(key);
        let (own_values, value_alpha, value_blend) = parts!(value);
        let (k_proj, k_norm) = match own_keys {
            Some(OwnKeys { k_proj, k_norm }) => (Some(k_proj), k_norm.into()),
            None => (None, None),
        };
        let (k_proj, v_proj) = match own_values {
            Some(OwnValues::Projected(v_proj)) => (k_proj, Some(v_proj)),
            Some(OwnValues::AsKeys(of_values)) => (Some(of_values), None),
            Some(OwnValues::WithKeys) | None => (k_proj, None),
        };
        Named {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            q_norm: q_norm.into(),
            k_norm,
            alphas: [key_alpha, value_alpha],
            blends: [key_blend, value_blend],
        }
    }};
}

/// What makes a source's own, its α and the weights of its blend.
macro_rules! parts {
    ($source:expr) => {
        match $source {
            Source::Own { own, added } => match added {
                Some(Added { alpha, .. }) => (Some(own), Some(alpha), None),
                None => (Some(own), None, None),
            },
            Source::AsIs(_) => (None, None, None),
            Source::Blend { own, weights, .. } => (own.into(), None, Some(weights)),
        }
    };
}

impl<B: Backend> Attention<B> {
    pub(super) fn named(&self) -> NamedRef<'_, B> {
        named!(self)
    }

    pub(super) fn named_mut(&mut self) -> NamedMut<'_, B> {
        named!(self)
    }

    pub(super) fn into_parameters(self) -> Parameters<B> {
        Parameters::of(named!(self))
    }

    /// The same projections and norms, those that it has no use for left out, under another plan of the
    /// layer.
    ///
    /// # Panics
    /// If it lacks a projection that the plan needs; a standard decoder's lacks none.
    #[cfg(feature = "convert")]
    pub(in crate::decoder) fn under(self, layer: &LayerKv, of_plan: PlanParameters<B>) -> Self {
        let settings = self.settings.clone();
        let parameters = Parameters {
            kv_fusion: of_plan.kv_fusion,
            kv_residual: of_plan.kv_residual,
            ..self.into_parameters()
        };
        parameters.assemble(layer, settings)
    }
}

impl<B: Backend> PlanParameters<B> {
    pub fn new(
        config: &FusedKvDecoderConfig,
        layer: &LayerKv,
        index: usize,
        device: &B::Device,
    ) -> Self {
        let fusion = KvFusionConfig {
            kv: config.layer(index).kv,
            key: layer.key.clone(),
            value: layer.value.clone(),
            init: config.fusion_init,
        };
        let alpha = |part| {
            layer.part(part).residual()?;
            let start = config.fusion_init.residual;
            Some(Param::from_tensor(Tensor::full([1], start, device)))
        };
        let fusion = fusion.init(device);
        let blends = fusion.map(|fusion| [fusion.key_weight, fusion.value_weight]);
        Self::of(KvPart::BOTH.map(alpha), blends.unwrap_or([None, None]))
    }

    /// Of the α and the weights of blends, those of keys first.
    fn of(
        alphas: [Option<Param<Tensor<B, 1>>>; 2],
        blends: [Option<Param<Tensor<B, 3>>>; 2],
    ) -> Self {
        let residual = alphas.iter().any(Option::is_some);
        let fusion = blends.iter().any(Option::is_some);
        let ([key_alpha, value_alpha], [key_blend, value_blend]) = (alphas, blends);
        Self {
            kv_fusion: fusion.then_some(Blends {
                key_weight: key_blend,
                value_weight: value_blend,
                rotated_pairs: EmptyRecord,
            }),
            kv_residual: residual.then_some(KvResidual {
                key_weight: key_alpha,
                value_weight: value_alpha,
            }),
        }
    }
}

impl<B: Backend> Parameters<B> {
    pub fn new(
        config: &FusedKvDecoderConfig,
        layer: &LayerKv,
        index: usize,
        device: &B::Device,
    ) -> Self {
        let (block, spec, hidden) = (&config.block, config.layer(index), config.hidden_size);
        let (q_width, kv_width) = (spec.q_width(), spec.kv.width());
        let projection = |shape, bias| Projection::new(shape, bias, &config.initializer(), device);
        let norm = |width: Option<usize>| width.map(|width| Norm::new(width, config, device));
        let [q_norm, k_norm] = spec.qk_norm_widths(block.qk_norm);
        let stores = KvPart::BOTH.map(|part| layer.part(part).is_stored_by(index));
        let [k_proj, v_proj] = spec.kind.projects(stores);
        let own = || projection([hidden, kv_width], block.qkv_bias);
        let PlanParameters {
            kv_fusion,
            kv_residual,
        } = PlanParameters::new(config, layer, index, device);
        let without = Self::of(Named {
            q_proj: projection([hidden, q_width], block.qkv_bias),
            k_proj: k_proj.then(own),
            v_proj: v_proj.then(own),
            o_proj: projection([q_width, hidden], block.output_bias),
            q_norm: norm(q_norm),
            k_norm: norm(k_norm.filter(|_| stores[0])),
            alphas: [None, None],
            blends: [None, None],
        });
        Self {
            kv_fusion,
            kv_residual,
            ..without
        }
    }

    pub(super) fn of(named: Owned<B>) -> Self {
        let PlanParameters {
            kv_fusion,
            kv_residual,
        } = PlanParameters::of(named.alphas, named.blends);
        Self {
            q_proj: named.q_proj,
            k_proj: named.k_proj,
            v_proj: named.v_proj,
            o_proj: named.o_proj,
            q_norm: named.q_norm,
            k_norm: named.k_norm,
            kv_fusion,
            kv_residual,
            head_dim: EmptyRecord,
            qk_norm: EmptyRecord,
            value_norm: EmptyRecord,
            query_scale: EmptyRecord,
            softcap: EmptyRecord,
        }
    }

    /// The attention that they make of a layer's plan.
    ///
    /// # Panics
    /// If one that the plan needs is not there: a decoder looks through a record before it loads it.
    pub(super) fn assemble(self, layer: &LayerKv, settings: Settings) -> Attention<B> {
        let fusion = self.kv_fusion;
        let (key_blend, value_blend) =
            fusion.map_or((None, None), |f| (f.key_weight, f.value_weight));
        let residual = self.kv_residual;
        let (key_alpha, value_alpha) =
            residual.map_or((None, None), |r| (r.key_weight, r.value_weight));
        let stores = |part| layer.part(part).is_stored_by(settings.index);
        let mut k_proj = self.k_proj;
        let own_keys = stores(KvPart::Key).then(|| OwnKeys {
            k_proj: needed(k_proj.take(), "k_proj"),
            k_norm: self.k_norm,
        });
        let own_values = stores(KvPart::Value).then(|| match (settings.k_eq_v, &own_keys) {
            (false, _) => OwnValues::Projected(needed(self.v_proj, "v_proj")),
            (true, None) => OwnValues::AsKeys(needed(k_proj, "k_proj")),
            (true, Some(_)) => OwnValues::WithKeys,
        });
        Attention {
            q_proj: self.q_proj,
            o_proj: self.o_proj,
            q_norm: self.q_norm,
            key: Source::new(&layer.key, own_keys, key_alpha, key_blend),
            value: Source::new(&layer.value, own_values, value_alpha, value_blend),
            settings,
        }
    }
}
