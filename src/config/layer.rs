//! One layer's attention, resolved from a configuration.

use serde::{Deserialize, Serialize};

use super::rope::RopeConfig;
use super::{ConfigError, FusedKvDecoderConfig, QkNorm};
use crate::plan::KvShape;

/// Window and RoPE of a layer whose decoder has layers of several kinds.
///
/// Layers are of one kind where all of this is equal; a layer reads keys and values of layers of its
/// own kind alone, whatever the plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerKind {
    /// Tokens that a query sees, itself included: the last ones; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// The rotation of queries and keys; none: they are not rotated (NoPE, arXiv 2305.19466).
    pub rope: Option<RopeConfig>,
}

/// What one layer is, told by its decoder's configuration alone: what it reads and stores is the
/// plan's.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerSpec {
    /// Window and RoPE.
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
        let kind = match self.block.layers.get(index) {
            Some(kind) => kind.clone(),
            None => LayerKind {
                window: None,
                rope: Some(self.rope()),
            },
        };
        let rotary_dim = kind
            .rope
            .as_ref()
            .map_or(0, |rope| rope.rotary_dim(self.head_dim));
        LayerSpec {
            kind,
            n_heads: self.n_heads,
            kv: KvShape {
                n_kv_heads: self.n_kv_heads,
                head_dim: self.head_dim,
                rotary_dim,
            },
            ffn_size: self.ffn_size,
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

    /// The kinds that layers are of, each once, and the kind of every layer.
    pub(crate) fn kinds(&self) -> (Vec<LayerKind>, Vec<usize>) {
        let mut kinds: Vec<LayerKind> = Vec::new();
        let of = |index| {
            let kind = self.layer(index).kind;
            match kinds.iter().position(|known| *known == kind) {
                Some(known) => known,
                None => {
                    kinds.push(kind);
                    kinds.len() - 1
                }
            }
        };
        let of = (0..self.n_layers).map(of).collect();
        (kinds, of)
    }

    pub(super) fn validate_kinds(&self) -> Result<(), ConfigError> {
        let found = self.block.layers.len();
        if found != 0 && found != self.n_layers {
            return Err(ConfigError::LayerKinds {
                found,
                n_layers: self.n_layers,
            });
        }
        self.rope().validate(self.head_dim)?;
        for kind in &self.block.layers {
            if kind.window == Some(0) {
                return Err(ConfigError::Zero {
                    field: "block.layers.window",
                });
            }
            if let Some(rope) = &kind.rope {
                rope.validate(self.head_dim)?;
            }
        }
        Ok(())
    }
}
