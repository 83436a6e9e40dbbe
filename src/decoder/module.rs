//! A decoder as Burn's modules are. By hand, because a record is compared with the whole decoder before
//! any of it is loaded.

use burn::module::{
    AutodiffModule, Content, Devices, EmptyRecord, HasAutodiffModule, Module, ModuleDisplay,
    ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::backend::{AutodiffBackend, Backend};

use super::FusedKvDecoder;
use super::listed::{Listed, tensors_of};
use super::record::{DecoderRecord, PlanRecord};
use crate::parameters::{ModulePath, TensorSpec};
use crate::plan::KvPart;

/// What Burn calls it.
const DECODER: &str = "Struct:FusedKvDecoder";

/// `$do` of the fields that have parameters, in the order of files.
macro_rules! with_modules {
    ($do:ident!($($rest:tt)*)) => {
        $do!(
            [embed_tokens, embed_tokens_per_layer, per_layer_model_projection,
             per_layer_projection_norm, layers, norm, lm_head]
            $($rest)*
        )
    };
}

/// A decoder of what `$body` makes of every module of `$decoder`, or of a reference to it.
macro_rules! rebuilt {
    ($decoder:expr, |$name:ident, $module:ident| $body:expr) => {
        with_modules!(rebuild!($decoder, |$name, $module| $body))
    };
}

macro_rules! rebuild {
    ([$($field:ident),+] $decoder:expr, |$name:ident, $module:ident| $body:expr) => {{
        let FusedKvDecoder {
            $($field,)+
            layout,
            dropout,
            ropes,
            windows,
            cache_shape,
            config,
            lora,
            prefill_chunk,
        } = $decoder;
        FusedKvDecoder {
            $($field: {
                let ($name, $module) = (stringify!($field), $field);
                $body
            },)+
            layout: layout.to_owned(),
            dropout: dropout.to_owned(),
            ropes: ropes.to_owned(),
            windows: windows.to_owned(),
            cache_shape: cache_shape.to_owned(),
            config: config.to_owned(),
            lora: lora.to_owned(),
            prefill_chunk: prefill_chunk.to_owned(),
        }
    }};
}

impl<B: Backend> DecoderRecord<B> {
    /// Its tensors as [`tensors_of`] a decoder.
    pub(super) fn tensors(&self) -> Vec<TensorSpec> {
        let (mut path, mut tensors) = (ModulePath::default(), Vec::new());
        macro_rules! list {
            ([$($field:ident),+]) => {$(
                path.enter(stringify!($field), DECODER);
                self.$field.list(&mut path, &mut tensors);
                path.exit();
            )+};
        }
        with_modules!(list!());
        tensors
    }
}

impl<B: Backend> FusedKvDecoder<B> {
    /// Loads a record that is of this decoder.
    pub(super) fn load_checked(self, record: DecoderRecord<B>) -> Self {
        macro_rules! load {
            ([$($field:ident),+]) => {
                Self { $($field: self.$field.load_record(record.$field),)+ ..self }
            };
        }
        with_modules!(load!())
    }
}

impl<B: Backend> Module<B> for FusedKvDecoder<B> {
    type Record = DecoderRecord<B>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        macro_rules! collect {
            ([$($field:ident),+]) => {{
                $(let devices = self.$field.collect_devices(devices);)+
                devices
            }};
        }
        with_modules!(collect!())
    }

    fn fork(self, device: &B::Device) -> Self {
        rebuilt!(self, |_name, module| Module::<B>::fork(module, device))
    }

    fn to_device(self, device: &B::Device) -> Self {
        rebuilt!(self, |_name, module| Module::<B>::to_device(module, device))
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        macro_rules! visit {
            ([$($field:ident),+]) => {$(
                visitor.enter_module(stringify!($field), DECODER);
                self.$field.visit(visitor);
                visitor.exit_module(stringify!($field), DECODER);
            )+};
        }
        with_modules!(visit!());
    }

    /// # Panics
    /// If the mapper gives a parameter another shape: some would be broadcast without a word.
    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        let shapes = tensors_of(&self);
        let mapped = rebuilt!(self, |name, module| {
            mapper.enter_module(name, DECODER);
            let module = Module::<B>::map(module, mapper);
            mapper.exit_module(name, DECODER);
            module
        });
        for (expected, found) in shapes.iter().zip(tensors_of(&mapped)) {
            let (TensorSpec { name, shape }, found) = (expected, found.shape);
            assert_eq!(found, *shape, "a mapper changed the shape of `{name}`");
        }
        mapped
    }

    /// # Panics
    /// If the record is not of this decoder, because Burn's loading knows no errors;
    /// [`FusedKvDecoder::try_load_record`] returns them.
    fn load_record(self, record: DecoderRecord<B>) -> Self {
        if let Err(error) = self.check_record(&record) {
            panic!("{error}; `try_load_record` returns this as an error");
        }
        self.load_checked(record)
    }

    fn into_record(self) -> DecoderRecord<B> {
        macro_rules! record {
            ([$($field:ident),+]) => {
                DecoderRecord {
                    plan: PlanRecord::new(&self.layout),
                    $($field: self.$field.into_record(),)+
                    dropout: EmptyRecord,
                    ropes: EmptyRecord,
                    windows: EmptyRecord,
                    cache_shape: EmptyRecord,
                    config: EmptyRecord,
                    prefill_chunk: EmptyRecord,
                }
            };
        }
        with_modules!(record!())
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for FusedKvDecoder<B> {
    type InnerModule = FusedKvDecoder<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        rebuilt!(self, |_name, module| AutodiffModule::<B>::valid(module))
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        rebuilt!(module, |_name, module| AutodiffModule::<B>::from_inner(
            module
        ))
    }
}

impl<B: AutodiffBackend> HasAutodiffModule<B> for FusedKvDecoder<B::InnerBackend> {
    type TrainModule = FusedKvDecoder<B>;
}

impl<B: Backend> ModuleDisplayDefault for FusedKvDecoder<B> {
    fn content(&self, content: Content) -> Option<Content> {
        let [keys, values] = KvPart::BOTH.map(|part| self.layout.n_stored(part));
        let layers = self.layout.n_layers();
        let plan = format!("of {layers} layers, {keys} store keys, {values} values");
        let content = content
            .set_top_level_type("FusedKvDecoder")
            .add_formatted(&plan);
        macro_rules! content {
            ([$($field:ident),+]) => { content$(.add(stringify!($field), &self.$field))+ };
        }
        with_modules!(content!()).optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<B: Backend> ModuleDisplay for FusedKvDecoder<B> {}

impl<B: Backend> std::fmt::Display for FusedKvDecoder<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&ModuleDisplay::format(self, Default::default()))
    }
}
