//! Trains a tiny language model and lets it write through its KV cache.
//!
//! `cargo run --release --example train_tiny` needs nothing else: it trains a FusedKV decoder on
//! this crate's own sources in a few minutes on two CPU cores. `--help` lists what can be changed.

mod backends;

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use backends::{BackendName, Job};
use burn::tensor::backend::Backend;
use clap::Parser;
use fusedkv::backend::Autodiff;
use fusedkv::train::{
    TextStream, Tokenizer, TrainingConfig, encode, load_tokenizer, save_model, train, train_bpe,
};
use fusedkv::{FusedKvDecoder, FusedKvDecoderConfig, GenerationConfig, KvPlan, generate};

/// The default text: this crate's sources.
const SOURCES: &[&str] = &[
    include_str!("../src/lib.rs"),
    include_str!("../src/plan.rs"),
    include_str!("../src/config.rs"),
    include_str!("../src/cost.rs"),
    include_str!("../src/cache.rs"),
    include_str!("../src/tokens.rs"),
    include_str!("../src/error.rs"),
    include_str!("../src/backend.rs"),
    include_str!("../src/decoder/mod.rs"),
    include_str!("../src/decoder/attend.rs"),
    include_str!("../src/decoder/attention.rs"),
    include_str!("../src/decoder/fusion.rs"),
    include_str!("../src/decoder/kv.rs"),
    include_str!("../src/decoder/layer.rs"),
    include_str!("../src/decoder/rope.rs"),
    include_str!("../src/generate/mod.rs"),
    include_str!("../src/generate/sampling.rs"),
    include_str!("../src/train/mod.rs"),
    include_str!("../src/train/data.rs"),
    include_str!("../src/train/files.rs"),
    include_str!("../src/train/metric.rs"),
    include_str!("../src/train/model_dir.rs"),
    include_str!("../src/train/progress.rs"),
    include_str!("../src/train/step.rs"),
    include_str!("../src/train/tokenizer.rs"),
];

/// Train a tiny language model, then let it write through its KV cache.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Text to train on [default: this crate's sources]
    #[arg(long)]
    data: Option<PathBuf>,
    /// Where the run, and in the end the model, is kept
    #[arg(long, default_value = "target/train_tiny")]
    out: PathBuf,
    /// Continue from the last checkpoint in --out
    #[arg(long)]
    resume: bool,
    #[arg(long, value_enum, default_value_t = BackendName::Flex)]
    backend: BackendName,

    /// How top layers get keys and values
    #[arg(long, default_value = "fused_kv", value_parser = clap::builder::PossibleValuesParser::new(KvPlan::METHODS))]
    method: String,
    #[arg(long, default_value_t = 6)]
    layers: usize,
    #[arg(long, default_value_t = 128)]
    hidden: usize,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Fewer than --heads is grouped-query attention
    #[arg(long, default_value_t = 4)]
    kv_heads: usize,
    #[arg(long, default_value_t = 32)]
    head_dim: usize,
    #[arg(long, default_value_t = 352)]
    ffn: usize,

    /// Vocabulary of the byte-level BPE trained on the text
    #[arg(long, default_value_t = 1024)]
    vocab: usize,
    /// Use this tokenizer.json instead
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Tokens per window
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Windows per step
    #[arg(long, default_value_t = 16)]
    batch: usize,
    #[arg(long, default_value_t = 240)]
    steps: usize,
    /// While training, on the output of attention and SwiGLU blocks
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// Peak learning rate
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// What the sample at the end continues
    #[arg(long, default_value = "/// The cache")]
    prompt: String,
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

impl Args {
    fn text(&self) -> Result<String, Box<dyn Error>> {
        match &self.data {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|error| format!("--data {}: {error}", path.display()).into()),
            None => Ok(SOURCES.concat()),
        }
    }

    fn model(&self, vocab_size: usize) -> Result<FusedKvDecoderConfig, Box<dyn Error>> {
        let plan = KvPlan::from_method(&self.method, self.layers)?;
        Ok(FusedKvDecoderConfig::new(
            vocab_size,
            self.hidden,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.ffn,
            plan,
        )
        .with_rope_theta(1e4)
        .with_dropout(self.dropout)
        .with_max_positions(8 * self.context))
    }
}

impl Job for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        let text = self.text()?;
        let tokenizer = match &self.tokenizer {
            Some(path) => load_tokenizer(path)?,
            None => train_bpe(&text, self.vocab)?,
        };
        let tokens = encode(&tokenizer, &text)?;
        let model = self.model(tokenizer.get_vocab_size(true))?;
        println!(
            "{}: {} parameters, {} of {} layers store; {} tokens of text",
            self.method,
            model.costs()?.parameters(),
            model.validate()?.n_stores(),
            self.layers,
            tokens.len(),
        );
        let config = TrainingConfig::new(model)
            .with_context(self.context)
            .with_batch_size(self.batch)
            .with_steps(self.steps)
            .with_epoch_steps(60.min(self.steps.max(1)))
            .with_warmup_steps(self.steps / 10)
            .with_learning_rate(self.lr)
            .with_seed(self.seed)
            .with_resume(self.resume);
        let trained = train::<Autodiff<B>>(&config, tokens, &self.out, device)?;
        save_model(&self.out, &trained.model, &tokenizer)?;

        println!(
            "\ntrain loss {:.3}, valid loss {:.3} nats per token, valid perplexity {:.2}",
            trained.train_loss,
            trained.valid_loss,
            trained.valid_loss.exp(),
        );
        println!(
            "{} tokens in {:.0} s, {:.0} tokens/s",
            trained.tokens,
            trained.seconds,
            trained.tokens as f64 / trained.seconds,
        );
        print_cache_bytes(&trained.model, device)?;
        print_sample(&trained.model, &tokenizer, &self.prompt, self.seed)?;
        println!(
            "\nsaved to {out}; write more with\n  cargo run --release --example generate -- --model {out} \"{prompt}\"",
            out = self.out.display(),
            prompt = self.prompt,
        );
        Ok(())
    }
}

/// What the caches of this decoder and of a standard one really take.
fn print_cache_bytes<B: Backend>(
    model: &FusedKvDecoder<B>,
    device: &B::Device,
) -> Result<(), Box<dyn Error>> {
    let capacity = model.config().max_positions;
    let mut standard = model.config().clone();
    standard.plan = KvPlan::Standard;
    let standard = standard.init::<B>(device)?.new_cache(1, capacity)?;
    let own = model.new_cache(1, capacity)?;
    println!(
        "cache for {capacity} tokens: {} bytes, standard decoder {} bytes, ratio {:.3}",
        own.bytes_allocated(),
        standard.bytes_allocated(),
        own.bytes_allocated() as f64 / standard.bytes_allocated() as f64,
    );
    Ok(())
}

fn print_sample<B: Backend>(
    model: &FusedKvDecoder<B>,
    tokenizer: &Tokenizer,
    prompt: &str,
    seed: u64,
) -> Result<(), Box<dyn Error>> {
    let settings = GenerationConfig::new()
        .with_max_new_tokens(120)
        .with_temperature(0.7)
        .with_top_k(Some(40))
        .with_seed(seed);
    let mut stream = TextStream::new(tokenizer);
    print!("\nsample, through the cache:\n{prompt}");
    for token in generate(model, &[encode(tokenizer, prompt)?], &settings)? {
        print!("{}", stream.push(token?.id)?);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
