//! Converts a standard model to another plan in stages, each scored on a held-out text; or writes a
//! GGUF file as a directory, its model as it is.
//!
//! ```sh
//! cargo run --release --example train_tiny -- --method standard --out target/standard
//! cargo run --release --example convert -- --model target/standard --out target/fused \
//!     --text README.md --held-out CHANGELOG.md
//! cargo run --release --example convert -- --model target/standard --out target/half \
//!     --plan auto --cache 0.5 --text README.md
//! cargo run --release --example train_tiny -- --init target/fused --out target/recovered --steps 100
//! cargo run --release --example convert -- --from model.gguf --out target/model
//! ```
//!
//! docs/conversion.md says what to expect.

mod backend;
mod json;
mod plan;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::backend::Backend;
use clap::{Parser, ValueEnum};
use fusedkv::checkpoint::gguf::{GgufError, GgufOptions, import_gguf};
use fusedkv::checkpoint::{
    LoadOptions, LoadedCheckpoint, SaveOptions, check_destination, load_checkpoint, save_checkpoint,
};
use fusedkv::convert::{
    ConversionConfig, FitError, PlanChoice, StageReport, choose_plan, convert_in_stages,
};
use fusedkv::{KvPlan, LayerKv, WeightFormat};

use backend::{BackendName, DtypeName, Program, exit_code};
use json::{check_place, write_json};
use plan::PlanArgs;

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Convert a standard model to another plan, or a GGUF file to a directory.
#[derive(Parser)]
struct Args {
    /// Directory of the standard model
    #[arg(long, value_name = "DIR", required_unless_present = "from")]
    model: Option<PathBuf>,
    /// GGUF file to write as a directory, its model as it is
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = [
            "model", "method", "storage_layers", "factor", "plan_file", "cache", "text", "tokens",
            "context", "stages", "ridge", "held_out", "held_out_tokens", "report",
        ],
    )]
    from: Option<PathBuf>,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    plan: PlanArgs,
    /// `auto`: chosen by what the layers of the model lose; or a JSON file with a plan
    #[arg(
        id = "plan_file",
        long = "plan",
        value_name = "auto|FILE",
        conflicts_with_all = ["method", "storage_layers", "factor"],
    )]
    plan_file: Option<PathBuf>,
    /// Share of the layers that store keys and values, with `--plan auto`
    #[arg(long, default_value_t = 0.5)]
    cache: f64,
    /// Text to fit on; without one, weights are taken as they are
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of the text to read at most
    #[arg(long, default_value_t = 65536)]
    tokens: usize,
    /// Tokens per window [default: 512, or as many as the model can read]
    #[arg(long)]
    context: Option<usize>,
    /// What to fit: fusion weights by themselves, last projections layer by layer
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "blends,layers"
    )]
    stages: Vec<Fit>,
    /// Tokens' weight of what pulls fitted projections to where they were [default: 1024]
    #[arg(long)]
    ridge: Option<f64>,
    /// Text to score before the first stage and after each
    #[arg(long, value_name = "FILE")]
    held_out: Option<PathBuf>,
    /// Tokens of that text to read at most
    #[arg(long, default_value_t = 16384)]
    held_out_tokens: usize,
    /// File to write the report to, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// What numbers to write
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
    /// What to write the matrices as instead: f16, bf16 or int8
    #[arg(long, default_value = "model", value_parser = saved_format)]
    weights: WeightFormat,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
}

/// A stage that reads a text.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Fit {
    Blends,
    Layers,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(match &args.from {
        Some(file) => import(file, &args).map_err(Into::into),
        None => args.backend.run(args),
    })
}

/// A format that directories have matrices in.
fn saved_format(name: &str) -> Result<WeightFormat, String> {
    match name.parse() {
        Ok(WeightFormat::Int4) => Err("not saved; expected model, f16, bf16 or int8".to_owned()),
        Ok(format) => Ok(format),
        Err(error) => Err(format!("{error}")),
    }
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
        if let Some(path) = &self.report {
            check_place(path)?;
        }
        check_destination(&self.out)?;
        let model = self.model.as_ref().ok_or("--model is missing")?;
        let loaded = load_checkpoint::<B>(model, LoadOptions::new(), device)?;
        let standard = &loaded.model;
        let read = |path: &Option<PathBuf>, most| match path {
            Some(path) => tokens(&loaded, path, most),
            None => Ok(Vec::new()),
        };
        let calibration = read(&self.text, self.tokens)?;
        let held_out = read(&self.held_out, self.held_out_tokens)?;
        let bos = match &loaded.tokenizer {
            Some(tokenizer) => tokenizer.bos()?,
            None => None,
        };
        let longest = standard.config().max_positions;
        let context = self
            .context
            .unwrap_or((longest - usize::from(bos.is_some())).min(512));
        let fits = |fit| self.text.is_some() && self.stages.contains(&fit);
        let mut config = ConversionConfig::new(context)
            .with_bos(bos)
            .with_blends(fits(Fit::Blends))
            .with_layers(fits(Fit::Layers));
        config.ridge = self.ridge.unwrap_or(config.ridge);
        let plan = match &self.plan_file {
            None => self.plan.plan(standard.config().n_layers)?,
            Some(auto) if auto.as_os_str() == "auto" => {
                let choice = choose_plan(standard, self.cache, &calibration, &config)?;
                print_choice(&choice);
                choice.plan
            }
            Some(path) => serde_json::from_str(&text(path)?)
                .map_err(|error| format!("no plan in {}: {error}", path.display()))?,
        };
        if self.text.is_some() {
            let tokens = calibration.len();
            println!("{tokens} tokens to fit on, {context} at a time");
        }
        let (model, report) = convert_in_stages(
            standard,
            &plan,
            &calibration,
            &held_out,
            &config,
            print_stage,
        )?;
        if let Some(perplexity) = report.standard_perplexity {
            println!(
                "perplexity of the standard model, of {} tokens: {perplexity:.2}",
                held_out.len()
            );
        }
        if let Some(path) = &self.report {
            write_json(path, &report)?;
        }

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

fn text(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// The first tokens of a file.
fn tokens<B: Backend>(
    loaded: &LoadedCheckpoint<B>,
    path: &Path,
    most: usize,
) -> Result<Vec<u32>, Box<dyn Error>> {
    let tokenizer = loaded.tokenizer.as_ref();
    let tokenizer = tokenizer.ok_or("the model has no tokenizer.json, which a text needs")?;
    let mut tokens = tokenizer.encode(&text(path)?)?;
    tokens.truncate(most);
    Ok(tokens)
}

fn print_choice(choice: &PlanChoice) {
    for tried in &choice.tried {
        println!(
            "perplexity {:.2} with {}",
            tried.perplexity,
            written(&tried.plan)
        );
    }
}

/// What the layers of a custom plan read, counted from 0 as in its JSON.
fn written(plan: &KvPlan) -> String {
    match plan {
        KvPlan::Custom { layers } => {
            let layers = layers.iter().enumerate();
            let (own, others): (Vec<_>, Vec<_>) = layers.partition(|(_, kv)| **kv == LayerKv::OWN);
            let own: Vec<_> = own.iter().map(|(layer, _)| layer.to_string()).collect();
            let others = others
                .iter()
                .map(|(layer, kv)| format!("\n  layer {layer}: {kv}"));
            let others: String = others.collect();
            format!("layers {} storing (counted from 0){others}", own.join(" "))
        }
        plan => plan.method().to_owned(),
    }
}

/// Shares of the original keys' and values' energy, and of the residual stream's; layers count from 1,
/// as in papers.
fn print_stage(report: &StageReport) {
    if !report.blends.is_empty() {
        println!("relative squared error         keys                values");
        println!("(layers from 1)          before    fitted    before    fitted");
    }
    for fit in &report.blends {
        print_errors(fit.layer, [fit.key, fit.value]);
    }
    if !report.layers.is_empty() {
        println!("relative squared error   after attention    after feed-forward");
        println!("of the residual stream   before    fitted    before    fitted");
    }
    for fit in &report.layers {
        print_errors(fit.layer, [fit.attention, fit.feed_forward]);
    }
    if let Some(perplexity) = report.perplexity {
        let (stage, seconds) = (report.stage, report.seconds);
        println!("{stage}: {seconds:.0} s, perplexity {perplexity:.2}");
    }
}

fn print_errors(layer: usize, [a, b]: [FitError; 2]) {
    println!(
        "layer {:<18} {:>6.3}    {:>6.3}    {:>6.3}    {:>6.3}",
        layer + 1,
        a.before,
        a.after,
        b.before,
        b.after,
    );
}
