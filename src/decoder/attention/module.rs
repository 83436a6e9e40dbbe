//! An attention as Burn's modules are: by the names of its [`Parameters`].

use burn::module::{
    AutodiffModule, Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
    ModuleVisitor,
};
use burn::tensor::backend::{AutodiffBackend, Backend};

use super::Attention;
use super::parameters::{Named, Parameters};
use crate::plan::LayerKv;

impl<B: Backend> Attention<B> {
    /// An attention of the same plan, whatever is done to the parameters.
    fn rebuilt<C: Backend>(self, f: impl FnOnce(Parameters<B>) -> Parameters<C>) -> Attention<C> {
        let (plan, settings) = (self.plan(), self.settings.clone());
        f(self.into_parameters()).assemble(&plan, settings)
    }

    fn plan(&self) -> LayerKv {
        LayerKv {
            key: self.key.plan(),
            value: self.value.plan(),
        }
    }
}

impl<B: Backend> Module<B> for Attention<B> {
    type Record = <Parameters<B> as Module<B>>::Record;

    fn collect_devices(&self, mut devices: Devices<B>) -> Devices<B> {
        let named = self.named();
        for (_, projection) in self.projections() {
            devices = projection.collect_devices(devices);
        }
        for norm in named.q_norm.into_iter().chain(named.k_norm) {
            devices = norm.collect_devices(devices);
        }
        for weights in named.blends.into_iter().flatten() {
            devices = weights.collect_devices(devices);
        }
        for alpha in named.alphas.into_iter().flatten() {
            devices = alpha.collect_devices(devices);
        }
        devices
    }

    fn fork(self, device: &B::Device) -> Self {
        self.rebuilt(|parameters| parameters.fork(device))
    }

    fn to_device(self, device: &B::Device) -> Self {
        self.rebuilt(|parameters| parameters.to_device(device))
    }

    /// In the order of files.
    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        let named = self.named();
        for (name, projection) in self.projections() {
            visit(&[name], Some(projection), visitor);
        }
        visit(&["q_norm"], named.q_norm, visitor);
        visit(&["k_norm"], named.k_norm, visitor);
        let weights = ["key_weight", "value_weight"];
        for (weight, blend) in weights.into_iter().zip(named.blends) {
            visit(&["kv_fusion", weight], blend, visitor);
        }
        for (weight, alpha) in weights.into_iter().zip(named.alphas) {
            visit(&["kv_residual", weight], alpha, visitor);
        }
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        self.rebuilt(|parameters| parameters.map(mapper))
    }

    /// # Panics
    /// If a parameter is missing that the plan needs; the decoder sees to it first.
    fn load_record(self, record: Self::Record) -> Self {
        self.rebuilt(|parameters| parameters.load_record(record))
    }

    fn into_record(self) -> Self::Record {
        self.into_parameters().into_record()
    }
}

/// Visits a module that there may be, by its name and those of the modules around it.
fn visit<B: Backend, M: Module<B>>(
    path: &[&str],
    module: Option<&M>,
    visitor: &mut impl ModuleVisitor<B>,
) {
    let Some(module) = module else { return };
    for name in path {
        visitor.enter_module(name, "Struct:Attention");
    }
    module.visit(visitor);
    for name in path.iter().rev() {
        visitor.exit_module(name, "Struct:Attention");
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for Attention<B> {
    type InnerModule = Attention<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        let named = self.named();
        let parameters = Parameters::of(Named {
            q_proj: named.q_proj.valid(),
            k_proj: named.k_proj.map(AutodiffModule::valid),
            v_proj: named.v_proj.map(AutodiffModule::valid),
            o_proj: named.o_proj.valid(),
            q_norm: named.q_norm.map(AutodiffModule::valid),
            k_norm: named.k_norm.map(AutodiffModule::valid),
            alphas: named.alphas.map(|alpha| alpha.map(AutodiffModule::valid)),
            blends: named.blends.map(|blend| blend.map(AutodiffModule::valid)),
        });
        parameters.assemble(&self.plan(), self.settings.clone())
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        module.rebuilt(Parameters::from_inner)
    }
}

impl<B: Backend> ModuleDisplayDefault for Attention<B> {
    fn content(&self, content: Content) -> Option<Content> {
        let mut content = content.set_top_level_type("Attention");
        for (name, projection) in self.projections() {
            content = content.add(name, projection);
        }
        let plan = self.plan();
        content.add_formatted(&plan).optional()
    }
}

impl<B: Backend> ModuleDisplay for Attention<B> {}
