//! Which layers have a window, and which have no RoPE.

use serde_json::{Value, json};

use super::super::error::CheckpointError;
use super::super::keys::Keys;
use super::super::plan::{MAX_LAYERS, too_many_layers};
use super::rope::Ropes;
use crate::config::{FusedKvDecoderConfig, LayerKind};

/// How a family's files tell windows. `layer_types`, where a file has it, says it for all families
/// that may have any.
#[derive(Clone, Copy)]
pub(super) enum Windows {
    /// There are none.
    None,
    /// `sliding_window`, in every layer; this one where files do not say.
    AllLayers(Option<usize>),
    /// `sliding_window` in layers from `max_window_layers` on, if `use_sliding_window`.
    UpperLayers,
    /// `sliding_window` in layers without RoPE, if `use_sliding_window`: those that `no_rope_layers`
    /// says, or else every `no_rope_layer_interval`-th.
    NoRopeLayers,
    /// `sliding_window`, or else `default`, in all but every `nth` layer, of which some files say by a
    /// key which it is, and but for the last where that is always full.
    AllButEvery {
        nth: usize,
        key: Option<&'static str>,
        default: usize,
        last_is_full: bool,
    },
}

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";
const DEFAULT_WINDOW: usize = 4096;

impl Windows {
    /// The kind of every layer; none where all have full attention and the same RoPE.
    pub fn read(
        self,
        keys: &Keys,
        n_layers: usize,
        ropes: &Ropes,
    ) -> Result<Vec<LayerKind>, CheckpointError> {
        let used = match self {
            Self::None => false,
            Self::UpperLayers | Self::NoRopeLayers => {
                keys.flag("use_sliding_window")?.unwrap_or(false)
            }
            Self::AllLayers(_) | Self::AllButEvery { .. } => true,
        };
        let default = match self {
            Self::AllLayers(default) => default.filter(|_| !keys.is_null("sliding_window")),
            Self::None | Self::NoRopeLayers => None,
            Self::UpperLayers => Some(DEFAULT_WINDOW).filter(|_| !keys.is_null("sliding_window")),
            Self::AllButEvery { default, .. } => {
                Some(default).filter(|_| !keys.is_null("sliding_window"))
            }
        };
        let window = keys.optional_count("sliding_window")?.or(default);
        let window = window.filter(|_| used);
        let no_rope = self.no_rope(keys, n_layers)?;
        let types = self.types(keys, n_layers)?;
        if window.is_none() && types.as_ref().is_some_and(|types| types.contains(&true)) {
            return Err(keys.wrong("layer_types", format!("\"{FULL}\" for every layer")));
        }
        if window.is_none() && no_rope.is_none() && ropes.sliding.is_none() {
            return Ok(Vec::new());
        }
        if n_layers > MAX_LAYERS {
            return Err(too_many_layers(keys, "num_hidden_layers"));
        }
        let rotates = |layer: usize| no_rope.as_ref().is_none_or(|no_rope| !no_rope[layer]);
        let slides = self.slides(keys)?;
        let kind = |layer: usize| {
            let slides = match &types {
                _ if self.is_full(layer, n_layers) => false,
                Some(types) => types[layer],
                None => slides(layer, rotates(layer)),
            };
            LayerKind {
                window: window.filter(|_| slides),
                rope: rotates(layer).then(|| ropes.of(slides).clone()),
                ..LayerKind::default()
            }
        };
        let kinds: Vec<_> = (0..n_layers).map(kind).collect();
        let plain =
            |kind: &LayerKind| kind.window.is_none() && kind.rope == Some(ropes.full.clone());
        Ok(match kinds.iter().all(plain) {
            true => Vec::new(),
            false => kinds,
        })
    }

    /// Whether a layer sees everything, whatever files say.
    fn is_full(self, layer: usize, n_layers: usize) -> bool {
        let last_is_full = matches!(
            self,
            Self::AllButEvery {
                last_is_full: true,
                ..
            }
        );
        last_is_full && layer + 1 == n_layers
    }

    /// Which layers slide in files without `layer_types`, told by their number and whether they have
    /// RoPE.
    fn slides(self, keys: &Keys) -> Result<impl Fn(usize, bool) -> bool, CheckpointError> {
        let from = keys.optional_count("max_window_layers")?.unwrap_or(28);
        let nth = match self {
            Self::AllButEvery { nth, key, .. } => {
                let told = key
                    .map(|key| keys.optional_count(key))
                    .transpose()?
                    .flatten();
                told.filter(|&nth| nth > 0).unwrap_or(nth)
            }
            _ => 1,
        };
        Ok(move |layer: usize, rotates: bool| match self {
            Self::None => false,
            Self::AllLayers(_) => true,
            Self::UpperLayers => layer >= from,
            Self::NoRopeLayers => !rotates,
            Self::AllButEvery { .. } => !(layer + 1).is_multiple_of(nth),
        })
    }

    /// Which layers `layer_types` says slide.
    fn types(self, keys: &Keys, n_layers: usize) -> Result<Option<Vec<bool>>, CheckpointError> {
        let slides = |value: &Value| match value.as_str() {
            Some(FULL) => Some(false),
            Some(SLIDING) if !matches!(self, Self::None) => Some(true),
            _ => None,
        };
        let read = |value: &Value| {
            let types = value
                .as_array()?
                .iter()
                .map(slides)
                .collect::<Option<Vec<_>>>()?;
            (types.len() == n_layers).then_some(types)
        };
        let expected = match self {
            Self::None => format!("\"{FULL}\" for every layer"),
            _ => format!("\"{FULL}\" or \"{SLIDING}\" for every layer"),
        };
        keys.optional("layer_types", read, &expected)
    }

    /// Which layers have no RoPE, in a family that has such.
    fn no_rope(self, keys: &Keys, n_layers: usize) -> Result<Option<Vec<bool>>, CheckpointError> {
        if !matches!(self, Self::NoRopeLayers) {
            return Ok(None);
        }
        let read = |value: &Value| {
            let layers = value.as_array()?;
            let without = layers.iter().map(|layer| Some(layer.as_u64()? == 0));
            let without = without.collect::<Option<Vec<_>>>()?;
            (without.len() >= n_layers).then_some(without)
        };
        let expected = "1 for every layer with RoPE, 0 for every one without";
        if let Some(layers) = keys.optional("no_rope_layers", read, expected)? {
            return Ok(Some(layers));
        }
        let interval = keys.optional_count("no_rope_layer_interval")?.unwrap_or(4);
        if interval == 0 {
            return Err(keys.wrong("no_rope_layer_interval", "at least 1"));
        }
        let layers = 0..n_layers.min(MAX_LAYERS);
        Ok(Some(
            layers
                .map(|layer| (layer + 1).is_multiple_of(interval))
                .collect(),
        ))
    }

    pub fn write(self, json: &mut Value, config: &FusedKvDecoderConfig) {
        if matches!(self, Self::None) {
            return;
        }
        let kinds: Vec<_> = (0..config.n_layers)
            .map(|layer| config.layer(layer).kind)
            .collect();
        let window = kinds.iter().find_map(|kind| kind.window);
        json["sliding_window"] = json!(window);
        let slides = |kind: &LayerKind| kind.window.is_some();
        let types = kinds
            .iter()
            .map(|kind| if slides(kind) { SLIDING } else { FULL });
        match self {
            Self::None => {}
            // Mistral's files that have types are opened as another family's.
            Self::AllLayers(_) if kinds.iter().all(slides) || window.is_none() => {}
            Self::AllLayers(_) | Self::AllButEvery { .. } => {
                json["layer_types"] = types.collect();
            }
            Self::UpperLayers | Self::NoRopeLayers => {
                json["use_sliding_window"] = json!(window.is_some());
                if window.is_some() {
                    json["layer_types"] = types.collect();
                }
            }
        }
        if matches!(self, Self::NoRopeLayers) {
            let rotates = kinds.iter().map(|kind| u8::from(kind.rope.is_some()));
            json["no_rope_layers"] = rotates.collect();
        }
        if matches!(self, Self::UpperLayers) {
            json["max_window_layers"] = json!(config.n_layers);
        }
    }
}
