//! Scores a text with a model in Hugging Face's layout.
//!
//! ```sh
//! cargo run --release --example score -- --text README.md
//! cargo run --release --example score -- --model DIR --text book.txt --context 512 --stride 256
//! cargo run --release --example score -- --model DIR --ids ids.json --logits logits.safetensors
//! ```

mod backend;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use clap::Parser;
use fusedkv::checkpoint::{LoadOptions, RowWriter, WeightDtype, load_adapter, load_checkpoint};
use fusedkv::tokenizer::Tokenizer;
use fusedkv::{CacheDtype, ScoreConfig, WeightFormat, score_with};

use backend::{BackendName, DtypeName, Program, exit_code};

/// Tokens per window unless told otherwise: logits take this times the vocabulary's size.
const CONTEXT: usize = 4096;

/// How often progress is printed.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Score a text with a model in Hugging Face's layout.
#[derive(Parser)]
struct Args {
    /// Directory of the model
    #[arg(long, value_name = "DIR", default_value = "target/train_tiny")]
    model: PathBuf,
    /// Directory of adapters in PEFT's layout, to be taken beside the model's weights
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Text to score
    #[arg(long, value_name = "FILE", required_unless_present = "ids")]
    text: Option<PathBuf>,
    /// Token ids to score, a JSON list
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    ids: Option<PathBuf>,
    /// Tokens per window [default: as many as the model can read, at most 4096]
    #[arg(long)]
    context: Option<usize>,
    /// Tokens from one window's start to the next [default: the context]
    #[arg(long)]
    stride: Option<usize>,
    /// Read the text without the beginning of a text that the model's tokenizer has prompts begin with;
    /// otherwise every window is read behind one
    #[arg(long, conflicts_with = "ids")]
    no_bos: bool,
    /// Write the logits after each token, a tensor `logits` [tokens, vocab] in f32
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    /// Read through the cache, in chunks
    #[arg(long)]
    cached: bool,
    /// Tokens per chunk [default: 128]
    #[arg(long, requires = "cached")]
    chunk: Option<usize>,
    /// What numbers the cache keeps: model, f32, f16, bf16 or int8
    #[arg(long, requires = "cached", default_value = "model")]
    cache_dtype: CacheDtype,
    /// What numbers the matrices are kept in: model, f16, bf16, int8 or int4
    #[arg(long, default_value = "model")]
    weights: WeightFormat,
    /// What numbers to compute with
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(args.backend.run(args))
}

impl Program for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        let options = LoadOptions::from(WeightDtype::from(self.dtype)).with_weights(self.weights);
        let loaded = load_checkpoint::<B>(&self.model, options, device)?;
        let model = match &self.adapter {
            Some(directory) => &load_adapter(directory, loaded.model)?,
            None => &loaded.model,
        };
        let (tokens, words) = self.tokens(loaded.tokenizer.as_ref())?;
        let bos = match &loaded.tokenizer {
            Some(tokenizer) if self.text.is_some() && !self.no_bos => tokenizer.bos()?,
            _ => None,
        };

        let longest = model.config().max_positions - usize::from(bos.is_some());
        let context = self.context.unwrap_or(CONTEXT.min(longest));
        let config = ScoreConfig::new(context)
            .with_stride(self.stride)
            .with_bos(bos)
            .with_chunk(self.cached.then_some(self.chunk.unwrap_or(128)))
            .with_cache_dtype(self.cache_dtype);
        let shape = [tokens.len(), model.config().vocab_size];
        let mut writer = match &self.logits {
            Some(path) => Some(RowWriter::create(path, "logits", shape)?),
            None => None,
        };
        let (mut read, mut shown) = (0, Instant::now());
        let score = score_with(model, &tokens, &config, |logits| {
            read += logits.len() / shape[1];
            if shown.elapsed() > PROGRESS_INTERVAL {
                eprintln!("{read} of {} tokens", tokens.len());
                shown = Instant::now();
            }
            if let Some(writer) = &mut writer {
                writer.write(logits)?;
            }
            Ok::<_, Box<dyn Error>>(())
        })?;
        if let Some(writer) = writer {
            writer.finish()?;
        }

        println!("tokens scored                     {}", score.tokens);
        println!("mean negative log-likelihood      {:.6} nats", score.mean());
        println!(
            "perplexity per token              {:.4}",
            score.perplexity()
        );
        match words {
            Some(words) => println!(
                "perplexity per word               {:.4} ({words} words)",
                score.perplexity_per_word(words),
            ),
            None => println!("perplexity per word               unknown without a tokenizer"),
        }
        Ok(())
    }
}

impl Args {
    /// The tokens, and how many words they are.
    fn tokens(
        &self,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<(Vec<u32>, Option<usize>), Box<dyn Error>> {
        let read = |path: &PathBuf| {
            fs::read_to_string(path)
                .map_err(|error| format!("cannot read {}: {error}", path.display()))
        };
        let words = |text: &str| text.split_whitespace().count();
        match (&self.text, &self.ids) {
            (Some(path), _) => {
                let tokenizer = tokenizer.ok_or("the model has no tokenizer.json, give --ids")?;
                let text = read(path)?;
                Ok((tokenizer.encode(&text)?, Some(words(&text))))
            }
            (None, Some(path)) => {
                let tokens: Vec<u32> = serde_json::from_str(&read(path)?).map_err(|error| {
                    format!("{} is no list of token ids: {error}", path.display())
                })?;
                let text = tokenizer.map(|tokenizer| tokenizer.decode(&tokens));
                Ok((tokens, text.transpose()?.map(|text| words(&text))))
            }
            (None, None) => Err("expected --text or --ids".into()),
        }
    }
}
