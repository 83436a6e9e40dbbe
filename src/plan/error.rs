//! Plans that no decoder can follow.

use thiserror::Error;

use super::{KvPart, KvPlan};

/// A plan that no decoder can follow.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The name is none of [`KvPlan::methods`].
    #[error("unknown method `{0}`, expected one of {known}", known = KvPlan::methods().collect::<Vec<_>>().join(", "))]
    UnknownMethod(String),
    /// A method without what belongs to it.
    #[error("the plan `{method}` has no `{key}`")]
    MissingKey {
        /// The method.
        method: String,
        /// What it needs.
        key: &'static str,
    },
    /// A method with what belongs to another.
    #[error("the plan `{method}` has a `{key}`, expected none")]
    UnknownKey {
        /// The method.
        method: String,
        /// What it does not know.
        key: &'static str,
    },
    /// A layer of a custom plan that says too little or too much.
    #[error("a layer of a custom plan, expected `store`, `reuse`, or `key` and `value`")]
    LayerForm,
    /// A decoder needs a layer.
    #[error("the plan has no layers, expected at least 1")]
    NoLayers,
    /// A custom plan for another depth.
    #[error("the plan describes {plan} layers, the decoder has {n_layers}")]
    LayerCount {
        /// Layers in the plan.
        plan: usize,
        /// Layers in the decoder.
        n_layers: usize,
    },
    /// Too few or too many storing layers.
    #[error(
        "`{method}` with {storage_layers} storage layers in a decoder of {n_layers} layers, \
         expected at least {min} and fewer than {n_layers}"
    )]
    StorageLayers {
        /// The method asked for.
        method: &'static str,
        /// Storing layers asked for.
        storage_layers: usize,
        /// The fewest this method can work with.
        min: usize,
        /// Layers in the decoder.
        n_layers: usize,
    },
    /// A CLA factor of 0 or larger than the decoder.
    #[error("a CLA factor of {factor} in a decoder of {n_layers} layers, expected 1 to {n_layers}")]
    ClaFactor {
        /// The factor asked for.
        factor: usize,
        /// Layers in the decoder.
        n_layers: usize,
    },
    /// A blend without sources.
    #[error("the {part} of layer {reader} are a blend of nothing, expected at least one source")]
    EmptyBlend {
        /// Keys or values.
        part: KvPart,
        /// The layer with the blend.
        reader: usize,
    },
    /// The same source twice in a blend.
    #[error("the {part} of layer {reader} are blended of layer {layer} twice")]
    DuplicateSource {
        /// Keys or values.
        part: KvPart,
        /// The layer with the blend.
        reader: usize,
        /// The source named twice.
        layer: usize,
    },
    /// A source above its reader, or the reader itself where it has nothing of its own.
    #[error("layer {reader} reads the {part} of layer {layer}, expected a layer below it")]
    SourceNotBelow {
        /// Keys or values.
        part: KvPart,
        /// The reading layer.
        reader: usize,
        /// What it reads.
        layer: usize,
    },
    /// A source that keeps no keys, or no values, of its own.
    #[error("layer {reader} reads the {part} of layer {layer}, which stores none")]
    SourceDoesNotStore {
        /// Keys or values.
        part: KvPart,
        /// The reading layer.
        reader: usize,
        /// What it reads.
        layer: usize,
    },
    /// A source whose window, RoPE or widths are others than its reader's.
    #[error(
        "layer {reader} reads the {part} of layer {layer}, whose window, RoPE or widths are others, \
         expected a layer of its own kind"
    )]
    SourceOfAnotherKind {
        /// Keys or values.
        part: KvPart,
        /// The reading layer.
        reader: usize,
        /// What it reads.
        layer: usize,
    },
    /// A layer that reuses, of a kind that no storing layer is of.
    #[error(
        "`{method}` with {storage_layers} storage layers has layer {layer} read layers with its own \
         window, RoPE and widths, and none of them stores, expected more storage layers"
    )]
    NoStoreOfKind {
        /// The method asked for.
        method: &'static str,
        /// Storing layers asked for.
        storage_layers: usize,
        /// The lowest layer that has nothing to read.
        layer: usize,
    },
}
