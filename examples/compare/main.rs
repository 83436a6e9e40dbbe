//! Trains every method alike and says what each costs and gives.
//!
//! ```sh
//! cargo run --release --example compare -- --methods standard yoco fused-kv --seeds 1
//! cargo run --release --example compare -- --data book.txt --methods standard fused-kv:n=2,kv-heads=2
//! cargo run --release --example compare -- --task recall --plans plans.json
//! ```
//!
//! Run the same command again after an interruption: finished runs are kept, the running one goes
//! on from its last checkpoint.

#[path = "../backend/mod.rs"]
mod backend;
#[path = "../corpus/mod.rs"]
mod corpus;
#[path = "../font/mod.rs"]
mod font;
mod plots;
mod text;
mod watch;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::backend::Backend;
use clap::{Parser, ValueEnum};
use fusedkv::backend::Autodiff;
use fusedkv::train::compare::{Comparison, DEFAULT_METHODS, Method, markdown, measure_speed};
use fusedkv::train::{AssociativeRecall, Needle, TrainingConfig, Windows};
use fusedkv::{CacheDtype, FusedKvDecoderConfig, KvPlan};

use backend::{BackendName, Program, exit_code};
use watch::Watch;

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Task {
    /// The next token of a text
    Text,
    /// Multi-query associative recall
    Recall,
    /// One pair in a haystack
    Needle,
}

/// Train methods alike and compare them.
#[derive(Parser)]
struct Args {
    /// Methods, each a name with options such as `fused-kv:n=2,kv-heads=2,init=equal`
    #[arg(long, num_args = 1.., default_values = DEFAULT_METHODS)]
    methods: Vec<String>,
    /// A JSON file of plans to compare as well: [{"name": …, "plan": …, "n_kv_heads": …}]
    #[arg(long, value_name = "FILE")]
    plans: Option<PathBuf>,
    /// Runs per method
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    #[arg(long, value_enum, default_value = "text")]
    task: Task,
    /// Text file or folder; the sources of this crate if not given
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Token files to train on and to validate with, of --vocab tokens, instead of text
    #[arg(long, num_args = 2, value_names = ["TRAIN", "VALID"], conflicts_with_all = ["data", "tokenizer"])]
    tokens: Vec<PathBuf>,
    /// Where runs, table and plots are kept
    #[arg(long, value_name = "DIR", default_value = "target/compare")]
    out: PathBuf,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// Width of the residual stream
    #[arg(long, default_value_t = 128)]
    hidden: usize,
    /// Query heads
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Key/value heads; as many as query heads if not given
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Inner width of the SwiGLU blocks; 2.75 times the width if not given
    #[arg(long)]
    ffn: Option<usize>,
    /// Size of the vocabulary: learned from a text, or that of a generated task
    #[arg(long, default_value_t = 1024)]
    vocab: usize,
    /// A tokenizer.json to use instead of learning one
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Tokens per training window
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Windows per step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Parts each step's windows are divided into to save memory
    #[arg(long, default_value_t = 1)]
    accumulation: usize,
    /// Data-parallel workers, each with its share of every step's windows
    #[arg(long, default_value_t = 1)]
    devices: usize,
    #[arg(long, default_value_t = 400)]
    steps: usize,
    /// Times a run is validated and checkpointed
    #[arg(long, default_value_t = 8)]
    validations: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Learning rate of fusion weights, as a multiple of that of the others
    #[arg(long, default_value_t = 1.0)]
    fusion_lr_ratio: f64,
    /// Decay of fusion weights per unit of their learning rate
    #[arg(long, default_value_t = 0.0)]
    fusion_weight_decay: f32,
    /// Share of a text, or of the windows trained on, that is held out
    #[arg(long, default_value_t = 0.05)]
    valid: f64,
    /// Key-value pairs per window, for `--task recall`
    #[arg(long, default_value_t = 8)]
    pairs: usize,
    /// Caches through which every trained model is evaluated as well: f32, f16, bf16 or int8
    #[arg(long, num_args = 1.., value_name = "DTYPE")]
    cache_dtypes: Vec<CacheDtype>,
    /// Tokens of the prompt whose prefill is timed
    #[arg(long, default_value_t = 512)]
    prompt: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(args.backend.run(args))
}

impl Program for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        match self.task {
            Task::Text => {
                let (tokenizer, train, valid) = text::windows(&self)?;
                self.compare::<B>(tokenizer, &train, &valid, device)
            }
            Task::Recall => {
                let [train, valid] = self.generated_windows().map(|(windows, seed)| {
                    AssociativeRecall::new(self.vocab, self.context, self.pairs, windows)
                        .with_seed(seed)
                });
                self.compare::<B>(self.vocab, &train, &valid, device)
            }
            Task::Needle => {
                let [train, valid] = self.generated_windows().map(|(windows, seed)| {
                    Needle::new(self.vocab, self.context, windows).with_seed(seed)
                });
                self.compare::<B>(self.vocab, &train, &valid, device)
            }
        }
    }
}

impl Args {
    /// How many windows of which seed: no window is trained on twice, none held out is trained on.
    fn generated_windows(&self) -> [(usize, u64); 2] {
        let train = self.steps * self.batch;
        let valid = (train as f64 * self.valid).ceil() as usize;
        [(train, 0), (valid, 1)]
    }

    fn compare<B: Backend>(
        &self,
        vocab_size: usize,
        train: &(impl Windows + Clone + 'static),
        valid: &(impl Windows + Clone + 'static),
        device: &B::Device,
    ) -> Result<(), Box<dyn Error>> {
        let comparison = self.comparison(vocab_size)?;
        let watch = Watch::new(&comparison);
        let devices = vec![device.clone(); self.devices];
        let results = comparison.run::<Autodiff<B>>(train, valid, &devices, move |event| {
            watch.tell(event);
        })?;
        let methods = &comparison.methods;
        let speeds = measure_speed::<B>(methods, self.prompt, 16, 5, device)?;
        let table = markdown(&results, &speeds);
        self.publish(|directory| {
            fs::write(directory.join("table.md"), &table)?;
            let speeds = serde_json::to_string_pretty(&speeds)?;
            fs::write(directory.join("speed.json"), speeds)?;
            plots::draw(&results, directory)
        })?;
        println!("{table}");
        println!("Table, plots and runs are in {}", self.out.display());
        Ok(())
    }

    fn comparison(&self, vocab_size: usize) -> Result<Comparison, Box<dyn Error>> {
        let model = FusedKvDecoderConfig::new(
            vocab_size,
            self.hidden,
            self.layers,
            self.heads,
            self.kv_heads.unwrap_or(self.heads),
            self.hidden / self.heads.max(1),
            self.ffn.unwrap_or(self.hidden * 11 / 4),
            KvPlan::Standard,
        )
        .with_rope_theta(1e4)
        .with_max_positions(self.context);
        let mut methods = self
            .methods
            .iter()
            .map(|name| Method::parse(name, &model))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(path) = &self.plans {
            methods.extend(Method::from_plans(&text::read(path)?, &model)?);
        }
        Method::check_names(&methods)?;
        let training = TrainingConfig::new(model, self.context, self.batch, self.steps)
            .with_learning_rate(self.lr)
            .with_fusion_learning_rate_ratio(self.fusion_lr_ratio)
            .with_fusion_weight_decay(self.fusion_weight_decay)
            .with_accumulation(self.accumulation)
            .with_epochs(self.validations.min(self.steps))
            .with_warmup_steps(self.steps / 20)
            .with_valid_fraction(self.valid);
        Ok(Comparison {
            training,
            methods,
            seeds: (0..self.seeds).collect(),
            tokenizer: None,
            directory: self.out.clone(),
            cache_dtypes: self.cache_dtypes.clone(),
        })
    }

    /// Moves the files that `write` makes in a directory of its own to the output directory, so
    /// that none there is half-written.
    fn publish(
        &self,
        write: impl FnOnce(&Path) -> Result<(), Box<dyn Error>>,
    ) -> Result<(), Box<dyn Error>> {
        let publish = || {
            let partial = tempfile::tempdir_in(&self.out)?;
            write(partial.path())?;
            for entry in fs::read_dir(partial.path())? {
                let entry = entry?;
                fs::rename(entry.path(), self.out.join(entry.file_name()))?;
            }
            Ok(())
        };
        publish().map_err(|error: Box<dyn Error>| {
            format!("cannot write results to {}: {error}", self.out.display()).into()
        })
    }

    /// A file of the output directory, which is made if need be.
    fn kept(&self, name: &str) -> Result<PathBuf, Box<dyn Error>> {
        let directory: &Path = &self.out;
        fs::create_dir_all(directory)
            .map_err(|error| format!("cannot make {}: {error}", directory.display()))?;
        Ok(directory.join(name))
    }
}
