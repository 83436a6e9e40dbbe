//! Converts a standard Qwen3 model to another plan, ready for further training; or writes a GGUF file as
//! a directory, its model as it is.
//!
//! ```sh
//! cargo run --release --example train_tiny -- --method standard --out target/standard
//! cargo run --release --example convert -- --model target/standard --out target/fused --text README.md
//! cargo run --release --example train_tiny -- --init target/fused --out target/recovered --steps 100
//! cargo run --release --example convert -- --from model.gguf --out target/model
//! ```

mod backend;
mod plan;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::backend::Backend;
use clap::Parser;
use fusedkv::WeightFormat;
use fusedkv::checkpoint::gguf::{GgufError, GgufOptions, import_gguf};
use fusedkv::checkpoint::{
    LoadOptions, LoadedCheckpoint, SaveOptions, load_checkpoint, save_checkpoint,
};
use fusedkv::convert::{LayerFit, convert, convert_fitted};

use backend::{BackendName, DtypeName, Program, exit_code};
use plan::PlanArgs;

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Convert a standard Qwen3 model to another plan, or a GGUF file to a directory.
#[derive(Parser)]
struct Args {
    /// Directory of the standard model
    #[arg(long, value_name = "DIR", required_unless_present = "from")]
    model: Option<PathBuf>,
    /// GGUF file to write as a directory, its model as it is
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["model", "method", "storage_layers", "factor", "text", "tokens", "context"],
    )]
    from: Option<PathBuf>,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    plan: PlanArgs,
    /// Text to fit the fusion weights on; they start as FusedKV-Lite's if not given
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of the text to read at most
    #[arg(long, default_value_t = 65536)]
    tokens: usize,
    /// Tokens per window [default: 512, or as many as the model can read]
    #[arg(long)]
    context: Option<usize>,
    /// What numbers to write
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
    /// What to write the matrices as instead: f16, bf16 or int8
    #[arg(long, default_value = "model")]
    weights: WeightFormat,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(match &args.from {
        Some(file) => import(file, &args).map_err(Into::into),
        None => args.backend.run(args),
    })
}

fn import(file: &Path, args: &Args) -> Result<(), GgufError> {
    let options = GgufOptions::new()
        .with_dtype(args.dtype.into())
        .with_weights(args.weights);
    let imported = import_gguf(file, &args.out, &options)?;
    println!(
        "{} with {} parameters in {} tensors, {}; saved to {}",
        imported.model_type,
        imported.parameters,
        imported.tensors,
        if imported.tokenizer {
            "and a tokenizer"
        } else {
            "without a tokenizer"
        },
        args.out.display(),
    );
    Ok(())
}

impl Program for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        let model = self.model.as_ref().ok_or("--model is missing")?;
        let loaded = load_checkpoint::<B>(model, LoadOptions::new(), device)?;
        let plan = self.plan.plan(loaded.model.config().n_layers)?;
        let (model, fits) = match &self.text {
            Some(path) => {
                let text = fs::read_to_string(path)
                    .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
                let mut tokens = tokenizer(&loaded)?.encode(&text)?;
                tokens.truncate(self.tokens);
                let longest = loaded.model.config().max_positions;
                let context = self.context.unwrap_or(longest.min(512));
                println!("{} tokens to fit on, {context} at a time", tokens.len());
                convert_fitted(&loaded.model, &plan, &tokens, context)?
            }
            None => (convert(&loaded.model, &plan)?, Vec::new()),
        };
        print_fits(&fits);

        let costs = model.config().costs()?;
        let mut options = SaveOptions::new().with_eos(loaded.eos);
        let model = match self.weights {
            WeightFormat::Model => {
                options = options.with_dtype(self.dtype.into());
                model
            }
            weights => model.with_weights(weights)?,
        };
        if let Some(tokenizer) = loaded.tokenizer {
            options = options.with_tokenizer(tokenizer);
        }
        save_checkpoint(&self.out, &model, &options)?;
        println!(
            "{} with {} parameters, was {}; saved to {}",
            plan.method(),
            costs.parameters(),
            loaded.model.config().costs()?.parameters(),
            self.out.display(),
        );
        Ok(())
    }
}

fn tokenizer<B: Backend>(
    loaded: &LoadedCheckpoint<B>,
) -> Result<&fusedkv::tokenizer::Tokenizer, &'static str> {
    let tokenizer = loaded.tokenizer.as_ref();
    tokenizer.ok_or("the model has no tokenizer.json, which --text needs")
}

/// Shares of the original keys' and values' energy; layers count from 1, as in papers.
fn print_fits(fits: &[LayerFit]) {
    if fits.is_empty() {
        return;
    }
    println!("relative squared error         keys                values");
    println!("                         before    fitted    before    fitted");
    for LayerFit { layer, key, value } in fits {
        println!(
            "layer {:<18} {:>6.3}    {:>6.3}    {:>6.3}    {:>6.3}",
            layer + 1,
            key.before,
            key.after,
            value.before,
            value.after,
        );
    }
}
