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
mod report;
mod text;
mod watch;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use burn::tensor::backend::Backend;
use clap::{Parser, ValueEnum};
use fusedkv::backend::Autodiff;
use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::compare::{Comparison, DEFAULT_METHODS, Method, RunEvent, measure_speed};
use fusedkv::train::{AssociativeRecall, Needle, TrainingConfig, Windows};
use fusedkv::{CacheDtype, FusedKvDecoderConfig, KvPlan};

use backend::{BackendName, Program, exit_code};
use report::Report;
use text::Text;
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
    /// A JSON file of plans to compare as well: [{"name": …, "plan": …, "n_kv_heads": …, "alpha": …}]
    #[arg(long, value_name = "FILE")]
    plans: Option<PathBuf>,
    /// Runs per method
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    #[arg(long, value_enum, default_value = "text")]
    task: Task,
    /// Text file or folder; a frozen text of this crate's sources if not given
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
    /// A tokenizer.json to use instead of learning one; it needs a token `<|endoftext|>`
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
    /// Standard deviation of the initial embeddings and projections
    #[arg(long, default_value_t = 0.02)]
    init_std: f64,
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
                // Methods that there are not are said before a text is read.
                self.comparison(self.vocab, None)?;
                let text = Text::open(&self)?;
                let comparison = self.comparison(text.vocab_size, text.tokenizer)?;
                self.compare::<B>(&comparison, &text.train, &text.valid, device)
            }
            Task::Recall => {
                let [train, valid] = self.generated_windows().map(|(windows, seed)| {
                    AssociativeRecall::new(self.vocab, self.context, self.pairs, windows)
                        .with_seed(seed)
                });
                let comparison = self.comparison(self.vocab, None)?;
                self.compare::<B>(&comparison, &train, &valid, device)
            }
            Task::Needle => {
                let [train, valid] = self.generated_windows().map(|(windows, seed)| {
                    Needle::new(self.vocab, self.context, windows).with_seed(seed)
                });
                let comparison = self.comparison(self.vocab, None)?;
                self.compare::<B>(&comparison, &train, &valid, device)
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
        comparison: &Comparison,
        train: &(impl Windows + Clone + 'static),
        valid: &(impl Windows + Clone + 'static),
        device: &B::Device,
    ) -> Result<(), Box<dyn Error>> {
        let watch = Watch::new(comparison);
        let report = Report::new(&self.out);
        let devices = vec![device.clone(); self.devices];
        let results = comparison.run::<Autodiff<B>>(train, valid, &devices, move |event| {
            watch.tell(event);
            // The runs are kept, whatever becomes of tables and plots; those at the end are of all.
            if let RunEvent::Finished { result, kept } = event
                && let Err(error) = report.add(result, kept)
            {
                watch.say(&format!("warning: {error}"));
            }
        })?;
        let speeds = measure_speed::<B>(&comparison.methods, self.prompt, 16, 5, device)?;
        let report = Report::new(&self.out);
        println!("{}", report.table(&results, &speeds)?);
        let drawn = report.plots(&results);
        println!("Table, plots and runs are in {}", self.out.display());
        if let Some(finished) = results.iter().find(|result| result.diverged.is_none()) {
            let mut methods = comparison.methods.iter();
            if let Some(method) = methods.find(|method| method.name == finished.method) {
                let model = comparison.model_directory(method, finished.config.seed);
                println!(
                    "The examples generate, score and information_flow open each run's model, e.g. {}",
                    model.display(),
                );
            }
        }
        drawn
    }

    fn comparison(
        &self,
        vocab_size: usize,
        tokenizer: Option<Tokenizer>,
    ) -> Result<Comparison, Box<dyn Error>> {
        let model = FusedKvDecoderConfig::new(vocab_size, KvPlan::Standard)
            .with_hidden_size(self.hidden)
            .with_n_layers(self.layers)
            .with_n_heads(self.heads)
            .with_n_kv_heads(self.kv_heads.unwrap_or(self.heads))
            .with_head_dim(self.hidden / self.heads.max(1))
            .with_ffn_size(self.ffn.unwrap_or(self.hidden * 11 / 4))
            .with_rope_theta(1e4)
            .with_init_std(self.init_std)
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
            tokenizer,
            directory: self.out.clone(),
            cache_dtypes: self.cache_dtypes.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use fusedkv::backend::{Flex, FlexDevice};
    use fusedkv::checkpoint::{WeightDtype, load_checkpoint};
    use fusedkv::information_flow;
    use fusedkv::train::TrainError;
    use fusedkv::train::compare::RunResult;
    use tempfile::tempdir;

    use super::*;

    /// A comparison of two methods that takes a moment.
    fn compare(data: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
        compare_with("--vocab 280", data, out)
    }

    fn compare_with(more: &str, data: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
        let small = format!(
            "compare --methods standard fused-kv --seeds 1 --steps 2 --validations 1 \
             --layers 4 --hidden 16 --heads 2 --context 8 --batch 2 --prompt 4 {more}"
        );
        let mut args: Vec<_> = small.split_whitespace().map(Into::into).collect();
        args.extend(["--data".into(), data.as_os_str().to_owned()]);
        args.extend(["--out".into(), out.as_os_str().to_owned()]);
        let args = Args::try_parse_from(args)?;
        args.backend.run(args)
    }

    fn text(directory: &Path) -> PathBuf {
        let path = directory.join("text.txt");
        fs::write(&path, "one fish two fish red fish blue fish\n".repeat(40)).unwrap();
        path
    }

    #[test]
    fn a_comparison_leaves_tables_plots_and_models_to_open() {
        let directory = tempdir().unwrap();
        let out = directory.path().join("out");
        compare(&text(directory.path()), &out).unwrap();
        for file in ["table.md", "speed.json", "loss.svg", "quality.png"] {
            assert!(out.join(file).exists(), "{file}");
        }
        let mut entries = fs::read_dir(&out).unwrap();
        assert!(!entries.any(|entry| {
            let name = entry.unwrap().file_name();
            name.to_string_lossy().starts_with('.')
        }));
        let model = out.join("runs/fused-kv-seed-0/model");
        let loaded = load_checkpoint::<Flex>(&model, WeightDtype::F32, &FlexDevice).unwrap();
        assert!(loaded.tokenizer.is_some());
        assert!(!loaded.eos.is_empty());
        assert_eq!(information_flow(&loaded.model).keys.len(), 2);
    }

    #[test]
    fn a_comparison_keeps_its_tokenizer_and_takes_none_of_another() {
        let directory = tempdir().unwrap();
        let text = text(directory.path());
        let [out, other] = ["out", "other"].map(|name| directory.path().join(name));
        let tokenizer = |out: &Path| fs::read(out.join("tokenizer.json")).unwrap();

        // What a command left that failed before it compared anything is not taken.
        compare_with("--vocab 270 --lr 2", &text, &out).unwrap_err();
        compare(&text, &out).unwrap();
        let kept = tokenizer(&out);
        compare(&text, &out).unwrap();
        assert_eq!(tokenizer(&out), kept);

        let error = compare_with("--vocab 270", &text, &out).unwrap_err();
        assert!(error.to_string().contains("--vocab 280"), "{error}");
        compare_with("--vocab 270", &text, &other).unwrap();
        let path = other.join("tokenizer.json");
        let error = compare_with(&format!("--tokenizer {}", path.display()), &text, &out);
        let error = error.unwrap_err();
        let refused = matches!(error.downcast_ref(), Some(TrainError::OtherRun { .. }));
        assert!(refused, "{error}");
        assert_eq!(tokenizer(&out), kept);

        // A text that gives fewer tokens than are asked for.
        let short = directory.path().join("short.txt");
        fs::write(&short, "a b\n".repeat(200)).unwrap();
        let out = directory.path().join("short");
        for _ in 0..2 {
            compare_with("--vocab 1000", &short, &out).unwrap();
        }
    }

    #[test]
    fn every_run_is_reported_and_a_plot_that_fails_costs_no_table() {
        let directory = tempdir().unwrap();
        let out = directory.path().join("out");
        compare(&text(directory.path()), &out).unwrap();
        let result = fs::read(out.join("runs/standard-seed-0/result.json")).unwrap();
        let result: RunResult = serde_json::from_slice(&result).unwrap();

        let place = directory.path().join("report");
        fs::create_dir(&place).unwrap();
        let report = Report::new(&place);
        let other = RunResult {
            method: "kept".to_owned(),
            ..result.clone()
        };
        report.add(&other, true).unwrap();
        assert!(!place.join("table.md").exists());
        report.add(&result, false).unwrap();
        let table = fs::read_to_string(place.join("table.md")).unwrap();
        assert!(table.contains("| kept |") && table.contains("| standard |"));
        assert!(place.join("loss.svg").exists());

        // A directory where a plot should be.
        fs::remove_file(place.join("loss.png")).unwrap();
        fs::create_dir(place.join("loss.png")).unwrap();
        let diverged = RunResult {
            method: "diverged".to_owned(),
            diverged: Some(1),
            valid_loss: f64::NAN,
            ..result
        };
        report.add(&diverged, false).unwrap_err();
        let table = fs::read_to_string(place.join("table.md")).unwrap();
        assert!(table.contains("| diverged | 0, 1 diverged |"), "{table}");

        // Where all have diverged there is nothing to draw, and no failure.
        let none = Report::new(&place);
        none.add(&diverged, false).unwrap();
    }

    #[test]
    fn what_cannot_be_read_or_written_is_said_in_a_line() {
        let directory = tempdir().unwrap();
        let [empty, file] = ["empty", "file"].map(|name| directory.path().join(name));
        fs::create_dir(&empty).unwrap();
        fs::write(&file, "").unwrap();
        let text = text(directory.path());
        let out = directory.path().join("out");
        for (data, out, written) in [
            (&empty, &out, false),
            (&file, &out, false),
            (&text, &file.join("out"), true),
        ] {
            let error = compare(data, out).unwrap_err();
            assert!(!error.to_string().contains('\n'), "{error}");
            let error = error.downcast_ref::<TrainError>();
            match written {
                true => assert!(matches!(error, Some(TrainError::Write { .. })), "{error:?}"),
                false => assert!(matches!(error, Some(TrainError::NoText(_))), "{error:?}"),
            }
        }
        assert!(!out.exists());
    }
}
