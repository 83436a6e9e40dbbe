//! The matrices of a decoder, and what they are made of.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use burn::module::{
    AutodiffModule, Content, Devices, Initializer, Module, ModuleDisplay, ModuleDisplayDefault,
    ModuleMapper, ModuleVisitor, Param, ParamId,
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Tensor};
use thiserror::Error;

use crate::kernels::operands::Factor;
use crate::kernels::packed::{Codes, Packed, PackedRows};
use crate::kernels::{linear, linear_packed, tied_head};
use crate::numbers::numbers;

/// What numbers the matrices of a decoder are kept in: its projections, embedding and head. All else,
/// and what is computed, is of the decoder's own float type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightFormat {
    /// The decoder's own float type.
    #[default]
    Model,
    /// 2 bytes, IEEE half precision.
    F16,
    /// 2 bytes, the upper half of an f32.
    Bf16,
    /// 8 bits, and an f16 scale for every 32 inputs of an output: 8.5 bits a weight, off by at most
    /// 1/254 of the largest magnitude among the 32. GGUF's Q8_0.
    Int8,
    /// 4 bits, and an f16 scale and offset for every 32 inputs of an output: 5 bits a weight, in 16
    /// steps from the least of the 32 to the largest. GGUF's Q4_1.
    Int4,
}

/// A format that there is not.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum WeightError {
    /// The backend has no such numbers.
    #[error("weights are to be {format}, which the backend {backend} has no numbers for")]
    Unsupported {
        /// What they were to be.
        format: WeightFormat,
        /// The backend's name.
        backend: String,
    },
    /// A name of no format.
    #[error("the weight format is `{0}`, expected one of {known}", known = names())]
    Unknown(String),
    /// A number that the format is too small for.
    #[error("a weight of `{tensor}` is {value}, which {format} has no number for")]
    Overflow {
        /// The matrix, as files call it.
        tensor: String,
        /// The weight.
        value: f32,
        /// What it was to be.
        format: WeightFormat,
    },
}

fn names() -> String {
    let names = WeightFormat::NAMES.iter().map(|(name, _)| *name);
    names.collect::<Vec<_>>().join(", ")
}

impl WeightFormat {
    /// Every format with its name, as on command lines.
    pub const NAMES: &'static [(&'static str, Self)] = &[
        ("model", Self::Model),
        ("f16", Self::F16),
        ("bf16", Self::Bf16),
        ("int8", Self::Int8),
        ("int4", Self::Int4),
    ];

    /// Of formats in groups, how their numbers are written.
    pub(crate) fn codes(self) -> Option<Codes> {
        match self {
            Self::Int8 => Some(Codes::Int8),
            Self::Int4 => Some(Codes::Int4),
            Self::Model | Self::F16 | Self::Bf16 => None,
        }
    }

    /// The float type, of the others; `model` is the decoder's.
    pub(crate) fn float(self, model: DType) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Model | Self::Int8 | Self::Int4 => model,
        }
    }

    /// That a backend has the numbers.
    pub(crate) fn check<B: Backend>(self, device: &B::Device) -> Result<(), WeightError> {
        let needed = match self {
            Self::Model => return Ok(()),
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Int8 | Self::Int4 => DType::I8,
        };
        match B::supports_dtype(device, needed) {
            true => Ok(()),
            false => Err(WeightError::Unsupported {
                format: self,
                backend: B::name(device),
            }),
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Self::NAMES.iter().find(|(_, format)| format == self);
        f.pad(known.map_or("unnamed", |(name, _)| name))
    }
}

impl FromStr for WeightFormat {
    type Err = WeightError;

    fn from_str(name: &str) -> Result<Self, WeightError> {
        let known = Self::NAMES.iter().find(|(known, _)| *known == name);
        known
            .map(|(_, format)| *format)
            .ok_or_else(|| WeightError::Unknown(name.to_owned()))
    }
}

/// A matrix of a decoder: a parameter, or packed in fewer bits.
///
/// Whoever visits a module's parameters sees a packed matrix as one of f32, which it is widened to
/// when it is looked at, and so does a record have it; what is loaded from one is a parameter again.
/// It is a constant to whoever maps them: it has no gradient, and stays as it is.
#[derive(Clone, Debug)]
pub enum Weight<B: Backend> {
    /// Floats of any type, in any layout.
    Float(Param<Tensor<B, 2>>),
    /// Integers in groups.
    Packed(PackedWeight<B>),
}

/// A matrix of integers in groups of 32 that share a scale: [`WeightFormat::Int8`] and
/// [`WeightFormat::Int4`].
#[derive(Clone, Debug)]
pub struct PackedWeight<B: Backend> {
    id: ParamId,
    pub(crate) matrix: Packed<B>,
}

impl<B: Backend> PackedWeight<B> {
    fn widened(&self) -> Param<Tensor<B, 2>> {
        let matrix = self.matrix.clone();
        let shape = matrix.dims().into();
        let device = matrix.device();
        Param::uninitialized(
            self.id,
            move |_, _| matrix.clone().widen(DType::F32),
            device,
            false,
            shape,
        )
    }
}

impl<B: Backend> From<Param<Tensor<B, 2>>> for Weight<B> {
    fn from(param: Param<Tensor<B, 2>>) -> Self {
        Self::Float(param)
    }
}

impl<B: Backend> Weight<B> {
    pub(super) fn new(shape: [usize; 2], initializer: &Initializer, device: &B::Device) -> Self {
        let [input, output] = shape;
        let param = initializer.init_with(shape, Some(input), Some(output), device);
        Self::Float(param)
    }

    /// The numbers: a float matrix as it is, another widened to f32.
    pub fn val(&self) -> Tensor<B, 2> {
        match self {
            Self::Float(param) => param.val(),
            Self::Packed(packed) => packed.matrix.clone().widen(DType::F32),
        }
    }

    /// Of the parameter that it is, or was.
    pub fn id(&self) -> ParamId {
        match self {
            Self::Float(param) => param.id,
            Self::Packed(packed) => packed.id,
        }
    }

    /// Whether it takes gradients.
    pub fn is_require_grad(&self) -> bool {
        match self {
            Self::Float(param) => param.is_require_grad(),
            Self::Packed(_) => false,
        }
    }

    /// `[rows, columns]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Float(param) => param.lazy_shape().dims(),
            Self::Packed(packed) => packed.matrix.dims(),
        }
    }

    /// The numbers through a function; a parameter.
    #[must_use]
    pub fn map(self, f: impl FnOnce(Tensor<B, 2>) -> Tensor<B, 2>) -> Self {
        Self::Float(self.into_param().map(f))
    }

    /// Bytes it takes as allocated.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Float(param) => {
                let tensor = param.val();
                tensor.shape().num_elements() * tensor.dtype().size()
            }
            Self::Packed(packed) => packed.matrix.bytes(),
        }
    }

    /// What it is in; [`WeightFormat::Model`] for a float type that is none of the others.
    pub fn format(&self) -> WeightFormat {
        match self {
            Self::Float(param) => match param.val().dtype() {
                DType::F16 => WeightFormat::F16,
                DType::BF16 => WeightFormat::Bf16,
                _ => WeightFormat::Model,
            },
            Self::Packed(packed) => match packed.matrix.kind {
                Codes::Int8 => WeightFormat::Int8,
                Codes::Int4 => WeightFormat::Int4,
            },
        }
    }

    fn into_param(self) -> Param<Tensor<B, 2>> {
        match self {
            Self::Float(param) => param,
            Self::Packed(packed) => packed.widened(),
        }
    }

    pub(crate) fn packed(id: ParamId, matrix: Packed<B>) -> Self {
        Self::Packed(PackedWeight { id, matrix })
    }

    /// `x · self`, `[batch, seq, input]` to `[batch, seq, output]`.
    pub(super) fn product(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        match self {
            Self::Float(param) => linear(x, param.val()),
            Self::Packed(packed) => linear_packed(x, &packed.matrix),
        }
    }

    /// What rows are multiplied with.
    pub(super) fn factor(&self) -> Factor<B> {
        match self {
            Self::Float(param) => Factor::Float(param.val()),
            Self::Packed(packed) => Factor::Packed(packed.matrix.clone()),
        }
    }

    /// Some columns of [`product`](Self::product), and the product of no others.
    pub(super) fn product_to(&self, columns: Range<usize>, x: Tensor<B, 3>) -> Tensor<B, 3> {
        match self {
            Self::Float(param) => linear(x, param.val().narrow(1, columns.start, columns.len())),
            Self::Packed(packed) => {
                let rows = packed.matrix.clone().transpose();
                linear_packed(x, &rows.narrow(columns).transpose())
            }
        }
    }

    /// `x · selfᵀ`: the logits of a decoder whose head is its embedding.
    pub(super) fn transposed_product(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        match self {
            Self::Float(param) => tied_head(x, param.val()),
            Self::Packed(packed) => linear_packed(x, &packed.matrix.clone().transpose()),
        }
    }

    /// In another format. `outputs` is the dimension of the outputs: numbers of one output lie side
    /// by side in every format but the model's.
    ///
    /// # Errors
    /// The first number that the format cannot hold.
    pub(crate) fn into_format(
        self,
        format: WeightFormat,
        model: DType,
        outputs: usize,
    ) -> Result<Self, f32> {
        let transposed = outputs == 1;
        let of_outputs = |matrix: Tensor<B, 2>| match transposed {
            true => matrix.transpose(),
            false => matrix,
        };
        let id = self.id();
        let matrix = self.val();
        let device = matrix.device();
        match format.codes() {
            None if format == WeightFormat::Model => {
                Ok(Self::Float(Param::initialized(id, matrix.cast(model))))
            }
            None => {
                let dtype = format.float(model);
                let data = of_outputs(matrix).into_data();
                let limit = match dtype {
                    DType::F16 => 65520.0,
                    _ => 3.396e38,
                };
                if let Some(x) = data
                    .iter::<f32>()
                    .find(|x| x.is_finite() && x.abs() >= limit)
                {
                    return Err(x);
                }
                // From data, so that it lies in one piece.
                let data = data.convert_dtype(dtype);
                let narrow = Tensor::from_data(data, (&device, dtype));
                Ok(Self::Float(Param::initialized(id, of_outputs(narrow))))
            }
            Some(codes) => {
                let [rows, columns] = of_outputs(matrix.clone()).dims();
                let mut packed = PackedRows::new(codes, rows, columns);
                packed.write(&numbers(of_outputs(matrix)))?;
                let packed = Packed::new(packed, &device);
                let packed = match transposed {
                    true => packed.transpose(),
                    false => packed,
                };
                Ok(Self::packed(id, packed))
            }
        }
    }
}

impl<B: Backend> Module<B> for Weight<B> {
    type Record = Param<Tensor<B, 2>>;

    fn collect_devices(&self, mut devices: Devices<B>) -> Devices<B> {
        match self {
            Self::Float(param) => param.collect_devices(devices),
            Self::Packed(packed) => {
                let device = packed.matrix.device();
                if !devices.contains(&device) {
                    devices.push(device);
                }
                devices
            }
        }
    }

    fn fork(self, device: &B::Device) -> Self {
        match self {
            Self::Float(param) => Self::Float(param.fork(device)),
            packed => packed.to_device(device),
        }
    }

    fn to_device(self, device: &B::Device) -> Self {
        match self {
            Self::Float(param) => Self::Float(param.to_device(device)),
            Self::Packed(PackedWeight { id, matrix }) => Self::packed(
                id,
                matrix.map(|codes| codes.to_device(device), |x| x.to_device(device)),
            ),
        }
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        match self {
            Self::Float(param) => visitor.visit_float(param),
            Self::Packed(packed) => visitor.visit_float(&packed.widened()),
        }
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        match self {
            Self::Float(param) => Self::Float(mapper.map_float(param)),
            packed => packed,
        }
    }

    fn load_record(self, record: Self::Record) -> Self {
        Self::Float(self.into_param().load_record(record))
    }

    fn into_record(self) -> Self::Record {
        self.into_param().into_record()
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for Weight<B> {
    type InnerModule = Weight<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        match self {
            Self::Float(param) => Weight::Float(param.valid()),
            Self::Packed(PackedWeight { id, matrix }) => {
                let matrix = matrix.clone().map(Tensor::inner, Tensor::inner);
                Weight::packed(*id, matrix)
            }
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        match module {
            Weight::Float(param) => Self::Float(Param::from_inner(param)),
            Weight::Packed(PackedWeight { id, matrix }) => {
                Self::packed(id, matrix.map(Tensor::from_inner, Tensor::from_inner))
            }
        }
    }
}

impl<B: Backend> ModuleDisplayDefault for Weight<B> {
    fn content(&self, content: Content) -> Option<Content> {
        match self {
            Self::Float(param) => param.content(content),
            Self::Packed(_) => {
                let text = format!("{:?} {}", self.dims(), self.format());
                content.add_formatted(&text).optional()
            }
        }
    }
}

impl<B: Backend> ModuleDisplay for Weight<B> {}
