//! The tensors of a record, and those of a decoder, to be compared.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::parameters::{ModulePath, TensorSpec};

/// A record that can list its tensors as [`tensors_of`] a module does: by the names that checkpoints have,
/// in shapes as in memory.
pub(super) trait Listed {
    fn list(&self, path: &mut ModulePath, tensors: &mut Vec<TensorSpec>);
}

impl<B: Backend, const D: usize> Listed for Param<Tensor<B, D>> {
    fn list(&self, path: &mut ModulePath, tensors: &mut Vec<TensorSpec>) {
        tensors.push(TensorSpec {
            name: path.tensor(),
            shape: self.lazy_shape().to_vec(),
        });
    }
}

impl<R: Listed> Listed for Option<R> {
    fn list(&self, path: &mut ModulePath, tensors: &mut Vec<TensorSpec>) {
        if let Some(record) = self {
            record.list(path, tensors);
        }
    }
}

impl<R: Listed> Listed for Vec<R> {
    fn list(&self, path: &mut ModulePath, tensors: &mut Vec<TensorSpec>) {
        for (i, record) in self.iter().enumerate() {
            path.enter(&i.to_string(), "Vec");
            record.list(path, tensors);
            path.exit();
        }
    }
}

/// [`Listed`] of a module's record by the fields that have parameters, in the module's order.
macro_rules! listed {
    ($record:ident: $($field:ident),+) => {
        impl<B: Backend> crate::decoder::listed::Listed for $record<B> {
            fn list(
                &self,
                path: &mut crate::parameters::ModulePath,
                tensors: &mut Vec<crate::parameters::TensorSpec>,
            ) {
                $(
                    path.enter(stringify!($field), stringify!($record));
                    self.$field.list(path, tensors);
                    path.exit();
                )+
            }
        }
    };
}
pub(super) use listed;

/// The tensors of a module; no parameter draws its numbers for it.
pub(super) fn tensors_of<B: Backend>(module: &impl Module<B>) -> Vec<TensorSpec> {
    #[derive(Default)]
    struct Visitor {
        path: ModulePath,
        tensors: Vec<TensorSpec>,
    }

    impl<B: Backend> ModuleVisitor<B> for Visitor {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            param.list(&mut self.path, &mut self.tensors);
        }
    }

    let mut visitor = Visitor::default();
    module.visit(&mut visitor);
    visitor.tensors
}
