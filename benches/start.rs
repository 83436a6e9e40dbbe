//! Cold start: from a directory or a GGUF file to the first token of a prompt, in a process of its own.
//!
//! ```sh
//! cargo bench --bench start
//! cargo bench --bench start -- --model DIR --weights int8 --repeats 9
//! ```
//!
//! Without `--model` a random decoder of 135 million parameters is saved in every type of `--files`, with a
//! tokenizer of as many tokens as it has. Every measurement is by a new process, all of them taking turns;
//! figures are medians. Files are read before, so that they come from the page cache.

#[path = "../examples/backend/mod.rs"]
mod backend;
mod figures;
#[path = "../examples/json/mod.rs"]
mod json;
mod memory;
mod shape;

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use burn::tensor::backend::Backend;
use clap::{Parser, ValueEnum};
use fusedkv::checkpoint::gguf::load_gguf;
use fusedkv::checkpoint::{LoadOptions, SaveOptions, load_checkpoint, save_checkpoint};
use fusedkv::tokenizer::Tokenizer;
use fusedkv::{FusedKvDecoder, Logits, TokenBatch, WeightFormat};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use backend::{BackendName, DtypeName, Program, exit_code};
use figures::{MIB, median};
use json::{check_place, write_json};
use memory::PeakMemory;
use shape::Shape;

#[global_allocator]
static ALLOCATOR: memory::Allocator = memory::Allocator;

/// Measure how long a model takes from its files to its first token.
#[derive(Parser)]
#[command(
    mut_arg("layers", |arg| arg.default_value("30")),
    mut_arg("hidden", |arg| arg.default_value("576")),
    mut_arg("heads", |arg| arg.default_value("9")),
    mut_arg("ffn", |arg| arg.default_value("1536")),
    mut_arg("vocab", |arg| arg.default_value("49152"))
)]
struct Args {
    /// Method of the random decoder; a name that ends in `gqa` has grouped queries
    #[arg(long, default_value = "gqa")]
    method: String,
    /// Float types of the random decoder's files
    #[arg(long, value_enum, value_delimiter = ',', default_value = "f32,bf16")]
    files: Vec<DtypeName>,
    /// Formats of the matrices in memory, each with every file: model, f16, bf16, int8 or int4
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "model,f16,bf16,int8,int4"
    )]
    weights: Vec<WeightFormat>,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 16)]
    prompt: usize,
    /// Processes for each figure
    #[arg(long, default_value = "5")]
    repeats: NonZeroUsize,
    #[command(flatten)]
    shape: Shape,
    /// Directories, or GGUF files, in place of random ones
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    model: Vec<PathBuf>,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
    /// Where to write the figures, and beside it the random decoders
    #[arg(long, value_name = "FILE", default_value = "target/bench/start.json")]
    out: PathBuf,
    /// What a process of its own is to do
    #[arg(long, hide = true, value_enum)]
    task: Option<Task>,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Task {
    /// Read the files.
    Read,
    /// Load the model and give the first token.
    Start,
}

/// Seconds that the files alone take.
#[derive(Serialize, Deserialize)]
struct Reading {
    /// Into memory of their own.
    whole: f64,
    /// Into a buffer of a MiB, again and again: from the page cache alone.
    buffered: f64,
}

/// Seconds and bytes of one start.
#[derive(Serialize, Deserialize)]
struct Start {
    load: f64,
    /// From the start of loading.
    first_token: f64,
    /// The same prompt again, when all is in its place.
    prefill: f64,
    weight_bytes: usize,
    /// The most allocated while loading.
    peak_bytes: usize,
    /// The most that was resident in the whole process, if the system tells.
    resident_bytes: Option<usize>,
}

/// One model in one format.
#[derive(Serialize)]
struct Case {
    files: String,
    weights: String,
    file_bytes: u64,
    weight_bytes: usize,
    read_s: f64,
    read_buffered_s: f64,
    load_s: f64,
    prefill_s: f64,
    first_token_s: f64,
    /// `first_token_s` ÷ (`read_s` + `prefill_s`).
    ratio: f64,
    /// The same with `read_buffered_s`.
    ratio_buffered: f64,
    /// The most allocated while loading ÷ `weight_bytes`.
    peak_ratio: f64,
    /// The most resident beyond the weights.
    resident_beyond_bytes: Option<usize>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(args.backend.run(args))
}

impl Program for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        match self.task {
            Some(Task::Read) => report(&read(&self.model)?),
            Some(Task::Start) => report(&self.start::<B>(device)?),
            None => self.compare::<B>(device),
        }
    }
}

/// To the process that asked.
fn report(figures: &impl Serialize) -> Result<(), Box<dyn Error>> {
    println!("{}", serde_json::to_string(figures)?);
    Ok(())
}

fn read(paths: &[PathBuf]) -> Result<Reading, Box<dyn Error>> {
    let [path] = paths else {
        return Err("one model at a time".into());
    };
    let files = files(path)?;
    let start = Instant::now();
    let mut buffer = vec![1; 1 << 20];
    for path in &files {
        let mut file = File::open(path)?;
        while file.read(&mut buffer)? > 0 {}
    }
    let buffered = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let whole = files.iter().map(fs::read).collect::<Result<Vec<_>, _>>()?;
    let seconds = start.elapsed().as_secs_f64();
    drop(whole);
    Ok(Reading {
        whole: seconds,
        buffered,
    })
}

/// The files of a model, which may be one itself.
fn files(path: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = fs::read_dir(path)?.map(|entry| Ok(entry?.path()));
    let mut files = entries.collect::<Result<Vec<_>, std::io::Error>>()?;
    files.retain(|path| path.is_file());
    Ok(files)
}

/// The most that has been resident.
fn resident() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

impl Args {
    /// In a process that has done nothing else.
    fn start<B: Backend>(&self, device: &B::Device) -> Result<Start, Box<dyn Error>> {
        let ([path], [weights]) = (&self.model[..], &self.weights[..]) else {
            return Err("one model in one format at a time".into());
        };
        let memory = PeakMemory::start();
        let start = Instant::now();
        let options = LoadOptions::new().with_weights(*weights);
        let model = match path.is_file() {
            true => load_gguf::<B>(path, options, device)?.model,
            false => load_checkpoint::<B>(path, options, device)?.model,
        };
        let load = start.elapsed().as_secs_f64();
        let peak_bytes = memory.peak();
        self.token(&model, device)?;
        let first_token = start.elapsed().as_secs_f64();
        let mut prefill = (0..5)
            .map(|_| {
                let start = Instant::now();
                self.token(&model, device)?;
                Ok(start.elapsed().as_secs_f64())
            })
            .collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        Ok(Start {
            load,
            first_token,
            prefill: median(&mut prefill),
            weight_bytes: model.weight_bytes(),
            peak_bytes,
            resident_bytes: resident(),
        })
    }

    /// The first token after the prompt.
    fn token<B: Backend>(
        &self,
        model: &FusedKvDecoder<B>,
        device: &B::Device,
    ) -> Result<(), Box<dyn Error>> {
        let vocab = model.config().vocab_size;
        let row: Vec<u32> = (0..self.prompt)
            .map(|i| (i * 7919 % vocab) as u32)
            .collect();
        let tokens = TokenBatch::<B>::from_rows(&[row], vocab, device)?;
        let mut cache = model.new_cache(1, self.prompt + 1)?;
        let logits = model.forward_cached(tokens, &mut cache, Logits::Last)?;
        // Reading it waits for it.
        logits.argmax(2).into_scalar();
        Ok(())
    }

    fn compare<B: Backend>(mut self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        check_place(&self.out)?;
        if self.model.is_empty() {
            self.model = self.save_random::<B>(device)?;
        }
        println!(
            "| files | weights | read s | load s | prefill s | first token s | ratio | to reading \
             in pieces | peak / weights | resident beyond MiB |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|");
        let mut cases = Vec::new();
        for path in &self.model {
            let mut bytes = 0;
            for file in files(path)? {
                bytes += file.metadata()?.len();
            }
            // Into the page cache; and memory that the system has had in use is faster to get.
            self.process::<Reading>(path, "read", WeightFormat::Model)?;
            self.process::<Start>(path, "start", WeightFormat::Model)?;
            let mut readings = Vec::new();
            let mut starts: Vec<Vec<Start>> = self.weights.iter().map(|_| Vec::new()).collect();
            for _ in 0..self.repeats.get() {
                readings.push(self.process::<Reading>(path, "read", WeightFormat::Model)?);
                for (&weights, starts) in self.weights.iter().zip(&mut starts) {
                    starts.push(self.process(path, "start", weights)?);
                }
            }
            for (weights, starts) in self.weights.iter().zip(&starts) {
                let case = Case::of(path, bytes, *weights, &readings, starts);
                println!("{}", case.row());
                cases.push(case);
            }
            write_json(&self.out, &cases)?;
        }
        println!("\nWritten to {}", self.out.display());
        Ok(())
    }

    /// What a process of its own reports.
    fn process<R: DeserializeOwned>(
        &self,
        model: &Path,
        task: &str,
        weights: WeightFormat,
    ) -> Result<R, Box<dyn Error>> {
        let backend = self.backend.to_possible_value().ok_or("no such backend")?;
        let output = Command::new(env::current_exe()?)
            .args(["--task", task, "--weights", &weights.to_string()])
            .args(["--backend", backend.get_name()])
            .args(["--prompt", &self.prompt.to_string()])
            .arg("--model")
            .arg(model)
            .output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// A directory for every type of files.
    fn save_random<B: Backend>(&self, device: &B::Device) -> Result<Vec<PathBuf>, Box<dyn Error>> {
        let mut config = self.shape.config(&self.method, 8192)?;
        config.tie_embeddings = true;
        let model = config.init::<B>(device)?;
        let place = self.out.with_extension("models");
        fs::create_dir_all(&place)?;
        let tokenizer = place.join("tokenizer.json");
        fs::write(&tokenizer, pairs_of_bytes(config.vocab_size).to_string())?;
        let tokenizer = Tokenizer::load(tokenizer)?;
        let save = |&files: &DtypeName| {
            let name = files.to_possible_value().ok_or("no such type")?;
            let path = place.join(name.get_name());
            let options = SaveOptions::new()
                .with_dtype(files.into())
                .with_tokenizer(tokenizer.clone());
            save_checkpoint(&path, &model, &options)?;
            Ok(path)
        };
        self.files.iter().map(save).collect()
    }
}

/// A tokenizer of every byte and of as many pairs of them as make up the rest.
fn pairs_of_bytes(vocab: usize) -> Value {
    // Of bytes, characters that JSON need not escape.
    let byte = |byte: usize| char::from_u32(0x100 + byte as u32).unwrap_or(' ');
    let pairs: Vec<_> = (0..256 * 256)
        .map(|pair| [byte(pair / 256), byte(pair % 256)])
        .take(vocab.saturating_sub(256))
        .collect();
    let bytes = (0..256).map(|i| byte(i).to_string());
    let tokens = bytes.chain(pairs.iter().map(String::from_iter));
    let vocab: Map<String, Value> = tokens
        .zip(0..)
        .map(|(token, i)| (token, json!(i)))
        .collect();
    json!({
        "version": "1.0",
        "model": { "type": "BPE", "vocab": vocab, "merges": pairs }
    })
}

impl Case {
    fn of(
        path: &Path,
        file_bytes: u64,
        weights: WeightFormat,
        readings: &[Reading],
        starts: &[Start],
    ) -> Self {
        let of_readings = |figure: fn(&Reading) -> f64| {
            median(&mut readings.iter().map(figure).collect::<Vec<_>>())
        };
        let of_starts =
            |figure: fn(&Start) -> f64| median(&mut starts.iter().map(figure).collect::<Vec<_>>());
        let (read, buffered) = (of_readings(|r| r.whole), of_readings(|r| r.buffered));
        let (prefill, first) = (of_starts(|s| s.prefill), of_starts(|s| s.first_token));
        let weight_bytes = starts.iter().map(|s| s.weight_bytes).max().unwrap_or(0);
        let peak = starts.iter().map(|s| s.peak_bytes).max().unwrap_or(0);
        let resident = starts.iter().filter_map(|s| s.resident_bytes).max();
        Self {
            files: path.display().to_string(),
            weights: weights.to_string(),
            file_bytes,
            weight_bytes,
            read_s: read,
            read_buffered_s: buffered,
            load_s: of_starts(|s| s.load),
            prefill_s: prefill,
            first_token_s: first,
            ratio: first / (read + prefill),
            ratio_buffered: first / (buffered + prefill),
            peak_ratio: peak as f64 / weight_bytes as f64,
            resident_beyond_bytes: resident.map(|bytes| bytes.saturating_sub(weight_bytes)),
        }
    }

    fn row(&self) -> String {
        let beyond = self.resident_beyond_bytes;
        let beyond = beyond.map(|bytes| format!("{:.0}", bytes as f64 / MIB));
        format!(
            "| {} | {} | {:.3} | {:.3} | {:.3} | {:.3} | {:.2} | {:.2} | {:.3} | {} |",
            self.files,
            self.weights,
            self.read_s,
            self.load_s,
            self.prefill_s,
            self.first_token_s,
            self.ratio,
            self.ratio_buffered,
            self.peak_ratio,
            beyond.unwrap_or_default(),
        )
    }
}
