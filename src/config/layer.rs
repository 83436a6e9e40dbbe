//! One layer's attention, resolved from a configuration.

use serde::{Deserialize, Serialize};

use super::rope::RopeConfig;
use super::{BlockConfig, ConfigError, FusedKvDecoderConfig, QkNorm};
use crate::plan::KvShape;

/// What the keys and values of a layer are like whose decoder has layers of several kinds.
///
/// Layers are of one kind where all of this is equal; a layer reads keys and values of layers of its
/// own kind alone, whatever the plan. The default is full attention without RoPE.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerKind {
    /// Tokens that a query sees, itself included: the last ones; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// The rotation of queries and keys; none: they are not rotated (NoPE, arXiv 2305.19466).
    pub rope: Option<RopeConfig>,
    /// Channels per head; none: the decoder's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Key/value heads; none: the decoder's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_kv_heads: Option<usize>,
    /// Whether values have no projection of their own: they are what that of keys gives, before norm
    /// and RoPE (Gemma 4).
    #[serde(default, skip_serializing_if = "is_false")]
    pub k_eq_v: bool,
}

impl LayerKind {
    /// Whether a layer that stores keys, or values, or both, has a projection of keys, and one of
    /// values.
    pub(crate) fn projects(&self, [keys, values]: [bool; 2]) -> [bool; 2] {
        [keys || (values && self.k_eq_v), values && !self.k_eq_v]
    }
}

/// Whether a setting is left out of what is written, as it was before there was one.
pub(super) fn is_false(setting: &bool) -> bool {
    !setting
}

/// What one layer is, told by its decoder's configuration alone: what it reads and stores is the
/// plan's.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerSpec {
    /// Its kind, with the decoder's sizes where it has none of its own: equal in layers of one kind.
    pub kind: LayerKind,
    /// Query heads.
    pub n_heads: usize,
    /// Of its keys and values.
    pub kv: KvShape,
    /// Inner width of the feed-forward block.
    pub ffn_size: usize,
}

impl LayerSpec {
    /// Width of the queries, n_heads · head_dim.
    pub fn q_width(&self) -> usize {
        // A configuration that is not checked may say anything.
        self.n_heads.saturating_mul(self.kv.head_dim)
    }

    /// What RMSNorm of queries, and of keys, goes over; none where there is none.
    pub(crate) fn qk_norm_widths(&self, norm: QkNorm) -> [Option<usize>; 2] {
        match norm {
            QkNorm::None => [None; 2],
            QkNorm::PerHead => [Some(self.kv.head_dim); 2],
            QkNorm::AllHeads => [Some(self.q_width()), Some(self.kv.width())],
        }
    }

    /// How many of `context` tokens its last query sees.
    pub(crate) fn visible(&self, context: usize) -> usize {
        self.kind
            .window
            .map_or(context, |window| window.min(context))
    }
}

impl FusedKvDecoderConfig {
    /// What layer `index`, counted from 0, is.
    pub fn layer(&self, index: usize) -> LayerSpec {
        let mut kind = match self.block.layers.get(index) {
            Some(kind) => kind.clone(),
            None => LayerKind {
                rope: Some(self.rope()),
                ..LayerKind::default()
            },
        };
        let head_dim = *kind.head_dim.get_or_insert(self.head_dim);
        let n_kv_heads = *kind.n_kv_heads.get_or_insert(self.n_kv_heads);
        let rotary_dim = |rope: &RopeConfig| rope.rotary_dim(head_dim);
        let ffn_size = self.block.ffn_sizes.get(index);
        LayerSpec {
            n_heads: self.n_heads,
            kv: KvShape {
                n_kv_heads,
                head_dim,
                rotary_dim: kind.rope.as_ref().map_or(0, rotary_dim),
            },
            ffn_size: ffn_size.copied().unwrap_or(self.ffn_size),
            kind,
        }
    }

    /// Of layers that [`BlockConfig::layers`](super::BlockConfig::layers) says nothing of.
    pub(crate) fn rope(&self) -> RopeConfig {
        RopeConfig {
            theta: self.rope_theta,
            rotary_dim: self.block.rotary_dim,
            scaling: self.block.rope_scaling.clone(),
        }
    }

    /// A layer of each kind that there is, and the kind of every layer.
    pub(crate) fn kinds(&self) -> (Vec<LayerSpec>, Vec<usize>) {
        let mut kinds: Vec<LayerSpec> = Vec::new();
        let of = |index| {
            let spec = self.layer(index);
            match kinds.iter().position(|known| known.kind == spec.kind) {
                Some(known) => known,
                None => {
                    kinds.push(spec);
                    kinds.len() - 1
                }
            }
        };
        let of = (0..self.n_layers).map(of).collect();
        (kinds, of)
    }

    pub(super) fn validate_kinds(&self) -> Result<(), ConfigError> {
        let BlockConfig {
            layers, ffn_sizes, ..
        } = &self.block;
        for (field, found) in [
            ("block.layers", layers.len()),
            ("block.ffn_sizes", ffn_sizes.len()),
        ] {
            if found != 0 && found != self.n_layers {
                return Err(ConfigError::LayerCount {
                    field,
                    found,
                    n_layers: self.n_layers,
                });
            }
        }
        if ffn_sizes.contains(&0) {
            return Err(ConfigError::Zero {
                field: "block.ffn_sizes",
            });
        }
        if layers.is_empty() {
            self.rope().validate(self.head_dim)?;
        }
        for kind in layers {
            for (field, size) in [
                ("block.layers.window", kind.window),
                ("block.layers.head_dim", kind.head_dim),
                ("block.layers.n_kv_heads", kind.n_kv_heads),
            ] {
                if size == Some(0) {
                    return Err(ConfigError::Zero { field });
                }
            }
            let head_dim = kind.head_dim.unwrap_or(self.head_dim);
            self.validate_heads(head_dim, kind.n_kv_heads.unwrap_or(self.n_kv_heads))?;
            if let Some(rope) = &kind.rope {
                rope.validate(head_dim)?;
            }
        }
        Ok(())
    }

    /// Whether there is a decoder with such heads of keys and values.
    pub(super) fn validate_heads(
        &self,
        head_dim: usize,
        n_kv_heads: usize,
    ) -> Result<(), ConfigError> {
        if !self.n_heads.is_multiple_of(n_kv_heads) {
            return Err(ConfigError::HeadGroups {
                n_heads: self.n_heads,
                n_kv_heads,
            });
        }
        match head_dim.is_multiple_of(2) {
            true => Ok(()),
            false => Err(ConfigError::OddHeadDim(head_dim)),
        }
    }
}
