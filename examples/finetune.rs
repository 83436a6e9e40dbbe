//! Fine-tunes a model by adapters of low rank (LoRA) on chats, of which the answers are learned, or on
//! a text. The adapters are saved in PEFT's layout, and merged into the weights if asked.
//!
//! ```sh
//! cargo run --release --example finetune -- --model DIR --chats chats.jsonl --out target/adapter
//! cargo run --release --example generate -- --model DIR --adapter target/adapter --chat
//! cargo run --release --example finetune -- --model DIR --weights int8 --data book.txt \
//!     --rank 16 --targets q_proj k_proj v_proj o_proj --out target/adapter --merge target/merged
//! ```

mod backend;
mod corpus;
mod figures;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use burn::data::dataloader::Dataset;
use burn::module::AutodiffModule;
use burn::tensor::backend::Backend;
use clap::Parser;
use fusedkv::backend::Autodiff;
use fusedkv::checkpoint::{
    LoadOptions, LoadedCheckpoint, SaveOptions, WeightDtype, check_destination, load_adapter,
    load_checkpoint, save_adapter, save_checkpoint,
};
use fusedkv::text::{ChatError, ChatOptions, ChatTemplate};
use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::{
    ChatWindows, Run, Trainable, TrainingConfig, Windows, evaluate, perplexity, train_from_on,
};
use fusedkv::{FusedKvDecoder, LoraConfig, WeightFormat};

use backend::{BackendName, DtypeName, Program, exit_code};

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Files of a model's directory that say how chats are written.
const CHAT_FILES: [&str; 3] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Fine-tune a model by adapters of low rank, on chats or on a text.
#[derive(Parser)]
struct Args {
    /// Directory of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Chats, one a line: {"messages": [{"role": "user", "content": "…"}, …]}. Answers are learned
    #[arg(long, value_name = "FILE", required_unless_present = "data")]
    chats: Option<PathBuf>,
    /// A text file or folder to learn instead
    #[arg(long, value_name = "PATH", conflicts_with = "chats")]
    data: Option<PathBuf>,
    /// Share of the chats, or of the text, that is held out
    #[arg(long, default_value_t = 0.05)]
    valid: f64,
    /// Width between the two matrices of an adapter
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// What adapters add is multiplied with this over the rank
    #[arg(long, default_value_t = 16.0)]
    alpha: f64,
    /// Projections that have adapters, by their names in a checkpoint
    #[arg(long, value_name = "NAME", num_args = 1.., default_values = ["q_proj", "v_proj"])]
    targets: Vec<String>,
    /// What numbers the model's matrices are kept in: model, f16, bf16, int8 or int4
    #[arg(long, default_value = "model")]
    weights: WeightFormat,
    /// What numbers to compute with
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
    /// Tokens per window [default: of chats, as the longest needs; of text, 256]
    #[arg(long)]
    context: Option<usize>,
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
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Directory for the adapters and, in `run`, the checkpoints
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Directory for the model with the adapters merged into its weights
    #[arg(long, value_name = "DIR")]
    merge: Option<PathBuf>,
    /// Go on from the last checkpoint in --out
    #[arg(long)]
    resume: bool,
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
        for out in [&self.out].into_iter().chain(&self.merge) {
            check_destination(out)?;
        }
        let options = self.options().with_weights(self.weights);
        let loaded = load_checkpoint::<Autodiff<B>>(&self.model, options, device)?;
        let tokenizer = loaded.tokenizer.ok_or("the model has no tokenizer.json")?;
        corpus::make_directory(&self.out)?;
        match (&self.chats, &self.data) {
            (Some(path), _) => {
                let positions = loaded.model.config().max_positions;
                let (train, valid) = self.chat_windows(path, &tokenizer, positions)?;
                self.tune::<B, _>(loaded.model, train, valid, device)?;
            }
            (None, data) => {
                let corpus = corpus::open(data.as_deref(), self.valid)?;
                let corpus = corpus.with_end(loaded.eos.first().copied());
                let context = self.context.unwrap_or(256);
                let (train, valid) = corpus::windows(&corpus, &tokenizer, context, &self.out)?;
                self.tune::<B, _>(loaded.model, train, valid, device)?;
            }
        }
        match &self.merge {
            Some(out) => self.merge::<B>(out, device),
            None => Ok(()),
        }
    }
}

impl Args {
    fn options(&self) -> LoadOptions {
        LoadOptions::from(WeightDtype::from(self.dtype))
    }

    fn chat_windows(
        &self,
        path: &PathBuf,
        tokenizer: &Tokenizer,
        positions: usize,
    ) -> Result<(ChatWindows, ChatWindows), Box<dyn Error>> {
        let template = ChatTemplate::from_directory(&self.model)?.ok_or(ChatError::NoTemplate)?;
        let context = self.context.unwrap_or(positions);
        let options = ChatOptions::new();
        let windows = ChatWindows::read(path, tokenizer, &template, &options, context)?;
        let windows = match self.context {
            Some(_) => windows,
            None => windows.fitted(),
        };
        println!(
            "{}: {} windows of up to {} tokens, {} tokens of answers",
            path.display(),
            windows.len(),
            windows.longest(),
            windows.counted(),
        );
        Ok(windows.split(self.valid)?)
    }

    /// Trains adapters and saves them.
    fn tune<B: Backend, W: Windows + Clone + 'static>(
        &self,
        model: FusedKvDecoder<Autodiff<B>>,
        train: W,
        valid: W,
        device: &B::Device,
    ) -> Result<(), Box<dyn Error>> {
        let lora = LoraConfig::new(self.rank, self.alpha).with_targets(self.targets.clone());
        let context = train.context();
        let config = TrainingConfig::new(model.config().clone(), context, self.batch, self.steps)
            .with_trainable(Some(Trainable::Lora(lora)))
            .with_accumulation(self.accumulation)
            .with_epochs(self.validations.min(self.steps))
            .with_learning_rate(self.lr)
            .with_weight_decay(self.weight_decay)
            .with_warmup_steps(self.steps / 20)
            .with_seed(self.seed);
        config.validate()?;
        println!(
            "{} parameters, {} of matrices; a step reads {} tokens",
            config.model.costs()?.parameters(),
            mib(model.weight_bytes() as u64),
            config.tokens_per_step(),
        );
        let before = evaluate(&model.valid(), &valid, self.batch, None)?.loss;
        let directory = self.out.join("run");
        let run = Run::new(&directory).with_resume(self.resume);
        let devices = std::slice::from_ref(device);
        let trained = train_from_on(&config, model, train, valid, &run, devices)?;
        save_adapter(&self.out, &trained.model, &self.model.to_string_lossy())?;

        println!("\nheld out                  loss  perplexity");
        for (name, loss) in [("before", before), ("after", trained.valid_loss)] {
            println!("  {name:<16} {loss:>11.4} {:>11.2}", perplexity(loss));
        }
        figures::print(&directory, trained.tokens)?;
        let file = self.out.join("adapter_model.safetensors");
        println!(
            "adapters of {} saved to {}",
            mib(fs::metadata(file)?.len()),
            self.out.display()
        );
        Ok(())
    }

    /// Merges the adapters into the weights as the model's files have them, which need not be what
    /// they were trained beside.
    fn merge<B: Backend>(&self, out: &PathBuf, device: &B::Device) -> Result<(), Box<dyn Error>> {
        let LoadedCheckpoint {
            model,
            tokenizer,
            eos,
        } = load_checkpoint::<B>(&self.model, self.options(), device)?;
        let merged = load_adapter(&self.out, model)?.merge_lora()?;
        let options = SaveOptions::new().with_eos(eos);
        let options = match tokenizer {
            Some(tokenizer) => options.with_tokenizer(tokenizer),
            None => options,
        };
        save_checkpoint(out, &merged, &options)?;
        // A file that is copied onto itself ends empty.
        let in_place = fs::canonicalize(out)? == fs::canonicalize(&self.model)?;
        for name in CHAT_FILES {
            let file = self.model.join(name);
            if !in_place && file.is_file() {
                fs::copy(file, out.join(name))?;
            }
        }
        println!("merged into {}", out.display());
        Ok(())
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}
