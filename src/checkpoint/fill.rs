//! A decoder of the tensors in files, one after another.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Tensor, TensorData, backend::Backend};

use super::config::ModelConfig;
use super::error::CheckpointError;
use super::numbers::WeightDtype;
use super::read::{Kind, Loaded, Reading, read_all};
use super::tensors::{FileTensor, TensorFiles};
use crate::decoder::{FusedKvDecoder, Weight, WeightFormat};
use crate::kernels::packed::Packed;
use crate::parameters::{ModulePath, TensorSpec};

/// A parameter: a part of a tensor of files.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub tensor: Arc<FileTensor>,
    pub number: usize,
}

impl Part {
    pub fn spec(&self) -> &TensorSpec {
        &self.tensor.parts[self.number]
    }
}

/// What a decoder is made of.
pub(super) struct Filling<'f> {
    pub files: &'f dyn TensorFiles,
    /// Its parameters.
    pub expected: Vec<Part>,
    /// Its float type.
    pub dtype: WeightDtype,
    /// That of its matrices.
    pub format: WeightFormat,
    /// Set by whoever needs the decoder no more: what is left is then not read.
    pub stopped: &'f AtomicBool,
}

impl Filling<'_> {
    /// The decoder.
    pub fn decoder<B: Backend>(
        self,
        config: &ModelConfig,
        device: &B::Device,
    ) -> Result<FusedKvDecoder<B>, CheckpointError> {
        // Parameters have no memory before they are used, or replaced.
        let model = config.decoder.init::<B>(device);
        let mut model = model.map_err(|source| config.invalid(source))?;
        // Projections' matrices are [in, out] in memory and [out, in] in files.
        let mut matrices = HashMap::new();
        model.try_for_each_weight(|name, _, outputs| {
            matrices.insert(name.to_owned(), outputs == 1);
            Ok::<(), CheckpointError>(())
        })?;
        let of_model = self.format == WeightFormat::Model;
        let planned = |part: Part| {
            let kind = match (matrices.get(&part.spec().name), self.format.codes()) {
                (Some(_), Some(codes)) => Kind::Packed(self.format, codes),
                (Some(&linear), None) => Kind::Float {
                    dtype: match self.format {
                        WeightFormat::F16 => WeightDtype::F16,
                        WeightFormat::Bf16 => WeightDtype::Bf16,
                        _ => self.dtype,
                    },
                    transposed: linear && of_model,
                },
                (None, _) => Kind::Float {
                    dtype: self.dtype,
                    transposed: false,
                },
            };
            (part, kind)
        };
        let mut filler = Filler {
            path: ModulePath::default(),
            waiting: self.expected.into_iter().map(planned).collect(),
            ready: HashMap::new(),
            later: HashSet::new(),
            files: self.files,
            device,
            stopped: self.stopped,
            failed: None,
        };
        if !of_model {
            // They are what parameters of the decoder are not.
            let all = std::mem::take(&mut filler.waiting).into_iter();
            let (later, now): (Vec<_>, Vec<_>) =
                all.partition(|(part, _)| matrices.contains_key(&part.spec().name));
            filler.later = matrices.into_keys().collect();
            filler.waiting = now.into_iter().chain(later).collect();
        }
        model = model.map(&mut filler);
        if let Some(error) = filler.failed.take() {
            return Err(error);
        }
        if !of_model {
            model.try_for_each_weight(|name, weight, outputs| {
                if !filler.is_stopped() {
                    *weight = filler.weight(name, weight.id(), outputs)?;
                }
                Ok::<(), CheckpointError>(())
            })?;
        }
        Ok(model)
    }
}

/// Bytes that are read before they are asked for, so that threads need not wait for each other at
/// every tensor. Where a device copies what it is given, there are so many twice.
const AHEAD: usize = 1 << 26;

/// Replaces every parameter by its tensor.
struct Filler<'f, B: Backend> {
    path: ModulePath,
    /// Parameters, about in the order they are asked for.
    waiting: VecDeque<(Part, Kind)>,
    /// Those that have been read, by name.
    ready: HashMap<String, Loaded>,
    /// Matrices that become something else than a parameter of the decoder's float type.
    later: HashSet<String>,
    files: &'f dyn TensorFiles,
    device: &'f B::Device,
    stopped: &'f AtomicBool,
    failed: Option<CheckpointError>,
}

impl<B: Backend> Filler<'_, B> {
    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// A parameter's numbers.
    fn take(&mut self, name: &str) -> Result<Loaded, CheckpointError> {
        loop {
            if let Some(tensor) = self.ready.remove(name) {
                return Ok(tensor);
            }
            self.read_ahead()?;
        }
    }

    /// Reads some of those that are waiting, one at least.
    fn read_ahead(&mut self) -> Result<(), CheckpointError> {
        let (mut parts, mut readings, mut bytes) = (Vec::new(), Vec::new(), 0);
        while bytes < AHEAD
            && let Some((part, kind)) = self.waiting.pop_front()
        {
            let source = self.files.rows(&part.tensor, part.number)?;
            let reading = Reading::new(source, kind);
            bytes += reading.bytes();
            readings.push(reading);
            parts.push(part);
        }
        assert!(
            !parts.is_empty(),
            "checkpoints have the decoder's parameters"
        );
        read_all(&mut readings)?;
        for (part, reading) in parts.into_iter().zip(readings) {
            let spec = part.spec();
            let tensor = reading.finish(spec.shape.clone());
            self.ready.insert(spec.name.clone(), tensor);
        }
        Ok(())
    }

    fn float<const D: usize>(&self, data: TensorData) -> Tensor<B, D> {
        let dtype = data.dtype;
        Tensor::from_data(data, (self.device, dtype))
    }

    /// A matrix in a format that is not the decoder's float type; as it lies in the file, which has
    /// a row for each output.
    fn weight(
        &mut self,
        name: &str,
        id: ParamId,
        outputs: usize,
    ) -> Result<Weight<B>, CheckpointError> {
        let transposed = outputs == 1;
        Ok(match self.take(name)? {
            Loaded::Packed(rows) => {
                let matrix = Packed::new(rows, self.device);
                Weight::packed(
                    id,
                    match transposed {
                        true => matrix.transpose(),
                        false => matrix,
                    },
                )
            }
            Loaded::Float(data) => {
                let matrix: Tensor<B, 2> = self.float(data);
                let matrix = match transposed {
                    true => matrix.transpose(),
                    false => matrix,
                };
                Param::initialized(id, matrix).into()
            }
        })
    }
}

impl<B: Backend> ModuleMapper<B> for Filler<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let name = self.path.tensor();
        if self.failed.is_some() || self.later.contains(&name) || self.is_stopped() {
            return param;
        }
        let id = param.id;
        match self.take(&name) {
            Ok(Loaded::Float(data)) => param.transform_for_load(self.float(data), id),
            Ok(Loaded::Packed(_)) => unreachable!("packed matrices come later"),
            Err(error) => {
                self.failed = Some(error);
                param
            }
        }
    }
}
