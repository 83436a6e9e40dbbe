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
        match (&mut plan, self.storage_layers, self.factor) {
            (_, None, None) => {}
            (KvPlan::Cla { factor }, None, Some(layers)) => *factor = layers,
            (
                KvPlan::FusedKv { storage_layers }
                | KvPlan::FusedKvLite { storage_layers }
                | KvPlan::FusedKvLiteLearnable { storage_layers }
                | KvPlan::FusedKvLiteReversed { storage_layers }
                | KvPlan::Yoco { storage_layers }
                | KvPlan::YocoPlusPlus { storage_layers }
                | KvPlan::DenseFusion { storage_layers },
                Some(layers),
                None,
            ) => *storage_layers = layers,
            (_, Some(_), _) => {
                return Err(format!("--storage-layers has no meaning for {}", self.method).into());
            }
            (_, None, Some(_)) => {
                return Err(format!("--factor has no meaning for {}", self.method).into());
            }
        }
        Ok(plan)
    }
}
