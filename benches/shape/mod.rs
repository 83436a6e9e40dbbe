//! The decoder's shape, as arguments.

use std::error::Error;

use clap::Args;
use fusedkv::{FusedKvDecoderConfig, KvPlan};

/// Shape S of the documentation by default: 16 layers of width 768.
#[derive(Args)]
pub struct Shape {
    #[arg(long, default_value_t = 16)]
    layers: usize,
    /// Width of the residual stream
    #[arg(long, default_value_t = 768)]
    hidden: usize,
    /// Query heads
    #[arg(long, default_value_t = 12)]
    heads: usize,
    /// Key/value heads of the `gqa` methods
    #[arg(long, default_value_t = 3)]
    gqa_kv_heads: usize,
    #[arg(long, default_value_t = 64)]
    head_dim: usize,
    #[arg(long, default_value_t = 2048)]
    ffn: usize,
    #[arg(long, default_value_t = 32_000)]
    pub vocab: usize,
}

impl Shape {
    /// The decoder of a method, for up to `positions` tokens. `gqa` is the standard method with
    /// grouped queries, and any method's name may end in `_gqa`.
    pub fn config(
        &self,
        name: &str,
        positions: usize,
    ) -> Result<FusedKvDecoderConfig, Box<dyn Error>> {
        let (method, kv_heads) = match name {
            "gqa" => ("standard", self.gqa_kv_heads),
            _ => match name.strip_suffix("_gqa") {
                Some(method) => (method, self.gqa_kv_heads),
                None => (name, self.heads),
            },
        };
        let plan = KvPlan::from_method(method, self.layers)?;
        let config = FusedKvDecoderConfig::new(self.vocab, plan)
            .with_hidden_size(self.hidden)
            .with_n_layers(self.layers)
            .with_n_heads(self.heads)
            .with_n_kv_heads(kv_heads)
            .with_head_dim(self.head_dim)
            .with_ffn_size(self.ffn)
            .with_max_positions(positions);
        config.validate()?;
        Ok(config)
    }
}
