//! A plan spelled out: for every layer, where its keys and where its values come from, and the
//! cache's slots.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::{Index, IndexMut};

use serde::{Deserialize, Serialize};

use super::error::PlanError;
use super::form::LayerForm;

/// Where one layer's keys and values come from, each by itself.
///
/// ```
/// use fusedkv::{KvSource, LayerKv};
///
/// // Keys of its own, the values of the bottom layer.
/// let layer = LayerKv { key: KvSource::OWN, value: KvSource::AsIs(0) };
/// assert_eq!(serde_json::to_string(&layer)?, r#"{"key":"own","value":{"as_is":0}}"#);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "LayerForm", try_from = "LayerForm")]
pub struct LayerKv {
    /// Where its keys come from.
    pub key: KvSource,
    /// Where its values come from.
    pub value: KvSource,
}

/// Keys or values of a layer: its own, or in terms of what is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvSource {
    /// The layer's own projection; its post-RoPE keys, or its values, are cached.
    Own {
        /// A stored layer below whose cached keys or values are added, times a learned scalar α,
        /// before they are cached (YOCO++).
        residual: Option<usize>,
    },
    /// One stored layer's, unchanged. The layer has no projection and no cache for them.
    AsIs(usize),
    /// A learned weighted sum of stored layers'. Where the layer itself is among them, it has a
    /// projection and a cache of its own as well.
    Blend {
        /// The stored layers, in the order of their weights.
        sources: Vec<usize>,
        /// What shares one weight.
        weights: BlendWeights,
    },
}

/// How fine the weights of a [`KvSource::Blend`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BlendWeights {
    /// One per source, kv head and channel; for keys, one per RoPE pair of channels.
    PerChannel,
    /// One scalar per source.
    PerLayer,
}

/// The two things a cache keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvPart {
    /// Keys, after RoPE.
    Key,
    /// Values.
    Value,
}

impl KvPart {
    /// Keys and values.
    pub const BOTH: [Self; 2] = [Self::Key, Self::Value];
}

/// Shape of one token's keys, and of its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Channels of keys that RoPE rotates, the first ones: j with j + rotary_dim/2.
    pub rotary_dim: usize,
}

impl KvShape {
    /// Weights of a head in a blend per channel: the two channels of a rotated pair of keys share
    /// one, so that scores stay a function of relative position.
    pub(crate) fn weights(&self, part: KvPart) -> usize {
        self.head_dim - self.shared_pairs(part)
    }

    /// Pairs of channels that share a weight, the first ones.
    pub(crate) fn shared_pairs(&self, part: KvPart) -> usize {
        match part {
            KvPart::Key => self.rotary_dim / 2,
            KvPart::Value => 0,
        }
    }

    /// Which of a head's [weights](Self::weights) a channel has: pairs first.
    #[cfg(feature = "convert")]
    pub(crate) fn weight_of(&self, part: KvPart, channel: usize) -> usize {
        let pairs = self.shared_pairs(part);
        match channel >= pairs {
            true => channel - pairs,
            false => channel,
        }
    }

    /// Numbers of one token.
    pub(crate) fn width(&self) -> usize {
        // A configuration that is not checked may say anything.
        self.n_kv_heads.saturating_mul(self.head_dim)
    }
}

impl fmt::Display for KvPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "keys",
            Self::Value => "values",
        })
    }
}

/// One of keys and one of values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PerPart<T>([T; 2]);

impl<T> PerPart<T> {
    pub fn new(of: impl FnMut(KvPart) -> T) -> Self {
        Self(KvPart::BOTH.map(of))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut()
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}

impl<T> Index<KvPart> for PerPart<T> {
    type Output = T;

    fn index(&self, part: KvPart) -> &T {
        &self.0[part as usize]
    }
}

impl<T> IndexMut<KvPart> for PerPart<T> {
    fn index_mut(&mut self, part: KvPart) -> &mut T {
        &mut self.0[part as usize]
    }
}

impl LayerKv {
    /// A layer of a standard decoder: keys and values of its own, both cached.
    pub const OWN: Self = Self {
        key: KvSource::OWN,
        value: KvSource::OWN,
    };

    /// Where its keys, or its values, come from.
    pub fn part(&self, part: KvPart) -> &KvSource {
        match part {
            KvPart::Key => &self.key,
            KvPart::Value => &self.value,
        }
    }
}

impl fmt::Display for LayerKv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, value } = self;
        match key == value {
            true => write!(f, "keys and values {key}"),
            false => write!(f, "keys {key} and values {value}"),
        }
    }
}

impl fmt::Display for KvSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own { residual: None } => f.write_str("of its own"),
            Self::Own {
                residual: Some(layer),
            } => write!(f, "of its own plus layer {layer}'s"),
            Self::AsIs(layer) => write!(f, "of layer {layer}"),
            Self::Blend { sources, weights } => {
                let weights = match weights {
                    BlendWeights::PerChannel => "per channel",
                    BlendWeights::PerLayer => "per layer",
                };
                write!(f, "blended {weights} of layers {sources:?}")
            }
        }
    }
}

impl KvSource {
    /// The layer's own, with nothing added.
    pub const OWN: Self = Self::Own { residual: None };

    /// The layers a reader at `layer` attends to, in the order of the weights.
    fn reads(&self, layer: usize) -> Vec<usize> {
        match self {
            Self::Own { .. } => vec![layer],
            Self::AsIs(source) => vec![*source],
            Self::Blend { sources, .. } => sources.clone(),
        }
    }

    /// Whether it is the layer's own alone.
    pub(crate) fn is_own(&self) -> bool {
        matches!(self, Self::Own { .. })
    }

    /// Whether it has the layer at `layer` store keys or values of its own.
    pub(crate) fn is_stored_by(&self, layer: usize) -> bool {
        match self {
            Self::Own { .. } => true,
            Self::AsIs(_) => false,
            Self::Blend { sources, .. } => sources.contains(&layer),
        }
    }

    /// The stored layer added to what a layer stores, if any.
    pub(crate) fn residual(&self) -> Option<usize> {
        match self {
            Self::Own { residual } => *residual,
            Self::AsIs(_) | Self::Blend { .. } => None,
        }
    }

    /// Shape of the learned weights, `[sources, n_kv_heads, weights]` or `[sources, 1, 1]`; none
    /// where there is nothing to learn.
    pub(crate) fn weights_shape(&self, part: KvPart, kv: &KvShape) -> Option<[usize; 3]> {
        match self {
            Self::Own { .. } | Self::AsIs(_) => None,
            Self::Blend { sources, weights } => Some(match weights {
                BlendWeights::PerChannel => [sources.len(), kv.n_kv_heads, kv.weights(part)],
                BlendWeights::PerLayer => [sources.len(), 1, 1],
            }),
        }
    }
}

/// A validated plan: one [`LayerKv`] per layer, and a cache slot for everything that is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    layers: Vec<LayerKv>,
    /// The number of each layer's kind.
    kinds: Vec<usize>,
    reads: PerPart<Reads>,
}

/// Who reads what of the keys, or of the values.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reads {
    /// The layers that each layer reads.
    sources: Vec<Vec<usize>>,
    /// The cache slot of each layer that stores, counted from the bottom.
    slots: Vec<Option<usize>>,
}

impl Reads {
    fn new(layers: &[LayerKv], part: KvPart) -> Self {
        let parts = || layers.iter().map(|layer| layer.part(part)).enumerate();
        let mut next = 0..;
        Self {
            sources: parts().map(|(layer, source)| source.reads(layer)).collect(),
            slots: parts()
                .map(|(layer, source)| source.is_stored_by(layer).then(|| next.next()).flatten())
                .collect(),
        }
    }

    fn check(
        &self,
        part: KvPart,
        reader: usize,
        source: &KvSource,
        kinds: &[usize],
    ) -> Result<(), PlanError> {
        let read = self.sources[reader].iter().copied();
        if let Some(layer) = read
            .chain(source.residual())
            .find(|&layer| kinds.get(layer).is_some_and(|kind| *kind != kinds[reader]))
        {
            return Err(PlanError::SourceOfAnotherKind {
                part,
                reader,
                layer,
            });
        }
        if self.sources[reader].is_empty() {
            return Err(PlanError::EmptyBlend { part, reader });
        }
        let mut seen = BTreeSet::new();
        for &layer in &self.sources[reader] {
            if layer > reader || (layer == reader && matches!(source, KvSource::AsIs(_))) {
                return Err(PlanError::SourceNotBelow {
                    part,
                    reader,
                    layer,
                });
            }
            self.check_stored(part, reader, layer)?;
            if !seen.insert(layer) {
                return Err(PlanError::DuplicateSource {
                    part,
                    reader,
                    layer,
                });
            }
        }
        match source.residual() {
            Some(layer) if layer >= reader => Err(PlanError::SourceNotBelow {
                part,
                reader,
                layer,
            }),
            Some(layer) => self.check_stored(part, reader, layer),
            None => Ok(()),
        }
    }

    fn check_stored(&self, part: KvPart, reader: usize, layer: usize) -> Result<(), PlanError> {
        match self.slots[layer] {
            Some(_) => Ok(()),
            None => Err(PlanError::SourceDoesNotStore {
                part,
                reader,
                layer,
            }),
        }
    }
}

impl KvLayout {
    /// Of layers whose kinds are told by numbers, one per layer.
    pub(super) fn new(layers: Vec<LayerKv>, kinds: &[usize]) -> Result<Self, PlanError> {
        if layers.is_empty() {
            return Err(PlanError::NoLayers);
        }
        let reads = PerPart::new(|part| Reads::new(&layers, part));
        for part in KvPart::BOTH {
            for (reader, layer) in layers.iter().enumerate() {
                reads[part].check(part, reader, layer.part(part), kinds)?;
            }
        }
        Ok(Self {
            layers,
            kinds: kinds.to_vec(),
            reads,
        })
    }

    /// Depth of the decoder the layout is for.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Where `layer` gets its keys and values.
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

    /// Which kind `layer` is of, counted from 0 in the order in which kinds first appear.
    ///
    /// # Panics
    /// If `layer` is not below [`n_layers`](Self::n_layers).
    pub fn kind(&self, layer: usize) -> usize {
        self.kinds[layer]
    }

    /// Number of layers whose keys, or whose values, are stored.
    pub fn n_stored(&self, part: KvPart) -> usize {
        self.reads[part].slots.iter().flatten().count()
    }

    /// Whether the keys, or the values, of `layer` are stored.
    ///
    /// # Panics
    /// If `layer` is not below [`n_layers`](Self::n_layers).
    pub fn stores(&self, part: KvPart, layer: usize) -> bool {
        self.reads[part].slots[layer].is_some()
    }

    /// The stored layers whose keys, or whose values, `layer` attends to, itself included where it
    /// does; in the order of the weights.
    ///
    /// # Panics
    /// If `layer` is not below [`n_layers`](Self::n_layers).
    pub fn sources(&self, part: KvPart, layer: usize) -> &[usize] {
        &self.reads[part].sources[layer]
    }

    /// The highest layer that stores keys or values. Above it, a position needs a hidden state only
    /// if its logits are asked for: nobody reads anything else of it.
    pub fn last_store(&self) -> usize {
        let last = |part| self.reads[part].slots.iter().rposition(Option::is_some);
        // The first layer has nothing below it to read, so a validated layout stores there.
        last(KvPart::Key).max(last(KvPart::Value)).unwrap_or(0)
    }

    /// Number of stored key tensors plus number of stored value tensors `layer` attends to.
    pub fn n_reads(&self, layer: usize) -> usize {
        KvPart::BOTH
            .map(|part| self.sources(part, layer).len())
            .iter()
            .sum()
    }

    /// The cache slot of a layer's keys, or of its values, if they are stored; keys and values are
    /// counted apart, each from the bottom.
    pub(crate) fn slot(&self, part: KvPart, layer: usize) -> Option<usize> {
        *self.reads[part].slots.get(layer)?
    }
}
