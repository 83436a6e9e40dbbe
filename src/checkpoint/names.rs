//! The parameters that a checkpoint's tensors are.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::decoder::FusedKvDecoder;

/// Where a walk through a decoder's modules stands.
#[derive(Clone, Debug, Default)]
pub(crate) struct ModulePath(Vec<(String, bool)>);

impl ModulePath {
    pub fn enter(&mut self, name: &str, container: &str) {
        self.0
            .push((name.to_owned(), container == "Struct:Projection"));
    }

    pub fn exit(&mut self) {
        self.0.pop();
    }

    /// The name a checkpoint has for the parameter.
    pub fn tensor(&self) -> String {
        let mut names: Vec<&str> = self.0.iter().map(|(name, _)| &**name).collect();
        if let Some(name @ &mut "gamma") = names.last_mut() {
            *name = "weight";
        }
        if names.first() != Some(&"lm_head") {
            names.insert(0, "model");
        }
        names.join(".")
    }

    /// Whether the parameter is of a projection: [in, out] in memory, [out, in] in files.
    pub fn is_linear(&self) -> bool {
        matches!(self.0.last(), Some((_, true)))
    }
}

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
