//! The tensors of a file: a decoder's parameters, or several of them one below the other.

use std::path::Path;

use super::error::CheckpointError;
use super::families::fuses_projections;
use super::read::Rows;
use crate::config::FusedKvDecoderConfig;
use crate::parameters::{TensorSpec, tensors};
use crate::plan::KvLayout;

/// A tensor of a file.
#[derive(Clone, Debug)]
pub(super) struct FileTensor {
    pub spec: TensorSpec,
    /// The parameters that it holds, in its order: their rows one below the other.
    pub parts: Vec<TensorSpec>,
}

/// Files that a decoder's tensors are read from.
pub(super) trait TensorFiles: Sync {
    /// What errors name.
    fn path(&self) -> &Path;

    /// A part of a tensor, by its number.
    fn rows(&self, tensor: &FileTensor, part: usize)
    -> Result<Box<dyn Rows + '_>, CheckpointError>;

    /// The error for a tensor that is not there.
    fn missing(&self, spec: &TensorSpec) -> CheckpointError {
        CheckpointError::MissingTensor {
            path: self.path().to_owned(),
            tensor: spec.name.clone(),
            shape: spec.shape.clone(),
        }
    }

    /// The error for a tensor of another shape than is needed.
    fn shape(&self, spec: &TensorSpec, found: Vec<usize>) -> CheckpointError {
        CheckpointError::Shape {
            path: self.path().to_owned(),
            tensor: spec.name.clone(),
            found,
            expected: spec.shape.clone(),
        }
    }
}

/// What some families have as one tensor, and the parameters it is made of, in order.
const FUSED: [(&str, &[&str]); 2] = [
    ("qkv_proj", &["q_proj", "k_proj", "v_proj"]),
    ("gate_up_proj", &["gate_proj", "up_proj"]),
];

impl From<TensorSpec> for FileTensor {
    fn from(spec: TensorSpec) -> Self {
        Self {
            parts: vec![spec.clone()],
            spec,
        }
    }
}

/// All tensors of a decoder's files, in the order of its modules.
pub(super) fn file_tensors(config: &FusedKvDecoderConfig, layout: &KvLayout) -> Vec<FileTensor> {
    let tensors = tensors(config, layout);
    if !fuses_projections(config) {
        return tensors.into_iter().map(FileTensor::from).collect();
    }
    let mut files: Vec<FileTensor> = Vec::new();
    for part in tensors {
        let Some(name) = fused_name(&part.name) else {
            files.push(part.into());
            continue;
        };
        match files.last_mut().filter(|last| last.spec.name == name) {
            Some(last) => {
                last.spec.shape[0] = last.spec.shape[0].saturating_add(part.shape[0]);
                last.parts.push(part);
            }
            None => files.push(FileTensor {
                spec: TensorSpec {
                    name,
                    shape: part.shape.clone(),
                },
                parts: vec![part],
            }),
        }
    }
    files
}

/// What the tensor is called that a parameter is a part of.
fn fused_name(parameter: &str) -> Option<String> {
    FUSED.iter().find_map(|(fused, parts)| {
        let part = parts
            .iter()
            .find(|part| parameter.contains(&format!(".{part}.")))?;
        Some(parameter.replace(&format!(".{part}."), &format!(".{fused}.")))
    })
}
