//! What the parameters of a decoder are to the optimizer.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Tensor, backend::Backend};

/// The modules of a decoder whose parameters weigh other layers' keys and values.
const FUSION: [&str; 2] = ["kv_fusion", "kv_residual"];
/// The modules that tokens go in and out by.
const VOCABULARY: [&str; 3] = ["embed_tokens", "embed_tokens_per_layer", "lm_head"];
/// The names of parameters that are added or multiplied element by element.
const GAINS: [&str; 4] = ["gamma", "beta", "bias", "layer_scalar"];

/// What a parameter is, as far as its learning rate and decay depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// A projection.
    Matrix,
    /// The embedding, or a head of its own.
    Embedding,
    /// The gain of a norm, or a bias.
    Gain,
    /// The weights of a blend, or the α of YOCO++.
    Fusion,
}

impl Role {
    /// Of the parameter at the end of a path of names.
    fn at(path: &[String]) -> Self {
        let [modules @ .., parameter] = path else {
            return Self::Matrix;
        };
        let of = |names: &[&str]| modules.last().is_some_and(|m| names.contains(&m.as_str()));
        if of(&FUSION) {
            Self::Fusion
        } else if of(&VOCABULARY) {
            Self::Embedding
        } else if GAINS.contains(&parameter.as_str()) {
            Self::Gain
        } else {
            Self::Matrix
        }
    }
}

/// The role of every parameter of a module, by where in the module it is.
#[derive(Clone, Debug)]
pub(super) struct Roles(HashMap<ParamId, Role>);

impl Roles {
    /// Those of a module's parameters as they are now: loading a record renames them.
    pub fn of<B: Backend, M: Module<B>>(module: &M) -> Self {
        let mut visitor = Visitor {
            path: Vec::new(),
            roles: HashMap::new(),
        };
        module.visit(&mut visitor);
        Self(visitor.roles)
    }

    /// The role of a parameter of the module.
    pub fn get(&self, id: ParamId) -> Option<Role> {
        self.0.get(&id).copied()
    }
}

struct Visitor {
    /// Names of the modules around the parameter visited, and its own.
    path: Vec<String>,
    roles: HashMap<ParamId, Role>,
}

impl<B: Backend> ModuleVisitor<B> for Visitor {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.roles.insert(param.id, Role::at(&self.path));
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::train::small_decoder;
    use crate::{KvPart, KvPlan};

    #[test]
    fn roles_are_told_by_the_place_in_the_decoder() {
        for (plan, fusion) in [
            (KvPlan::Standard, 0),
            (KvPlan::FusedKv { storage_layers: 2 }, 2 * 2),
            (KvPlan::YocoPlusPlus { storage_layers: 2 }, 2),
        ] {
            let config = small_decoder(plan).with_tie_embeddings(false);
            let model = config.init::<Flex>(&FlexDevice).unwrap();
            let roles = Roles::of(&model);
            let count = |role| roles.0.values().filter(|&&found| found == role).count();
            assert_eq!(count(Role::Fusion), fusion, "{config}");
            let attention = &model.layers[0].self_attn;
            let stores = config.validate().unwrap().n_stored(KvPart::Key);
            // Two norms a layer, one of queries, one of keys where they are stored, and the last.
            assert_eq!(count(Role::Gain), 4 * 3 + stores + 1);
            // Queries, output and SwiGLU of a layer, keys and values.
            assert_eq!(count(Role::Matrix), 4 * 5 + 2 * stores);
            assert_eq!(count(Role::Embedding), 2);
            for (id, role) in [
                (attention.q_proj.weight.id(), Role::Matrix),
                (attention.q_norm.as_ref().unwrap().gamma.id, Role::Gain),
                (model.norm.gamma.id, Role::Gain),
                (model.embed_tokens.weight.id(), Role::Embedding),
            ] {
                assert_eq!(roles.get(id), Some(role));
            }
        }
    }
}
