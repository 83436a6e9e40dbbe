//! Has a converted model follow the one it was made of, or any that knows the same tokens: its
//! distributions of the next token become the teacher's.
//!
//! ```sh
//! cargo run --release --example train_tiny -- --method standard --out target/standard
//! cargo run --release --example convert -- --model target/standard --out target/fused --text README.md
//! cargo run --release --example distill -- --teacher target/standard --student target/fused --out target/distilled
//! ```

mod backend;
mod corpus;
mod figures;
mod json;

use std::error::Error;
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::data::dataloader::Dataset;
use burn::module::AutodiffModule;
use burn::tensor::backend::Backend;
use clap::{Parser, ValueEnum};
use fusedkv::FusedKvDecoder;
use fusedkv::backend::Autodiff;
use fusedkv::checkpoint::{
    LoadedCheckpoint, SaveOptions, WeightDtype, check_destination, load_checkpoint, save_checkpoint,
};
use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::{
    Distillation, Part, Run, TokenFile, TokenWindows, TrainError, Trainable, TrainingConfig,
    distill, evaluate, perplexity,
};
use serde::Serialize;

use backend::{BackendName, Program, exit_code};
use json::{check_place, write_json};

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Have a student's distributions of the next token follow a teacher's.
#[derive(Parser)]
struct Args {
    /// Directory of the teacher
    #[arg(long, value_name = "DIR")]
    teacher: PathBuf,
    /// Directory of the student, as `convert` writes it
    #[arg(long, value_name = "DIR")]
    student: PathBuf,
    /// Text file or folder to learn from; a frozen text of this crate's sources if not given
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Share of the text that is held out
    #[arg(long, default_value_t = 0.05)]
    valid: f64,
    /// Text to measure perplexity on instead of what is held out
    #[arg(long, value_name = "FILE")]
    test: Option<PathBuf>,
    /// Tokens of it to read at most
    #[arg(long, default_value_t = 16384)]
    test_tokens: usize,
    /// What trains
    #[arg(long, value_enum, default_value = "all")]
    trains: Trains,
    /// Train the parameters whose names in a checkpoint are like these instead, as
    /// `model.layers.3.*`
    #[arg(long, value_name = "PATTERN", num_args = 1.., conflicts_with = "trains")]
    named: Vec<String>,
    /// What the logits of both are divided by
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Share of the next token's cross-entropy in the loss
    #[arg(long, default_value_t = 0.0)]
    targets: f64,
    /// Weight of the error of hidden states in the loss
    #[arg(long, default_value_t = 0.0)]
    hidden: f64,
    /// Tokens per window
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Windows per step
    #[arg(long, default_value_t = 4)]
    batch: usize,
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// Parts each step's windows are divided into to save memory
    #[arg(long, default_value_t = 1)]
    accumulation: usize,
    /// Times the model is validated and checkpointed
    #[arg(long, default_value_t = 2)]
    validations: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 3e-4)]
    lr: f64,
    /// Learning rate of fusion weights, as a multiple of it
    #[arg(long, default_value_t = 1.0)]
    fusion_lr_ratio: f64,
    /// Learning rate of norms and biases, as a multiple of it
    #[arg(long, default_value_t = 1.0)]
    gain_lr_ratio: f64,
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Directory for the student and, in `run`, the checkpoints
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// File to write settings and perplexities to, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Go on from the last checkpoint in --out
    #[arg(long)]
    resume: bool,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
}

/// Which parameters train.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Trains {
    /// All of them
    All,
    /// The weights of blends
    Fusion,
    /// The layers that reuse other layers' keys or values
    Reusing,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(args.backend.run(args))
}

impl Program for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        if let Some(path) = &self.report {
            check_place(path)?;
        }
        check_destination(&self.out)?;
        let corpus = corpus::open(self.data.as_deref(), self.valid)?;
        let teacher: LoadedCheckpoint<B> =
            load_checkpoint(&self.teacher, WeightDtype::F32, device)?;
        let student: LoadedCheckpoint<Autodiff<B>> =
            load_checkpoint(&self.student, WeightDtype::F32, device)?;
        let eos = match student.eos.is_empty() {
            true => teacher.eos,
            false => student.eos,
        };
        let corpus = corpus.with_end(eos.first().copied());
        let tokenizer = student.tokenizer.or(teacher.tokenizer);
        let tokenizer = tokenizer.ok_or("neither model has a tokenizer.json")?;
        let (teacher, student) = (teacher.model, student.model);
        let config = self.config(&student);
        config.validate()?;
        println!(
            "{} parameters, {}, {} layers; a step reads {} tokens",
            config.model.costs()?.parameters(),
            config.model.plan.method(),
            config.model.n_layers,
            config.tokens_per_step(),
        );

        corpus::make_directory(&self.out)?;
        let (train, valid) = match &self.test {
            Some(path) => (
                corpus::windows_of(Part::Train, &corpus, &tokenizer, self.context, &self.out)?,
                self.test_windows(path, &tokenizer)?,
            ),
            None => corpus::windows(&corpus, &tokenizer, self.context, &self.out)?,
        };
        let (scored, data) = (valid.len() * self.context, train.len() * self.context);
        let loss = |model: &FusedKvDecoder<B>| -> Result<f64, TrainError> {
            Ok(evaluate(model, &valid, self.batch, None)?.loss)
        };
        let losses = [loss(&teacher)?, loss(&student.valid())?];

        let directory = self.out.join("run");
        let run = Run::new(&directory).with_resume(self.resume);
        let devices = std::slice::from_ref(device);
        let trained = distill(
            &config,
            student,
            teacher,
            train,
            valid.clone(),
            &run,
            devices,
        )?;
        let options = SaveOptions::new().with_tokenizer(tokenizer).with_eos(eos);
        save_checkpoint(&self.out, &trained.model, &options)?;

        let [teacher, before] = losses.map(perplexity);
        println!(
            "\nperplexity of {scored} tokens, {} at a time",
            self.context
        );
        for (name, perplexity) in [
            ("teacher", teacher),
            ("student, before", before),
            ("student, after", trained.perplexity()),
        ] {
            println!("  {name:<16} {perplexity:>10.2}");
        }
        if let Some(path) = &self.report {
            let after = trained.epochs.iter().map(|epoch| Point {
                tokens: config.tokens_until(epoch.epoch),
                perplexity: perplexity(epoch.valid),
            });
            let start = Point {
                tokens: 0,
                perplexity: before,
            };
            let report = Report {
                config: &config,
                text_tokens: data,
                scored_tokens: scored,
                teacher_perplexity: teacher,
                curve: iter::once(start).chain(after).collect(),
            };
            write_json(path, &report)?;
        }
        figures::print(&directory, trained.tokens)?;
        println!("saved to {}", self.out.display());
        Ok(())
    }
}

impl Args {
    fn config<B: Backend>(&self, student: &FusedKvDecoder<B>) -> TrainingConfig {
        let trainable = match self.trains {
            _ if !self.named.is_empty() => Some(Trainable::Named(self.named.clone())),
            Trains::All => None,
            Trains::Fusion => Some(Trainable::Fusion),
            Trains::Reusing => Some(Trainable::Reusing),
        };
        let distillation = Distillation::new()
            .with_temperature(self.temperature)
            .with_target_share(self.targets)
            .with_hidden_weight(self.hidden);
        TrainingConfig::new(
            student.config().clone(),
            self.context,
            self.batch,
            self.steps,
        )
        .with_trainable(trainable)
        .with_distillation(Some(distillation))
        .with_accumulation(self.accumulation)
        .with_epochs(self.validations.min(self.steps))
        .with_learning_rate(self.lr)
        .with_fusion_learning_rate_ratio(self.fusion_lr_ratio)
        .with_gain_learning_rate_ratio(Some(self.gain_lr_ratio))
        .with_weight_decay(self.weight_decay)
        .with_warmup_steps(self.steps / 20)
        .with_seed(self.seed)
    }

    fn test_windows(
        &self,
        path: &Path,
        tokenizer: &Tokenizer,
    ) -> Result<TokenWindows, Box<dyn Error>> {
        let text = fs::read_to_string(path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let mut tokens = tokenizer.encode(&text)?;
        tokens.truncate(self.test_tokens);
        let file = self.out.join("test.bin");
        let file = TokenFile::write(file, tokenizer.vocab_size(), [Ok(tokens)])?;
        Ok(TokenWindows::of_file(file, self.context)?.with_bos(tokenizer.bos()?))
    }
}

/// What a distillation was and how it went.
#[derive(Serialize)]
struct Report<'a> {
    config: &'a TrainingConfig,
    /// Tokens of the text that windows are drawn from.
    text_tokens: usize,
    /// Tokens that each perplexity is of.
    scored_tokens: usize,
    teacher_perplexity: f64,
    /// The student's, from before the first step on.
    curve: Vec<Point>,
}

/// Perplexity after some tokens.
#[derive(Serialize)]
struct Point {
    tokens: usize,
    perplexity: f64,
}
