//! A linear layer.

use std::ops::Range;

use burn::module::{
    AutodiffModule, Content, Devices, Initializer, Module, ModuleDisplay, ModuleDisplayDefault,
    ModuleMapper, ModuleVisitor, Param,
};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

use super::listed::listed;
use super::lora::Lora;
use super::weight::Weight;
use crate::kernels::linear_each;

/// `x · weight + bias`, and what an adapter adds.
///
/// A module by hand, because records have no adapters: those of before would not be read otherwise.
#[derive(Clone, Debug)]
pub struct Projection<B: Backend> {
    /// `[input, output]`.
    pub(crate) weight: Weight<B>,
    /// `[output]`.
    pub(crate) bias: Option<Param<Tensor<B, 1>>>,
    /// What is added beside the weight, in decoders [with adapters](super::FusedKvDecoder::with_lora).
    pub(crate) lora: Option<Lora<B>>,
}

/// What records have of a [`Projection`].
#[derive(Module, Debug)]
pub struct Recorded<B: Backend> {
    weight: Weight<B>,
    bias: Option<Param<Tensor<B, 1>>>,
}

listed!(RecordedRecord: weight, bias);

impl<B: Backend> Projection<B> {
    /// A bias starts at 0.
    pub(super) fn new(
        shape: [usize; 2],
        bias: bool,
        initializer: &Initializer,
        device: &B::Device,
    ) -> Self {
        let [_, output] = shape;
        Self {
            weight: Weight::new(shape, initializer, device),
            bias: bias.then(|| Initializer::Zeros.init([output], device)),
            lora: None,
        }
    }

    /// # Shapes
    /// - x: `[batch, seq, input]`
    /// - output: `[batch, seq, output]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let product = self.weight.product(x.clone());
        self.completed(product, x)
    }

    /// [`forward`](Self::forward) of several projections of the same x, as one step.
    pub(super) fn forward_each(projections: &[&Self], x: &Tensor<B, 3>) -> Vec<Tensor<B, 3>> {
        let factors: Vec<_> = projections.iter().map(|p| p.weight.factor()).collect();
        let products = linear_each(x, &factors).into_iter();
        let outputs = projections.iter().zip(products);
        outputs
            .map(|(p, product)| p.completed(product, x.clone()))
            .collect()
    }

    /// The product with what is added to it.
    fn completed(&self, product: Tensor<B, 3>, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let output = match &self.bias {
            Some(bias) => product + bias.val().unsqueeze(),
            None => product,
        };
        match &self.lora {
            Some(lora) => output + lora.forward(x),
            None => output,
        }
    }

    /// Some columns of what [`forward`](Self::forward) gives, and the product of no others.
    pub(super) fn forward_to(&self, columns: Range<usize>, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [_, output] = self.weight.dims();
        if columns == (0..output) {
            return self.forward(x);
        }
        let product = self.weight.product_to(columns.clone(), x.clone());
        let output = match &self.bias {
            Some(bias) => {
                let bias = bias.val().narrow(0, columns.start, columns.len());
                product + bias.unsqueeze()
            }
            None => product,
        };
        match &self.lora {
            Some(lora) => output + lora.forward_to(columns, x),
            None => output,
        }
    }
}

impl<B: Backend> Module<B> for Projection<B> {
    type Record = <Recorded<B> as Module<B>>::Record;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        let devices = self.weight.collect_devices(devices);
        let devices = self.bias.collect_devices(devices);
        self.lora.collect_devices(devices)
    }

    fn fork(self, device: &B::Device) -> Self {
        Self {
            weight: self.weight.fork(device),
            bias: self.bias.fork(device),
            lora: self.lora.fork(device),
        }
    }

    fn to_device(self, device: &B::Device) -> Self {
        Self {
            weight: self.weight.to_device(device),
            bias: Module::<B>::to_device(self.bias, device),
            lora: Module::<B>::to_device(self.lora, device),
        }
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        macro_rules! visit {
            ($($field:ident),+) => {$(
                visitor.enter_module(stringify!($field), PROJECTION);
                self.$field.visit(visitor);
                visitor.exit_module(stringify!($field), PROJECTION);
            )+};
        }
        visit!(weight, bias, lora);
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        macro_rules! map {
            ($($field:ident),+) => {
                Self { $($field: {
                    mapper.enter_module(stringify!($field), PROJECTION);
                    let mapped = Module::<B>::map(self.$field, mapper);
                    mapper.exit_module(stringify!($field), PROJECTION);
                    mapped
                }),+ }
            };
        }
        map!(weight, bias, lora)
    }

    fn load_record(self, record: Self::Record) -> Self {
        let Self { weight, bias, lora } = self;
        let Recorded { weight, bias } = Recorded { weight, bias }.load_record(record);
        Self { weight, bias, lora }
    }

    /// # Panics
    /// With an adapter, which would be lost without a word.
    fn into_record(self) -> Self::Record {
        let Self { weight, bias, lora } = self;
        assert!(
            lora.is_none(),
            "a record has no adapters: `merge_lora` puts them into the weights, `save_adapter` saves them"
        );
        Recorded { weight, bias }.into_record()
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for Projection<B> {
    type InnerModule = Projection<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        Projection {
            weight: self.weight.valid(),
            bias: self.bias.valid(),
            lora: self.lora.valid(),
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        Self {
            weight: AutodiffModule::<B>::from_inner(module.weight),
            bias: AutodiffModule::<B>::from_inner(module.bias),
            lora: AutodiffModule::<B>::from_inner(module.lora),
        }
    }
}

/// What Burn calls it.
const PROJECTION: &str = "Struct:Projection";

impl<B: Backend> ModuleDisplayDefault for Projection<B> {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .set_top_level_type("Projection")
            .add("weight", &self.weight)
            .add("bias", &self.bias)
            .add("lora", &self.lora)
            .optional()
    }
}

impl<B: Backend> ModuleDisplay for Projection<B> {}

/// The projections that a module has, by the names of its fields; the ones after the semicolon are
/// optional.
macro_rules! projections {
    ($module:ident: $($field:ident),* $(; $($optional:ident),+)?) => {
        impl<B: Backend> $module<B> {
            pub(super) fn projections(&self) -> Vec<(&'static str, &Projection<B>)> {
                #[allow(unused_mut)]
                let mut all = vec![$((stringify!($field), &self.$field)),*];
                $($(all.extend(self.$optional.as_ref().map(|p| (stringify!($optional), p)));)+)?
                all
            }

            pub(super) fn projections_mut(&mut self) -> Vec<(&'static str, &mut Projection<B>)> {
                #[allow(unused_mut)]
                let mut all = vec![$((stringify!($field), &mut self.$field)),*];
                $($(all.extend(self.$optional.as_mut().map(|p| (stringify!($optional), p)));)+)?
                all
            }
        }
    };
}
pub(super) use projections;
