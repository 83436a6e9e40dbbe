//! Continues prompts with a model: a directory in Hugging Face's layout, e.g. one that `train_tiny`
//! saved.
//!
//! ```sh
//! cargo run --release --example generate -- 'impl Config {'
//! cargo run --release --example generate -- --temperature 0 --stats 'pub fn' 'let mut'
//! echo 'use burn::' | cargo run --release --example generate
//! ```

mod backend;

use std::error::Error;
use std::io::{self, Read, Write, stdin, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::backend::Backend;
use clap::Parser;
use fusedkv::checkpoint::load_checkpoint;
use fusedkv::tokenizer::{TextStream, Tokenizer};
use fusedkv::{CacheDtype, GenerationConfig, generate};

use backend::{BackendName, DtypeName, Program, exit_code};

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Continue prompts with a model in Hugging Face's layout.
#[derive(Parser)]
struct Args {
    /// What to continue; several are one batch. Standard input if there is none
    prompts: Vec<String>,
    /// Directory of the model
    #[arg(long, value_name = "DIR", default_value = "target/train_tiny")]
    model: PathBuf,
    /// What numbers to compute with
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
    /// What numbers the cache keeps: model, f32, f16, bf16 or int8
    #[arg(long, default_value = "model")]
    cache_dtype: CacheDtype,
    /// Tokens to write per prompt
    #[arg(long, default_value_t = 120)]
    max_new_tokens: usize,
    /// Divides the logits; 0 always takes the most likely token
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    /// Draw among this many most likely tokens
    #[arg(long)]
    top_k: Option<usize>,
    /// Draw among the most likely tokens that together reach this probability
    #[arg(long)]
    top_p: Option<f64>,
    /// Above 1, makes tokens that are already there less likely
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// The same seed draws the same tokens
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
    /// Print times and the size of the cache
    #[arg(long)]
    stats: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match args.backend.run(args) {
        // Whoever reads the output has seen enough.
        Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
        result => exit_code(result),
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

impl Program for Args {
    fn run<B: Backend>(mut self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        let loaded = load_checkpoint::<B>(&self.model, self.dtype.into(), device)?;
        let (model, eos) = (loaded.model, loaded.eos);
        let tokenizer = loaded.tokenizer.ok_or("the model has no tokenizer.json")?;
        if self.prompts.is_empty() {
            self.prompts.push(read_prompt()?);
        }
        let prompts = self.prompts.iter().map(|prompt| tokenizer.encode(prompt));
        let prompts = prompts.collect::<Result<Vec<_>, _>>()?;

        let start = Instant::now();
        let mut generation = generate(&model, &prompts, &self.settings(&eos))?;
        let mut output = Output::new(&self.prompts, &tokenizer, eos)?;
        let mut times = Vec::new();
        for token in generation.by_ref() {
            let token = token?;
            // Rows take turns: the first row's tokens mark the steps, and those of a longer row.
            if output.push(token.row, token.id)? > times.len() {
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        output.finish()?;

        if self.stats {
            let bytes = generation.cache().bytes_allocated();
            let (first, last) = (times[0], times[times.len() - 1]);
            eprintln!("time to first token (TTFT)        {first:.1} ms");
            if times.len() > 1 {
                let each = (last - first) / (times.len() - 1) as f64;
                eprintln!("time per token after it (TPOT)    {each:.2} ms");
            }
            eprintln!("cache                             {bytes} bytes");
        }
        Ok(())
    }
}

impl Args {
    fn settings(&self, eos: &[u32]) -> GenerationConfig {
        GenerationConfig::new()
            .with_max_new_tokens(self.max_new_tokens)
            .with_temperature(self.temperature)
            .with_top_k(self.top_k)
            .with_top_p(self.top_p)
            .with_repetition_penalty(self.repetition_penalty)
            .with_seed(self.seed)
            .with_cache_dtype(self.cache_dtype)
            .with_stop_tokens(eos.to_vec())
    }
}

/// The whole of standard input, without the newline that ends it.
fn read_prompt() -> io::Result<String> {
    let mut prompt = String::new();
    stdin().read_to_string(&mut prompt)?;
    if prompt.ends_with('\n') {
        prompt.pop();
    }
    Ok(prompt)
}

/// Prints a single prompt's text as it comes, and those of several one after the other.
struct Output<'t> {
    rows: Vec<(TextStream<'t>, String)>,
    lens: Vec<usize>,
    eos: Vec<u32>,
}

impl<'t> Output<'t> {
    fn new(prompts: &[String], tokenizer: &'t Tokenizer, eos: Vec<u32>) -> io::Result<Self> {
        let output = Self {
            rows: prompts
                .iter()
                .map(|prompt| (tokenizer.stream(), prompt.clone()))
                .collect(),
            lens: vec![0; prompts.len()],
            eos,
        };
        if let [prompt] = prompts {
            print(prompt)?;
        }
        Ok(output)
    }

    /// Takes a token of a row and returns how many it has now.
    fn push(&mut self, row: usize, token: u32) -> Result<usize, Box<dyn Error>> {
        self.lens[row] += 1;
        if !self.eos.contains(&token) {
            let alone = self.rows.len() == 1;
            let (stream, text) = &mut self.rows[row];
            let piece = stream.push(token)?;
            if alone {
                print(&piece)?;
            } else {
                text.push_str(&piece);
            }
        }
        Ok(self.lens[row])
    }

    fn finish(self) -> Result<(), Box<dyn Error>> {
        let alone = self.rows.len() == 1;
        for (row, (stream, text)) in self.rows.into_iter().enumerate() {
            let rest = stream.finish()?;
            match (alone, row) {
                (true, _) => print(&format!("{rest}\n"))?,
                (false, 0) => print(&format!("{text}{rest}\n"))?,
                (false, _) => print(&format!("---\n{text}{rest}\n"))?,
            }
        }
        Ok(())
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
