//! Choosing a plan on the command line, shared by the examples.

use std::error::Error;

use clap::Args;
use clap::builder::PossibleValuesParser;
use fusedkv::KvPlan;

/// A plan as arguments.
#[derive(Args)]
pub struct PlanArgs {
    /// How layers share keys and values
    #[arg(long, default_value = "fused_kv", value_parser = PossibleValuesParser::new(KvPlan::methods()))]
    pub method: String,
    /// Layers that store keys and values; half of them if not given
    #[arg(long)]
    storage_layers: Option<usize>,
    /// Layers per stored layer, for `cla` [default: 2]
    #[arg(long)]
    factor: Option<usize>,
}

impl PlanArgs {
    /// The plan for a decoder of `layers` layers.
    pub fn plan(&self, layers: usize) -> Result<KvPlan, Box<dyn Error>> {
        let mut plan = KvPlan::from_method(&self.method, layers)?;
        let meaningless = |option| format!("{option} has no meaning for {}", self.method);
        if let Some(layers) = self.storage_layers {
            let n = plan.storage_layers_mut();
            *n.ok_or_else(|| meaningless("--storage-layers"))? = layers;
        }
        match (&mut plan, self.factor) {
            (_, None) => {}
            (KvPlan::Cla { factor }, Some(layers)) => *factor = layers,
            (_, Some(_)) => return Err(meaningless("--factor").into()),
        }
        Ok(plan)
    }
}
