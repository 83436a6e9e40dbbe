//! Which parameters train.

use std::collections::BTreeSet;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::error::TrainError;
use crate::decoder::LoraConfig;
use crate::parameters::ModulePath;
use crate::plan::{KvLayout, KvPart};

/// The parameters that train; the others stay as they are, without gradients or moments, and no
/// gradient is computed of what is below the lowest of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trainable {
    /// The weights of blends, and the α of YOCO++.
    Fusion,
    /// Those of the layers that reuse other layers' keys or values, under any plan of a
    /// [routing](super::Routing), the weights of their blends among them: what a conversion changes.
    Reusing,
    /// Those whose names in a checkpoint, as `model.layers.3.mlp.up_proj.weight`, are like one of these,
    /// where `*` stands for any letters: `model.layers.3.*`, `*_layernorm.weight`.
    Named(Vec<String>),
    /// Adapters of low rank beside projections, new ones or those that the model to start with has. Its
    /// matrices stay in the format they are in, and checkpoints keep the adapters alone.
    Lora(LoraConfig),
}

impl Trainable {
    /// Whether a parameter trains, by its name in a checkpoint.
    fn selects(&self, name: &str, layouts: &[KvLayout]) -> bool {
        match self {
            Self::Fusion => name.contains(".kv_fusion.") || name.contains(".kv_residual."),
            Self::Reusing => layer_of(name).is_some_and(|layer| {
                let reuses = |part| layouts.iter().any(|layout| !layout.stores(part, layer));
                KvPart::BOTH.into_iter().any(reuses)
            }),
            Self::Named(patterns) => patterns.iter().any(|pattern| is_like(name, pattern)),
            Self::Lora(_) => is_adapter(name),
        }
    }
}

/// Whether a parameter is of an adapter, by its name.
pub(super) fn is_adapter(name: &str) -> bool {
    name.contains(".lora.")
}

/// The layer a parameter is of.
fn layer_of(name: &str) -> Option<usize> {
    let (layer, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
    layer.parse().ok()
}

/// Whether a name is like a pattern with `*`.
fn is_like(name: &str, pattern: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return name == pattern;
    };
    let Some(name) = name.strip_prefix(start) else {
        return false;
    };
    let mut ends = (0..=name.len()).filter(|&end| name.is_char_boundary(end));
    ends.any(|end| is_like(&name[end..], rest))
}

/// Has the chosen parameters of a module train and no others, whatever Burn's flags said: all if none are
/// chosen. `layouts` are those of the plans that it is trained under.
///
/// # Errors
/// [`TrainError::NothingTrains`] if a pattern is like no name, or nothing is left to train.
pub(super) fn choose<B: Backend, M: Module<B>>(
    module: M,
    layouts: &[KvLayout],
    trainable: Option<&Trainable>,
) -> Result<M, TrainError> {
    let mut choose = Choose {
        trainable,
        layouts,
        path: ModulePath::default(),
        names: BTreeSet::new(),
        any: false,
    };
    let module = module.map(&mut choose);
    if let Some(Trainable::Named(patterns)) = trainable {
        let idle = |pattern: &&String| !choose.names.iter().any(|name| is_like(name, pattern));
        if let Some(pattern) = patterns.iter().find(idle) {
            return Err(TrainError::NothingTrains(pattern.clone()));
        }
    }
    match choose.any {
        true => Ok(module),
        false => Err(TrainError::NothingTrains("*".to_owned())),
    }
}

struct Choose<'t> {
    trainable: Option<&'t Trainable>,
    layouts: &'t [KvLayout],
    path: ModulePath,
    names: BTreeSet<String>,
    any: bool,
}

impl<B: Backend> ModuleMapper<B> for Choose<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let name = self.path.tensor();
        let selects = |trainable: &Trainable| trainable.selects(&name, self.layouts);
        let trains = self.trainable.is_none_or(selects);
        self.any |= trains;
        self.names.insert(name);
        param.map(|tensor| tensor.detach().set_require_grad(trains))
    }
}

/// Whether any parameter of a module trains.
pub(super) fn trains<B: Backend, M: Module<B>>(module: &M) -> bool {
    struct Trains(bool);

    impl<B: Backend> ModuleVisitor<B> for Trains {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            // Asked of a matrix in fewer bits, it would be widened.
            self.0 |= param.is_initialized() && param.is_require_grad();
        }
    }

    let mut visitor = Trains(false);
    module.visit(&mut visitor);
    visitor.0
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::train::small_decoder;
    use crate::{FusedKvDecoder, KvPlan};

    type Model = FusedKvDecoder<Autodiff<Flex>>;

    /// How many parameters train, in no layer and layer by layer.
    fn training(trainable: &Trainable) -> Result<[usize; 5], TrainError> {
        struct Count([usize; 5], ModulePath);

        impl<B: Backend> ModuleVisitor<B> for Count {
            fn enter_module(&mut self, name: &str, container: &str) {
                self.1.enter(name, container);
            }

            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.1.exit();
            }

            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let place = layer_of(&self.1.tensor()).map_or(0, |layer| layer + 1);
                self.0[place] += usize::from(param.is_require_grad());
            }
        }

        let plan = KvPlan::FusedKv { storage_layers: 2 };
        let model: Model = small_decoder(plan).init(&FlexDevice).unwrap();
        let mut count = Count([0; 5], ModulePath::default());
        let layouts = [model.layout().clone()];
        choose(model, &layouts, Some(trainable))?.visit(&mut count);
        Ok(count.0)
    }

    #[test]
    fn parameters_are_chosen_by_what_they_are_or_are_named() {
        let named = |patterns: &[&str]| {
            Trainable::Named(patterns.iter().map(|&pattern| pattern.to_owned()).collect())
        };
        for (trainable, expected) in [
            (Trainable::Fusion, [0, 0, 0, 2, 2]),
            // Two norms and one of queries; queries, output and SwiGLU; weights of the blends.
            (Trainable::Reusing, [0, 0, 0, 10, 10]),
            (named(&["model.layers.1.*"]), [0, 0, 11, 0, 0]),
            (
                named(&["*.mlp.*_proj.weight", "model.norm.weight"]),
                [1, 3, 3, 3, 3],
            ),
            (
                named(&["model.embed_tokens.weight", "*fusion*key*"]),
                [1, 0, 0, 1, 1],
            ),
            (named(&["*"]), [2, 11, 11, 10, 10]),
        ] {
            assert_eq!(training(&trainable).unwrap(), expected, "{trainable:?}");
        }
        for (patterns, idle) in [
            (&["*", "layers.1.*"][..], "layers.1.*"),
            (&["model.norm"], "model.norm"),
            (&[], "*"),
        ] {
            let error = training(&named(patterns)).unwrap_err();
            assert!(
                matches!(&error, TrainError::NothingTrains(p) if p == idle),
                "{error}"
            );
        }
    }
}
