//! TTFT, TPOT, cache bytes and peak memory of every method, and what drawing adds to a token, in
//! one run.
//!
//! ```sh
//! cargo bench --bench inference
//! cargo bench --bench inference -- --methods standard,fused_kv --prompts 2048 --repeats 5
//! ```
//!
//! All models are in memory at once and take turns, so that each ratio is of measurements made side
//! by side. Figures are medians. The bound of a decoded token is the bytes it must read (weights
//! and cache) at the bandwidth a probe measures in the same run.

#[path = "../examples/backend/mod.rs"]
mod backend;
mod bandwidth;
mod draws;
mod figures;
#[path = "../examples/font/mod.rs"]
mod font;
#[path = "../examples/json/mod.rs"]
mod json;
mod memory;
mod report;
mod shape;

use std::error::Error;
use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::{Tensor, backend::Backend};
use clap::Parser;
use fusedkv::checkpoint::{LoadOptions, SaveOptions, load_checkpoint, save_checkpoint};
use fusedkv::convert::convert;
use fusedkv::{CacheDtype, FusedKvDecoder, KvPlan, Logits, TokenBatch, WeightFormat};

use backend::{BackendName, Program, exit_code};
use bandwidth::read_bandwidth;
use figures::median;
use json::{check_place, write_json};
use memory::PeakMemory;
use report::{Case, Report};
use shape::Shape;

#[global_allocator]
static ALLOCATOR: memory::Allocator = memory::Allocator;

/// Measure prefill and decoding of every method side by side.
#[derive(Parser)]
struct Args {
    /// Methods to compare; the first is what ratios are to
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "standard,gqa,cla,yoco,fused_kv_lite,fused_kv,fused_kv_gqa"
    )]
    methods: Vec<String>,
    /// Tokens per prompt
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192")]
    prompts: Vec<usize>,
    /// Rows per batch
    #[arg(long, value_delimiter = ',', default_value = "1")]
    batches: Vec<usize>,
    /// Tokens decoded after each prompt
    #[arg(long, default_value = "16")]
    decode: NonZeroUsize,
    /// Turns each method takes, after one that is not counted
    #[arg(long, default_value = "3")]
    repeats: NonZeroUsize,
    /// Formats of the matrices, each with every method: model, f16, bf16, int8 or int4
    #[arg(long, value_delimiter = ',', default_value = "model")]
    weights: Vec<WeightFormat>,
    /// Numbers the caches keep, with each of those: model, f32, f16, bf16 or int8
    #[arg(long, value_delimiter = ',', default_value = "model")]
    cache: Vec<CacheDtype>,
    /// Vocabularies to draw from, with the first method's decoder; without a number none
    #[arg(long, value_delimiter = ',', num_args = 0.., default_value = "32000,151936")]
    vocabularies: Vec<usize>,
    #[command(flatten)]
    shape: Shape,
    /// A standard model's directory, in place of a random one of this shape; converted to the other
    /// methods, fusion weights those of FusedKV-Lite
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Directories of converted models to measure after the methods, as they are
    #[arg(long, value_name = "DIR", value_delimiter = ',')]
    converted: Vec<PathBuf>,
    /// Write the first method's model there
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Write the logits after each prompt there, as f32: NAME.f32
    #[arg(long, value_name = "DIR")]
    logits: Option<PathBuf>,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
    /// Where to write the figures
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/inference.json"
    )]
    out: PathBuf,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(args.backend.run(args))
}

impl Program for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        check_place(&self.out)?;
        let positions = self.prompts.iter().max().unwrap_or(&0) + self.decode.get();
        let mut models = Vec::new();
        for method in &self.methods {
            let model = self.model_of::<B>(method, positions, device)?;
            if let (Some(path), true) = (&self.save, models.is_empty()) {
                save_checkpoint(path, &model, &SaveOptions::new())?;
            }
            models.push((method.clone(), model));
        }
        for path in &self.converted {
            let name = path.file_name().unwrap_or(path.as_os_str());
            let name = name.to_string_lossy().into_owned();
            if models.iter().any(|(other, _)| *other == name) {
                return Err(format!("two models are called {name}").into());
            }
            let model = load_checkpoint::<B>(path, LoadOptions::new(), device)?.model;
            models.push((name, model));
        }
        let mut subjects = Vec::new();
        for (method, model) in models {
            for &weights in &self.weights {
                let model = model.clone().with_weights(weights)?;
                subjects.extend(self.cache.iter().map(|&cache| Subject {
                    name: name(&method, weights, cache),
                    model: model.clone(),
                    cache,
                }));
            }
        }
        let on_cpu = matches!(self.backend, BackendName::Flex | BackendName::Ndarray);
        let mut report = Report::new(B::name(device), on_cpu.then(read_bandwidth));
        println!("{}", report.heading());
        for &batch in &self.batches {
            for &prompt in &self.prompts {
                let cases = subjects
                    .iter()
                    .map(|Subject { name, model, .. }| Case::new(name, batch, prompt, model));
                let mut cases = cases.collect::<Result<Vec<Case>, _>>()?;
                // One turn to warm up, which is not counted.
                for turn in 0..=self.repeats.get() {
                    for (subject, case) in subjects.iter().zip(&mut cases) {
                        let run = self.measure(subject, batch, prompt, device)?;
                        if turn > 0 {
                            case.add(run);
                        }
                    }
                }
                report.add(cases);
                write_json(&self.out, &report)?;
            }
        }
        drop(subjects);
        if let Some(first) = self.methods.first() {
            self.draw::<B>(first, &mut report, device)?;
        }
        println!("\nWritten to {}", self.out.display());
        report.plot(&self.out)?;
        Ok(())
    }
}

/// A method, and what numbers its weights and its cache are.
struct Subject<B: Backend> {
    name: String,
    model: FusedKvDecoder<B>,
    cache: CacheDtype,
}

/// The method, and what is not as usual.
fn name(method: &str, weights: WeightFormat, cache: CacheDtype) -> String {
    let mut name = method.to_owned();
    if weights != WeightFormat::Model {
        name += &format!(", {weights} weights");
    }
    if cache != CacheDtype::Model {
        name += &format!(", {cache} cache");
    }
    name
}

/// What one turn measured, in seconds and bytes.
pub struct Turn {
    pub ttft: f64,
    pub tpot: f64,
    pub cache_bytes: usize,
    pub peak_bytes: usize,
}

impl Args {
    /// The decoder of a method.
    fn model_of<B: Backend>(
        &self,
        method: &str,
        positions: usize,
        device: &B::Device,
    ) -> Result<FusedKvDecoder<B>, Box<dyn Error>> {
        let Some(path) = &self.model else {
            return Ok(self.shape.config(method, positions)?.init(device)?);
        };
        let standard = load_checkpoint::<B>(path, LoadOptions::new(), device)?.model;
        let plan = KvPlan::from_method(method, standard.config().n_layers)?;
        Ok(match plan {
            KvPlan::Standard => standard,
            plan => convert(&standard, &plan)?,
        })
    }

    /// Adds what drawing takes at every vocabulary.
    fn draw<B: Backend>(
        &self,
        method: &str,
        report: &mut Report,
        device: &B::Device,
    ) -> Result<(), Box<dyn Error>> {
        for (i, &vocab) in self.vocabularies.iter().enumerate() {
            if i == 0 {
                println!("\n{}", draws::HEADING);
            }
            let tokens = self.decode.get() * self.repeats.get();
            let mut config = self.shape.config(method, draws::PROMPT + tokens + 1)?;
            config.vocab_size = vocab;
            let model = config.init::<B>(device)?;
            report.add_draws(draws::measure(&model, CacheDtype::Model, tokens, device)?);
            write_json(&self.out, report)?;
        }
        Ok(())
    }

    /// A prompt, then tokens one by one.
    fn measure<B: Backend>(
        &self,
        Subject { name, model, cache }: &Subject<B>,
        batch: usize,
        prompt: usize,
        device: &B::Device,
    ) -> Result<Turn, Box<dyn Error>> {
        let vocab = model.config().vocab_size;
        let tokens = |len: usize, seed: usize| {
            let row = |row: usize| -> Vec<u32> {
                (0..len)
                    .map(|i| ((i * 7919 + row * 104_729 + seed) % vocab) as u32)
                    .collect()
            };
            let rows: Vec<_> = (0..batch).map(row).collect();
            TokenBatch::<B>::from_rows(&rows, vocab, device)
        };
        let memory = PeakMemory::start();
        let mut cache = model.new_cache_of(*cache, batch, prompt + self.decode.get())?;
        let chunk = tokens(prompt, 0)?;
        let start = Instant::now();
        // Reading a number waits for all of them.
        let wait = |logits: Tensor<B, 3>| logits.max().into_scalar();
        let logits = model.forward_cached(chunk, &mut cache, Logits::Last)?;
        wait(logits.clone());
        let ttft = start.elapsed().as_secs_f64();
        if let Some(directory) = &self.logits {
            let numbers = logits.into_data();
            let bytes: Vec<u8> = numbers.iter::<f32>().flat_map(f32::to_le_bytes).collect();
            fs::write(directory.join(format!("{name}.f32")), bytes)?;
        }
        let mut steps = Vec::new();
        for step in 0..self.decode.get() {
            let token = tokens(1, step + 1)?;
            let start = Instant::now();
            wait(model.forward_cached(token, &mut cache, Logits::Last)?);
            steps.push(start.elapsed().as_secs_f64());
        }
        Ok(Turn {
            ttft,
            tpot: median(&mut steps),
            cache_bytes: cache.bytes_allocated(),
            peak_bytes: memory.peak(),
        })
    }
}
