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

use std::mem::discriminant;

use serde::{Deserialize, Serialize};

pub use error::PlanError;
use form::PlanForm;
pub(crate) use form::SourceForm;
pub(crate) use layout::PerPart;
pub use layout::{BlendWeights, KvLayout, KvPart, KvSource, LayerKv};

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

    /// Spells the plan out for a decoder of `n_layers` layers and validates it.
    ///
    /// # Errors
    /// [`PlanError`] if the depth is 0, `storage_layers` or `factor` makes no sense for it, or a
    /// custom plan has another number of layers, an empty blend, a repeated source, a source that
    /// does not store, or one above its reader.
    pub fn resolve(&self, n_layers: usize) -> Result<KvLayout, PlanError> {
        KvLayout::new(self.layers(n_layers)?)
    }

    fn layers(&self, n_layers: usize) -> Result<Vec<LayerKv>, PlanError> {
        use BlendWeights::{PerChannel, PerLayer};
        use KvSource::{AsIs, Blend, Own};
        let blend = |sources: &[usize], weights| Blend {
            sources: sources.to_vec(),
            weights,
        };
        match *self {
            Self::Standard => Ok(vec![LayerKv::OWN; n_layers]),
            Self::FusedKv { storage_layers: n } => self.sharing(n_layers, n, 2, |top| {
                (blend(&[0, top], PerChannel), blend(&[0, top], PerChannel))
            }),
            Self::FusedKvLite { storage_layers: n } => {
                self.sharing(n_layers, n, 1, |top| (AsIs(top), AsIs(0)))
            }
            Self::FusedKvLiteLearnable { storage_layers: n } => {
                self.sharing(n_layers, n, 1, |top| {
                    (blend(&[top], PerChannel), blend(&[0], PerChannel))
                })
            }
            Self::FusedKvLiteReversed { storage_layers: n } => {
                self.sharing(n_layers, n, 1, |top| (AsIs(0), AsIs(top)))
            }
            Self::Yoco { storage_layers: n } => {
                self.sharing(n_layers, n, 1, |top| (AsIs(top), AsIs(top)))
            }
            Self::YocoPlusPlus { storage_layers: n } => {
                let mut layers = self.sharing(n_layers, n, 1, |top| (AsIs(top), AsIs(top)))?;
                for layer in &mut layers[1..n] {
                    let own = Own { residual: Some(0) };
                    *layer = LayerKv {
                        key: own.clone(),
                        value: own,
                    };
                }
                Ok(layers)
            }
            Self::DenseFusion { storage_layers: n } => self.sharing(n_layers, n, 1, |top| {
                let all: Vec<_> = (0..=top).collect();
                (blend(&all, PerLayer), blend(&all, PerLayer))
            }),
            Self::Cla { factor } => {
                if factor == 0 || factor > n_layers {
                    return Err(PlanError::ClaFactor { factor, n_layers });
                }
                Ok((0..n_layers)
                    .map(|layer| match layer % factor {
                        0 => LayerKv::OWN,
                        above => LayerKv {
                            key: AsIs(layer - above),
                            value: AsIs(layer - above),
                        },
                    })
                    .collect())
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

    /// `n` storing layers, and above them layers that read what `sources(n - 1)` says.
    fn sharing(
        &self,
        n_layers: usize,
        n: usize,
        min: usize,
        sources: impl Fn(usize) -> (KvSource, KvSource),
    ) -> Result<Vec<LayerKv>, PlanError> {
        if n < min || n >= n_layers {
            return Err(PlanError::StorageLayers {
                method: self.method(),
                storage_layers: n,
                min,
                n_layers,
            });
        }
        Ok((0..n_layers)
            .map(|layer| {
                if layer < n {
                    return LayerKv::OWN;
                }
                let (key, value) = sources(n - 1);
                LayerKv { key, value }
            })
            .collect())
    }
}
