//! Training tokens per second and peak memory of every method, in one run: forward, backward and the
//! optimizer that [`fusedkv::train`] uses, on random tokens.
//!
//! ```sh
//! cargo bench --bench training
//! cargo bench --bench training -- --methods standard,fused_kv --contexts 2048 --batch 2
//! ```
//!
//! The models take turns, so that each ratio is of measurements made side by side. Figures are
//! medians.

#[path = "../examples/backend/mod.rs"]
mod backend;
mod figures;
#[path = "../examples/json/mod.rs"]
mod json;
mod memory;
mod shape;

use std::error::Error;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use burn::optim::Optimizer;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor, TensorData};
use burn_train::TrainStep;
use clap::Parser;
use fusedkv::FusedKvDecoder;
use fusedkv::backend::{Autodiff, BalancedCheckpointing};
use fusedkv::train::{LanguageBatch, TrainingConfig};
use serde::Serialize;

use backend::{BackendName, Program, exit_code};
use figures::{MIB, median};
use json::{check_place, write_json};
use memory::PeakMemory;
use shape::Shape;

#[global_allocator]
static ALLOCATOR: memory::Allocator = memory::Allocator;

/// Measure training steps of every method side by side.
#[derive(Parser)]
struct Args {
    /// Methods to compare; the first is what ratios are to
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "standard,gqa,cla,yoco,fused_kv_lite,fused_kv"
    )]
    methods: Vec<String>,
    /// Tokens per window
    #[arg(long, value_delimiter = ',', default_value = "512,2048")]
    contexts: Vec<usize>,
    /// Windows per step
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Steps each method takes, after one that is not counted
    #[arg(long, default_value = "3")]
    repeats: NonZeroUsize,
    /// Measure again with Burn's activation checkpointing
    #[arg(long)]
    checkpointing: bool,
    #[command(flatten)]
    shape: Shape,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
    /// Where to write the figures
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/training.json"
    )]
    out: PathBuf,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// One method at one context, and its ratios to the first method without checkpointing.
#[derive(Serialize)]
struct Figures {
    method: String,
    context: usize,
    batch: usize,
    checkpointing: bool,
    tokens_per_s: f64,
    tokens_per_s_ratio: f64,
    /// Most bytes of the processor's memory at once beyond the model and the optimizer's moments.
    peak_bytes: usize,
    peak_ratio: f64,
}

/// What one step measured.
struct Turn {
    seconds: f64,
    peak_bytes: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(args.backend.run(args))
}

impl Program for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        check_place(&self.out)?;
        println!(
            "{}\n\n| method | context | batch | checkpointing | tokens/s | ratio | peak MiB | ratio |\n\
             |---|---|---|---|---|---|---|---|",
            B::name(device)
        );
        let mut figures = Vec::new();
        for &context in &self.contexts {
            let mut rows = self.measure::<Autodiff<B>>(context, device)?;
            if self.checkpointing {
                type Balanced<B> = Autodiff<B, BalancedCheckpointing>;
                for mut row in self.measure::<Balanced<B>>(context, device)? {
                    row.checkpointing = true;
                    rows.push(row);
                }
            }
            let (tokens_per_s, peak_bytes) = (rows[0].tokens_per_s, rows[0].peak_bytes);
            for mut row in rows {
                row.tokens_per_s_ratio = row.tokens_per_s / tokens_per_s;
                row.peak_ratio = row.peak_bytes as f64 / peak_bytes as f64;
                println!("{}", row.row());
                figures.push(row);
            }
            write_json(&self.out, &figures)?;
        }
        println!("\nWritten to {}", self.out.display());
        Ok(())
    }
}

impl Args {
    /// All methods, taking turns.
    fn measure<B: AutodiffBackend>(
        &self,
        context: usize,
        device: &B::Device,
    ) -> Result<Vec<Figures>, Box<dyn Error>> {
        let mut models = self
            .methods
            .iter()
            .map(|name| {
                let model = self.shape.config(name, context)?;
                let training = TrainingConfig::new(model.clone(), context, self.batch, 1);
                Ok(Trainee {
                    method: name.clone(),
                    model: Some(model.init::<B>(device)?),
                    optimizer: training.optimizer(),
                    turns: Vec::new(),
                })
            })
            .collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        for repeat in 0..=self.repeats.get() {
            for model in &mut models {
                let turn = model.step(self.batch, context, self.shape.vocab, device);
                if repeat > 0 {
                    model.turns.push(turn);
                }
            }
        }
        let figures = models
            .iter()
            .map(|model| model.figures(self.batch, context));
        Ok(figures.collect())
    }
}

/// A model, its optimizer, and what its steps measured.
struct Trainee<B: AutodiffBackend, O> {
    method: String,
    /// `None` only while a step has it.
    model: Option<FusedKvDecoder<B>>,
    optimizer: O,
    turns: Vec<Turn>,
}

impl<B: AutodiffBackend, O: Optimizer<FusedKvDecoder<B>, B>> Trainee<B, O> {
    fn step(&mut self, batch: usize, context: usize, vocab: usize, device: &B::Device) -> Turn {
        let ids = |next: usize| {
            let ids: Vec<i64> = (0..batch * context)
                .map(|i| ((i + next) * 7919 % vocab) as i64)
                .collect();
            Tensor::<B, 2, Int>::from_data(TensorData::new(ids, [batch, context]), device)
        };
        let (tokens, targets) = (ids(0), ids(1));
        let model = self.model.take().expect("a step gives the model back");
        let memory = PeakMemory::start();
        let start = Instant::now();
        let output = TrainStep::step(
            &model,
            LanguageBatch {
                tokens,
                targets,
                mask: None,
            }
            .into(),
        );
        let model = self.optimizer.step(1e-4, model, output.grads);
        // Reading a number waits for all of them.
        let gain = model.parameter::<1>("model.norm.weight");
        let _ = gain.map(|gain| gain.sum().into_scalar());
        let turn = Turn {
            seconds: start.elapsed().as_secs_f64(),
            peak_bytes: memory.peak(),
        };
        self.model = Some(model);
        turn
    }

    /// Medians; the ratios are to itself.
    fn figures(&self, batch: usize, context: usize) -> Figures {
        let mut seconds: Vec<f64> = self.turns.iter().map(|turn| turn.seconds).collect();
        Figures {
            method: self.method.clone(),
            context,
            batch,
            checkpointing: false,
            tokens_per_s: (batch * context) as f64 / median(&mut seconds),
            tokens_per_s_ratio: 1.0,
            peak_bytes: self
                .turns
                .iter()
                .map(|turn| turn.peak_bytes)
                .max()
                .unwrap_or(0),
            peak_ratio: 1.0,
        }
    }
}

impl Figures {
    fn row(&self) -> String {
        format!(
            "| {} | {} | {} | {} | {:.0} | {:.2} | {:.0} | {:.2} |",
            self.method,
            self.context,
            self.batch,
            if self.checkpointing { "yes" } else { "no" },
            self.tokens_per_s,
            self.tokens_per_s_ratio,
            self.peak_bytes as f64 / MIB,
            self.peak_ratio,
        )
    }
}
