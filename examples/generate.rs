//! Lets a model that `train_tiny` saved continue one or several prompts.

mod backends;

use std::error::Error;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use backends::{BackendName, Job};
use burn::tensor::backend::Backend;
use clap::Parser;
use fusedkv::train::{END_OF_TEXT, TextStream, Tokenizer, encode, load_model};
use fusedkv::{GenerationConfig, generate};

/// Continue prompts with a model that train_tiny saved.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Prompts; several make one batch [default: standard input]
    prompts: Vec<String>,
    /// Directory of the model
    #[arg(long, default_value = "target/train_tiny")]
    model: PathBuf,
    #[arg(long, value_enum, default_value_t = BackendName::Flex)]
    backend: BackendName,
    #[arg(long, default_value_t = 100)]
    max_new_tokens: usize,
    /// 0 takes the most likely token
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    /// Draw among this many most likely tokens
    #[arg(long)]
    top_k: Option<usize>,
    /// Draw among the most likely tokens that reach this probability
    #[arg(long)]
    top_p: Option<f64>,
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print TTFT, TPOT and the size of the cache
    #[arg(long)]
    stats: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match backends::run(args.backend, args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Job for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        let (model, tokenizer) = load_model::<B>(&self.model, device)?;
        let texts = self.texts()?;
        let prompts = texts
            .iter()
            .map(|text| encode(&tokenizer, text))
            .collect::<Result<Vec<_>, _>>()?;
        let settings = GenerationConfig::new()
            .with_max_new_tokens(self.max_new_tokens)
            .with_temperature(self.temperature)
            .with_top_k(self.top_k)
            .with_top_p(self.top_p)
            .with_repetition_penalty(self.repetition_penalty)
            .with_stop_tokens(tokenizer.token_to_id(END_OF_TEXT).into_iter().collect())
            .with_seed(self.seed);

        let start = Instant::now();
        let mut generation = generate(&model, &prompts, &settings)?;
        let cache_bytes = generation.cache().bytes_allocated();
        let mut output = Output::new(&tokenizer, &texts)?;
        let mut first = None;
        let mut steps = 0;
        let mut last_row = usize::MAX;
        while let Some(token) = generation.next() {
            let token = token?;
            first.get_or_insert_with(|| start.elapsed());
            // A row number that does not grow begins a new step.
            steps += usize::from(token.row <= last_row);
            last_row = token.row;
            output.push(token.row, token.id)?;
        }
        let total = start.elapsed();
        output.finish();
        if let (true, Some(first)) = (self.stats, first) {
            let decode = (total - first).as_secs_f64() * 1e3;
            println!(
                "\nTTFT {:.1} ms, TPOT {:.2} ms over {steps} steps, cache {cache_bytes} bytes",
                first.as_secs_f64() * 1e3,
                decode / (steps.max(2) - 1) as f64,
            );
        }
        Ok(())
    }
}

impl Args {
    fn texts(&self) -> Result<Vec<String>, Box<dyn Error>> {
        if !self.prompts.is_empty() {
            return Ok(self.prompts.clone());
        }
        if std::io::stdin().is_terminal() {
            eprintln!("reading the prompt from standard input, end with Ctrl-D");
        }
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        match text.is_empty() {
            true => Err("the prompt is empty".into()),
            false => Ok(vec![text]),
        }
    }
}

/// Text as it comes for one prompt; for several, each when all is done.
struct Output<'t> {
    streams: Vec<TextStream<'t>>,
    texts: Vec<String>,
}

impl<'t> Output<'t> {
    fn new(tokenizer: &'t Tokenizer, prompts: &[String]) -> Result<Self, Box<dyn Error>> {
        if let [prompt] = prompts {
            print!("{prompt}");
            std::io::stdout().flush()?;
        }
        Ok(Self {
            streams: prompts.iter().map(|_| TextStream::new(tokenizer)).collect(),
            texts: prompts.to_vec(),
        })
    }

    fn push(&mut self, row: usize, id: u32) -> Result<(), Box<dyn Error>> {
        let text = self.streams[row].push(id)?;
        if self.texts.len() == 1 {
            print!("{text}");
            std::io::stdout().flush()?;
        }
        self.texts[row].push_str(&text);
        Ok(())
    }

    fn finish(self) {
        match self.texts.as_slice() {
            [_] => println!(),
            several => several.iter().for_each(|text| println!("{text}\n---")),
        }
    }
}
