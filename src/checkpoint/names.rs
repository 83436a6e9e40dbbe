//! A decoder's parameters, one by one, by the names that files have.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::decoder::FusedKvDecoder;
use crate::parameters::ModulePath;

/// Calls a function for every parameter of a decoder, in order.
pub(super) fn visit<B: Backend>(model: &FusedKvDecoder<B>, visitor: &mut impl ParameterVisitor<B>) {
    model.visit(&mut Named {
        path: ModulePath::default(),
        visitor,
    });
}

/// What is done with a parameter.
pub(super) trait ParameterVisitor<B: Backend> {
    fn parameter<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<B, D>>);
}

struct Named<'v, V> {
    path: ModulePath,
    visitor: &'v mut V,
}

impl<B: Backend, V: ParameterVisitor<B>> ModuleVisitor<B> for Named<'_, V> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.visitor.parameter(&self.path, param);
    }
}
