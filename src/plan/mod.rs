//! Plans: for every layer, where its keys and where its values come from.
//!
//! A [`KvPlan`] names a method of the literature with its parameters, or spells a custom one out
//! layer by layer; it is plain data and serialises to the `kv_plan` object of a checkpoint's
//! `config.json`. [`KvPlan::resolve`] validates it for a given depth and yields a [`KvLayout`],
//! which is what the decoder walks and the cache allocates by. A new method is a new plan; nothing
//! in the attention knows any method by name.
//!
//! Layers are counted from 0 here; papers count from 1.

mod error;
mod form;
mod layout;
mod reach;

use std::fmt;
use std::mem::discriminant;

use serde::{Deserialize, Serialize};

pub use error::PlanError;
use form::PlanForm;
pub(crate) use form::SourceForm;
pub(crate) use layout::PerPart;
pub use layout::{BlendWeights, KvLayout, KvPart, KvShape, KvSource, LayerKv};
pub(crate) use reach::{HISTORY, Reach};

/// Which layers keep a KV cache, and how the others get their keys and values.
///
/// `storage_layers` (n) is the number of bottom layers that store; the method applies to the
/// layers above them. Constructing a plan checks nothing: [`resolve`](Self::resolve) does, and so
/// does everything that takes a configuration.
///
/// ```
/// use fusedkv::{KvPart, KvPlan, KvSource};
///
/// let layout = KvPlan::FusedKv { storage_layers: 4 }.resolve(8)?;
/// assert_eq!(layout.n_stored(KvPart::Key), 4);
/// assert!(matches!(layout.layer(7).value, KvSource::Blend { .. }));
/// # Ok::<(), fusedkv::PlanError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "PlanForm", try_from = "PlanForm")]
#[non_exhaustive]
pub enum KvPlan {
    /// Every layer stores its own keys and values.
    Standard,
    /// Top layers blend the bottom layer's and layer n's keys and values with a learned weight
    /// per kv head and channel (arXiv 2512.03870). Needs n ≥ 2.
    FusedKv {
        /// Number of bottom layers that store, n.
        storage_layers: usize,
    },
    /// Top layers use layer n's keys and the bottom layer's values as they are (arXiv 2512.03870).
    FusedKvLite {
        /// Number of bottom layers that store, n.
        storage_layers: usize,
    },
    /// [`FusedKvLite`](Self::FusedKvLite) with a learned weight per kv head and channel.
    FusedKvLiteLearnable {
        /// Number of bottom layers that store, n.
        storage_layers: usize,
    },
    /// Ablation of the Lite variant: the bottom layer's keys and layer n's values.
    FusedKvLiteReversed {
        /// Number of bottom layers that store, n.
        storage_layers: usize,
    },
    /// Top layers use layer n's keys and values, the sharing pattern of YOCO (arXiv 2405.05254).
    Yoco {
        /// Number of bottom layers that store, n.
        storage_layers: usize,
    },
    /// [`Yoco`](Self::Yoco) whose storing layers above the first add α times the bottom layer's
    /// keys and values to their own (YOCO++, arXiv 2604.13556).
    YocoPlusPlus {
        /// Number of bottom layers that store, n.
        storage_layers: usize,
    },
    /// Every `factor`-th layer stores and the layers above it share (arXiv 2405.12981).
    Cla {
        /// Layers per stored layer; 1 is the standard decoder.
        factor: usize,
    },
    /// Top layers blend all n stored layers with one learned scalar each: the FusedKV paper's probe
    /// of where keys and values want to come from.
    DenseFusion {
        /// Number of bottom layers that store, n.
        storage_layers: usize,
    },
    /// A plan of your own, one entry per layer, bottom layer first.
    Custom {
        /// What each layer does.
        layers: Vec<LayerKv>,
    },
}

/// A method by name, and what its parameter is.
struct Method {
    name: &'static str,
    parameter: Parameter,
    /// The plan at that parameter.
    plan: fn(usize) -> KvPlan,
}

/// What a method has besides its name.
#[derive(Clone, Copy)]
enum Parameter {
    None,
    StorageLayers,
    Factor,
}

/// The name of a plan that spells its layers out.
const CUSTOM: &str = "custom";

/// Every method but a custom one: the one place that knows their names.
static METHODS: [Method; 9] = {
    use Parameter::{Factor, None, StorageLayers};
    const fn method(name: &'static str, parameter: Parameter, plan: fn(usize) -> KvPlan) -> Method {
        Method {
            name,
            parameter,
            plan,
        }
    }
    [
        method("standard", None, |_| KvPlan::Standard),
        method("fused_kv", StorageLayers, |storage_layers| {
            KvPlan::FusedKv { storage_layers }
        }),
        method("fused_kv_lite", StorageLayers, |storage_layers| {
            KvPlan::FusedKvLite { storage_layers }
        }),
        method("fused_kv_lite_learnable", StorageLayers, |storage_layers| {
            KvPlan::FusedKvLiteLearnable { storage_layers }
        }),
        method("fused_kv_lite_reversed", StorageLayers, |storage_layers| {
            KvPlan::FusedKvLiteReversed { storage_layers }
        }),
        method("yoco", StorageLayers, |storage_layers| KvPlan::Yoco {
            storage_layers,
        }),
        method("yoco_plus_plus", StorageLayers, |storage_layers| {
            KvPlan::YocoPlusPlus { storage_layers }
        }),
        method("cla", Factor, |factor| KvPlan::Cla { factor }),
        method("dense_fusion", StorageLayers, |storage_layers| {
            KvPlan::DenseFusion { storage_layers }
        }),
    ]
};

impl Method {
    /// That of a plan; none of a custom one.
    fn of(plan: &KvPlan) -> Option<&'static Self> {
        METHODS
            .iter()
            .find(|method| discriminant(&(method.plan)(1)) == discriminant(plan))
    }
}

impl fmt::Display for KvPlan {
    /// The method and what it has beside its name, as in `fused_kv:n=3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = self.method();
        match (self, self.clone().storage_layers_mut()) {
            (_, Some(storage_layers)) => f.pad(&format!("{method}:n={storage_layers}")),
            (Self::Cla { factor }, None) => f.pad(&format!("{method}:factor={factor}")),
            _ => f.pad(method),
        }
    }
}

impl KvPlan {
    /// The names that [`from_method`](Self::from_method) knows, as checkpoints spell them.
    pub fn methods() -> impl Iterator<Item = &'static str> {
        METHODS.iter().map(|method| method.name)
    }

    /// The plan of a method by name, at half the cache: `n_layers / 2` storing layers, or a CLA
    /// factor of 2.
    ///
    /// # Errors
    /// [`PlanError::UnknownMethod`] if the name is not one of [`methods`](Self::methods).
    pub fn from_method(method: &str, n_layers: usize) -> Result<Self, PlanError> {
        let known = METHODS.iter().find(|known| known.name == method);
        let Method {
            plan, parameter, ..
        } = known.ok_or_else(|| PlanError::UnknownMethod(method.to_owned()))?;
        Ok(plan(match parameter {
            Parameter::Factor => 2,
            Parameter::StorageLayers | Parameter::None => n_layers / 2,
        }))
    }

    /// The method's name as checkpoints spell it.
    pub fn method(&self) -> &'static str {
        match (Method::of(self), self) {
            (Some(method), _) => method.name,
            (None, Self::Custom { .. }) => CUSTOM,
            (None, _) => unreachable!("every method stands in the table"),
        }
    }

    /// The number of bottom layers that store, n, of a method that has one.
    pub fn storage_layers_mut(&mut self) -> Option<&mut usize> {
        match self {
            Self::FusedKv { storage_layers }
            | Self::FusedKvLite { storage_layers }
            | Self::FusedKvLiteLearnable { storage_layers }
            | Self::FusedKvLiteReversed { storage_layers }
            | Self::Yoco { storage_layers }
            | Self::YocoPlusPlus { storage_layers }
            | Self::DenseFusion { storage_layers } => Some(storage_layers),
            Self::Standard | Self::Cla { .. } | Self::Custom { .. } => None,
        }
    }

    /// Spells the plan out for a decoder of `n_layers` layers, all of one kind, and validates it.
    ///
    /// # Errors
    /// As [`resolve_kinds`](Self::resolve_kinds).
    pub fn resolve(&self, n_layers: usize) -> Result<KvLayout, PlanError> {
        self.resolve_kinds(&vec![0; n_layers])
    }

    /// Spells the plan out for a decoder whose layers are of several kinds, and validates it. Kinds
    /// are told by numbers, one per layer; layers differ in kind where their windows, their RoPE or the
    /// widths of their keys and values do.
    ///
    /// A layer reads layers of its own kind alone. Of a method, "the bottom layer" and "layer n" are
    /// thus the lowest and the highest storing layer of the reader's kind, and CLA counts every kind
    /// by itself: with sliding-window layers between full ones, local layers read the last local
    /// store, global ones the last global store. Where a kind has one storing layer only, FusedKV
    /// blends that one.
    ///
    /// # Errors
    /// [`PlanError`] if the depth is 0, `storage_layers` or `factor` makes no sense for it, no layer
    /// of a reader's kind stores, or a custom plan has another number of layers, an empty blend, a
    /// repeated source, a source that does not store, one above its reader, or one of another kind.
    pub fn resolve_kinds(&self, kinds: &[usize]) -> Result<KvLayout, PlanError> {
        KvLayout::new(self.layers(kinds)?, kinds)
    }

    fn layers(&self, kinds: &[usize]) -> Result<Vec<LayerKv>, PlanError> {
        use BlendWeights::{PerChannel, PerLayer};
        use KvSource::{AsIs, Blend, Own};
        let blend = |sources: &[usize], weights| Blend {
            sources: sources.to_vec(),
            weights,
        };
        let ends = |stores: &[usize]| (stores[0], stores[stores.len() - 1]);
        let n_layers = kinds.len();
        match *self {
            Self::Standard => Ok(vec![LayerKv::OWN; n_layers]),
            Self::FusedKv { storage_layers: n } => self.sharing(kinds, n, 2, |stores| {
                let sources = match ends(stores) {
                    (bottom, top) if bottom == top => vec![top],
                    (bottom, top) => vec![bottom, top],
                };
                (blend(&sources, PerChannel), blend(&sources, PerChannel))
            }),
            Self::FusedKvLite { storage_layers: n } => self.sharing(kinds, n, 1, |stores| {
                let (bottom, top) = ends(stores);
                (AsIs(top), AsIs(bottom))
            }),
            Self::FusedKvLiteLearnable { storage_layers: n } => {
                self.sharing(kinds, n, 1, |stores| {
                    let (bottom, top) = ends(stores);
                    (blend(&[top], PerChannel), blend(&[bottom], PerChannel))
                })
            }
            Self::FusedKvLiteReversed { storage_layers: n } => {
                self.sharing(kinds, n, 1, |stores| {
                    let (bottom, top) = ends(stores);
                    (AsIs(bottom), AsIs(top))
                })
            }
            Self::Yoco { storage_layers: n } => self.sharing(kinds, n, 1, |stores| {
                let (_, top) = ends(stores);
                (AsIs(top), AsIs(top))
            }),
            Self::YocoPlusPlus { storage_layers: n } => {
                let mut layers = self.sharing(kinds, n, 1, |stores| {
                    let (_, top) = ends(stores);
                    (AsIs(top), AsIs(top))
                })?;
                for (index, layer) in layers[..n].iter_mut().enumerate() {
                    let bottom = (0..index).find(|&lower| kinds[lower] == kinds[index]);
                    let own = Own { residual: bottom };
                    *layer = LayerKv {
                        key: own.clone(),
                        value: own,
                    };
                }
                Ok(layers)
            }
            Self::DenseFusion { storage_layers: n } => self.sharing(kinds, n, 1, |stores| {
                (blend(stores, PerLayer), blend(stores, PerLayer))
            }),
            Self::Cla { factor } => {
                if factor == 0 || factor > n_layers {
                    return Err(PlanError::ClaFactor { factor, n_layers });
                }
                let layer = |layer: usize| {
                    let alike = (0..=layer).filter(|&lower| kinds[lower] == kinds[layer]);
                    let alike: Vec<_> = alike.collect();
                    let above = (alike.len() - 1) % factor;
                    let store = alike[alike.len() - 1 - above];
                    match above {
                        0 => LayerKv::OWN,
                        _ => LayerKv {
                            key: AsIs(store),
                            value: AsIs(store),
                        },
                    }
                };
                Ok((0..n_layers).map(layer).collect())
            }
            Self::Custom { ref layers } => {
                if layers.len() != n_layers {
                    return Err(PlanError::LayerCount {
                        plan: layers.len(),
                        n_layers,
                    });
                }
                Ok(layers.clone())
            }
        }
    }

    /// `n` storing layers, and above them layers that read what `sources` says of the storing layers
    /// of their own kind, bottom first.
    fn sharing(
        &self,
        kinds: &[usize],
        n: usize,
        min: usize,
        sources: impl Fn(&[usize]) -> (KvSource, KvSource),
    ) -> Result<Vec<LayerKv>, PlanError> {
        let n_layers = kinds.len();
        if n < min || n >= n_layers {
            return Err(PlanError::StorageLayers {
                method: self.method(),
                storage_layers: n,
                min,
                n_layers,
            });
        }
        let reader = |layer: usize| {
            let stores = (0..n).filter(|&store| kinds[store] == kinds[layer]);
            let stores: Vec<_> = stores.collect();
            if stores.is_empty() {
                return Err(PlanError::NoStoreOfKind {
                    method: self.method(),
                    storage_layers: n,
                    layer,
                });
            }
            let (key, value) = sources(&stores);
            Ok(LayerKv { key, value })
        };
        let layer = |layer| match layer < n {
            true => Ok(LayerKv::OWN),
            false => reader(layer),
        };
        (0..n_layers).map(layer).collect()
    }
}
