//! Plans: for every layer, where its keys and where its values come from.
//!
//! A [`KvPlan`] names a method of the literature with its parameters, or spells a custom one out
//! layer by layer; it is plain data and serialises to the `kv_plan` object of a checkpoint's
//! `config.json`. [`KvPlan::resolve`] validates it for a given depth and yields a [`KvLayout`],
//! which is what the decoder walks and the cache allocates by. A new method is a new plan; nothing
//! in the attention knows any method by name.
//!
//! Layers are counted from 0 here; papers count from 1.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::PlanError;

/// Which layers keep a KV cache, and how the others get their keys and values.
///
/// `storage_layers` (n) is the number of bottom layers that store; the method applies to the
/// layers above them. Constructing a plan checks nothing: [`resolve`](Self::resolve) does, and so
/// does everything that takes a configuration.
///
/// ```
/// use fusedkv::{KvPlan, LayerKv};
///
/// let layout = KvPlan::FusedKv { storage_layers: 4 }.resolve(8)?;
/// assert_eq!(layout.n_stores(), 4);
/// assert!(matches!(layout.layer(7), LayerKv::Reuse { .. }));
/// # Ok::<(), fusedkv::PlanError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
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
    /// Top layers mix all n stored layers with one learned scalar each: the FusedKV paper's probe
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

/// Where one layer's keys and values come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LayerKv {
    /// The layer has its own K/V projections, and its post-RoPE keys and values are cached.
    Store {
        /// A stored layer below whose cached keys and values are added, each times a learned
        /// scalar α, before they are cached (YOCO++).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        residual: Option<usize>,
    },
    /// The layer has no K/V projections and no cache; it reads stored layers below it.
    Reuse {
        /// Where its keys come from.
        key: Mix,
        /// Where its values come from.
        value: Mix,
    },
}

/// Keys (or values) of a reusing layer in terms of stored layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Mix {
    /// One stored layer's, unchanged.
    AsIs(usize),
    /// A learned weighted sum of stored layers'.
    Blend {
        /// The stored layers, in the order of their weights.
        sources: Vec<usize>,
        /// What shares one weight.
        weights: BlendWeights,
    },
}

/// How fine the weights of a [`Mix::Blend`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlendWeights {
    /// One per source, kv head and channel; for keys, one per RoPE pair of channels.
    PerChannel,
    /// One scalar per source.
    PerLayer,
}

impl Mix {
    /// The stored layers read, in the order of the weights.
    pub fn sources(&self) -> &[usize] {
        match self {
            Self::AsIs(source) => std::slice::from_ref(source),
            Self::Blend { sources, .. } => sources,
        }
    }

    /// Shape of the learned weights, `[sources, n_kv_heads, channels]` or `[sources, 1, 1]`; none
    /// where there is nothing to learn.
    pub(crate) fn weights_shape(&self, n_kv_heads: usize, channels: usize) -> Option<[usize; 3]> {
        match self {
            Self::AsIs(_) => None,
            Self::Blend { sources, weights } => Some(match weights {
                BlendWeights::PerChannel => [sources.len(), n_kv_heads, channels],
                BlendWeights::PerLayer => [sources.len(), 1, 1],
            }),
        }
    }
}

impl KvPlan {
    /// The names [`from_method`](Self::from_method) knows, as checkpoints spell them.
    pub const METHODS: [&'static str; 9] = [
        "standard",
        "fused_kv",
        "fused_kv_lite",
        "fused_kv_lite_learnable",
        "fused_kv_lite_reversed",
        "yoco",
        "yoco_plus_plus",
        "cla",
        "dense_fusion",
    ];

    /// The plan of a method by name, at half the cache: `n_layers / 2` storing layers, or a CLA
    /// factor of 2.
    ///
    /// # Errors
    /// [`PlanError::UnknownMethod`] if the name is not in [`METHODS`](Self::METHODS).
    pub fn from_method(method: &str, n_layers: usize) -> Result<Self, PlanError> {
        let storage_layers = n_layers / 2;
        Ok(match method {
            "standard" => Self::Standard,
            "fused_kv" => Self::FusedKv { storage_layers },
            "fused_kv_lite" => Self::FusedKvLite { storage_layers },
            "fused_kv_lite_learnable" => Self::FusedKvLiteLearnable { storage_layers },
            "fused_kv_lite_reversed" => Self::FusedKvLiteReversed { storage_layers },
            "yoco" => Self::Yoco { storage_layers },
            "yoco_plus_plus" => Self::YocoPlusPlus { storage_layers },
            "cla" => Self::Cla { factor: 2 },
            "dense_fusion" => Self::DenseFusion { storage_layers },
            _ => return Err(PlanError::UnknownMethod(method.to_owned())),
        })
    }

    /// The method's name as checkpoints spell it.
    pub fn method(&self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::FusedKv { .. } => "fused_kv",
            Self::FusedKvLite { .. } => "fused_kv_lite",
            Self::FusedKvLiteLearnable { .. } => "fused_kv_lite_learnable",
            Self::FusedKvLiteReversed { .. } => "fused_kv_lite_reversed",
            Self::Yoco { .. } => "yoco",
            Self::YocoPlusPlus { .. } => "yoco_plus_plus",
            Self::Cla { .. } => "cla",
            Self::DenseFusion { .. } => "dense_fusion",
            Self::Custom { .. } => "custom",
        }
    }

    /// Spells the plan out for a decoder of `n_layers` layers and validates it.
    ///
    /// # Errors
    /// [`PlanError`] if the depth is 0, `storage_layers` or `factor` makes no sense for it, or a
    /// custom plan has another number of layers, an empty mix, a repeated source, a source that
    /// does not store, or one that is not below its reader.
    pub fn resolve(&self, n_layers: usize) -> Result<KvLayout, PlanError> {
        KvLayout::new(self.layers(n_layers)?)
    }

    fn layers(&self, n_layers: usize) -> Result<Vec<LayerKv>, PlanError> {
        use BlendWeights::{PerChannel, PerLayer};
        use Mix::AsIs;
        let blend = |sources: &[usize], weights| Mix::Blend {
            sources: sources.to_vec(),
            weights,
        };
        match *self {
            Self::Standard => Ok(vec![LayerKv::Store { residual: None }; n_layers]),
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
                    *layer = LayerKv::Store { residual: Some(0) };
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
                        0 => LayerKv::Store { residual: None },
                        above => LayerKv::Reuse {
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

    /// `n` storing layers, and above them layers that read what `mixes(n - 1)` says.
    fn sharing(
        &self,
        n_layers: usize,
        n: usize,
        min: usize,
        mixes: impl Fn(usize) -> (Mix, Mix),
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
                    return LayerKv::Store { residual: None };
                }
                let (key, value) = mixes(n - 1);
                LayerKv::Reuse { key, value }
            })
            .collect())
    }
}

/// A validated plan: one [`LayerKv`] per layer, and a cache slot for each layer that stores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    layers: Vec<LayerKv>,
    slots: Vec<Option<usize>>,
}

impl KvLayout {
    fn new(layers: Vec<LayerKv>) -> Result<Self, PlanError> {
        if layers.is_empty() {
            return Err(PlanError::NoLayers);
        }
        let mut slots = Vec::with_capacity(layers.len());
        let mut next = 0;
        for (reader, layer) in layers.iter().enumerate() {
            match layer {
                LayerKv::Store { residual } => {
                    if let Some(source) = *residual {
                        check_source(&layers, reader, source)?;
                    }
                    slots.push(Some(next));
                    next += 1;
                }
                LayerKv::Reuse { key, value } => {
                    for mix in [key, value] {
                        check_mix(&layers, reader, mix)?;
                    }
                    slots.push(None);
                }
            }
        }
        Ok(Self { layers, slots })
    }

    /// Depth of the decoder the layout is for.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Number of layers that store keys and values.
    pub fn n_stores(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// What `layer` does.
    ///
    /// # Panics
    /// If `layer` is not below [`n_layers`](Self::n_layers).
    pub fn layer(&self, layer: usize) -> &LayerKv {
        &self.layers[layer]
    }

    /// All layers, bottom first.
    pub fn layers(&self) -> &[LayerKv] {
        &self.layers
    }

    /// The highest layer that stores. Above it, a position needs a hidden state only if its logits
    /// are asked for: nobody reads anything else of it.
    pub fn last_store(&self) -> usize {
        // The first layer has nothing below it to read, so a validated layout stores there.
        self.slots.iter().rposition(Option::is_some).unwrap_or(0)
    }

    /// Number of stored key tensors plus number of stored value tensors `layer` attends to.
    pub fn n_reads(&self, layer: usize) -> usize {
        match &self.layers[layer] {
            LayerKv::Store { .. } => 2,
            LayerKv::Reuse { key, value } => key.sources().len() + value.sources().len(),
        }
    }

    /// The cache slot of a storing layer.
    pub(crate) fn slot(&self, layer: usize) -> usize {
        self.slots[layer].expect("a validated layout reads only layers that store")
    }
}

fn check_mix(layers: &[LayerKv], reader: usize, mix: &Mix) -> Result<(), PlanError> {
    if mix.sources().is_empty() {
        return Err(PlanError::EmptyMix { reader });
    }
    let mut seen = BTreeSet::new();
    for &source in mix.sources() {
        check_source(layers, reader, source)?;
        if !seen.insert(source) {
            return Err(PlanError::DuplicateSource {
                reader,
                layer: source,
            });
        }
    }
    Ok(())
}

fn check_source(layers: &[LayerKv], reader: usize, source: usize) -> Result<(), PlanError> {
    if source >= reader {
        return Err(PlanError::SourceNotBelow {
            reader,
            layer: source,
        });
    }
    match layers[source] {
        LayerKv::Store { .. } => Ok(()),
        LayerKv::Reuse { .. } => Err(PlanError::SourceDoesNotStore {
            reader,
            layer: source,
        }),
    }
}
