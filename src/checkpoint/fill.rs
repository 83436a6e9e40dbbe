//! A decoder of the tensors in files, one after another.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Tensor, TensorData, backend::Backend, bf16, f16};

use super::config::ModelConfig;
use super::error::CheckpointError;
use super::names::ModulePath;
use super::numbers::{Number, WeightDtype};
use super::read::{self, Rows};
use super::tensors::{FileTensor, TensorFiles};
use crate::decoder::{FusedKvDecoder, Weight, WeightFormat};
use crate::kernels::packed::Packed;
use crate::parameters::TensorSpec;

/// A parameter: a part of a tensor of files.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub tensor: Rc<FileTensor>,
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
        let format = self.format;
        let mut later = HashSet::new();
        if format != WeightFormat::Model {
            later.extend(model.weights().into_iter().map(|(name, _)| name));
        }
        let expected = self.expected.into_iter();
        let mut filler = Filler {
            path: ModulePath::default(),
            expected: expected
                .map(|part| (part.spec().name.clone(), part))
                .collect(),
            later,
            files: self.files,
            dtype: self.dtype,
            device,
            stopped: self.stopped,
            failed: None,
        };
        model = model.map(&mut filler);
        if let Some(error) = filler.failed.take() {
            return Err(error);
        }
        if format != WeightFormat::Model {
            model.try_for_each_weight(|name, weight, outputs| {
                if !filler.is_stopped() {
                    *weight = filler.weight(name, weight.id(), format, outputs)?;
                }
                Ok::<(), CheckpointError>(())
            })?;
        }
        Ok(model)
    }
}

/// Replaces every parameter by its tensor.
struct Filler<'f, B: Backend> {
    path: ModulePath,
    /// By the name of the parameter.
    expected: HashMap<String, Part>,
    /// Matrices that become something else than a parameter of the decoder's float type.
    later: HashSet<String>,
    files: &'f dyn TensorFiles,
    dtype: WeightDtype,
    device: &'f B::Device,
    stopped: &'f AtomicBool,
    failed: Option<CheckpointError>,
}

impl<'f, B: Backend> Filler<'f, B> {
    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// A parameter's rows and its shape.
    fn take(&mut self, name: &str) -> Result<(Box<dyn Rows + 'f>, Vec<usize>), CheckpointError> {
        let part = self.expected.remove(name);
        let part = part.expect("checkpoints have the decoder's parameters");
        let rows = self.files.rows(&part.tensor, part.number)?;
        Ok((rows, part.spec().shape.clone()))
    }

    fn tensor<const D: usize>(&mut self, name: &str) -> Result<Tensor<B, D>, CheckpointError> {
        // A bias is a vector.
        let transposed = self.path.is_linear() && D == 2;
        match self.dtype {
            WeightDtype::F32 => self.tensor_of::<f32, D>(name, transposed),
            WeightDtype::F16 => self.tensor_of::<f16, D>(name, transposed),
            WeightDtype::Bf16 => self.tensor_of::<bf16, D>(name, transposed),
        }
    }

    fn tensor_of<T: Number, const D: usize>(
        &mut self,
        name: &str,
        transposed: bool,
    ) -> Result<Tensor<B, D>, CheckpointError> {
        let (rows, mut shape) = self.take(name)?;
        let numbers = read::numbers::<T>(&*rows, transposed)?;
        if transposed {
            shape.reverse();
        }
        let data = TensorData::new(numbers, shape);
        Ok(Tensor::from_data(data, (self.device, T::DTYPE.in_memory())))
    }

    /// A matrix in a format that is not the decoder's float type; as it lies in the file, which has
    /// a row for each output.
    fn weight(
        &mut self,
        name: &str,
        id: ParamId,
        format: WeightFormat,
        outputs: usize,
    ) -> Result<Weight<B>, CheckpointError> {
        if let Some(codes) = format.codes() {
            let (rows, _) = self.take(name)?;
            let matrix = Packed::new(read::packed(&*rows, codes, format)?, self.device);
            return Ok(Weight::packed(
                id,
                match outputs {
                    0 => matrix,
                    _ => matrix.transpose(),
                },
            ));
        }
        let matrix: Tensor<B, 2> = match format {
            WeightFormat::F16 => self.tensor_of::<f16, 2>(name, false)?,
            _ => self.tensor_of::<bf16, 2>(name, false)?,
        };
        let matrix = match outputs {
            0 => matrix,
            _ => matrix.transpose(),
        };
        Ok(Param::initialized(id, matrix).into())
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
        match self.tensor(&name) {
            Ok(tensor) => param.transform_for_load(tensor, id),
            Err(error) => {
                self.failed = Some(error);
                param
            }
        }
    }
}
