//! Trains a tiny decoder on a text, by default a frozen one of this crate's sources, and writes with
//! it.
//!
//! ```sh
//! cargo run --release --example train_tiny
//! cargo run --release --example train_tiny -- --method standard --out target/standard
//! cargo run --release --example train_tiny -- --data book.txt --steps 2000
//! cargo run --release --example train_tiny -- --init target/fused --out target/recovered --steps 100
//! cargo run --release --example train_tiny -- --route standard fused-kv yoco:n=2 --out target/routed
//! ```

mod backend;
mod corpus;
mod plan;

use std::error::Error;
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use burn::module::Module;
use burn::tensor::backend::Backend;
use clap::{Parser, ValueEnum};
use fusedkv::backend::Autodiff;
use fusedkv::checkpoint::{
    SaveOptions, WeightDtype, check_destination, load_checkpoint, save_checkpoint,
};
use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::compare::Method;
use fusedkv::train::{
    Corpus, Part, Routing, Run, Trained, TrainedPlan, TrainingConfig, perplexity, train_from_on,
    train_on,
};
use fusedkv::{
    ConfigError, FusedKvDecoder, FusedKvDecoderConfig, FusionInit, GenerationConfig, KvPlan,
    generate,
};

use backend::{BackendName, Program, exit_code};
use plan::PlanArgs;

/// Length at which the caches are compared.
const CACHE_TOKENS: usize = 1024;

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Train a tiny decoder on a text and write with it.
#[derive(Parser)]
struct Args {
    /// Text file or folder to train on; a frozen text of this crate's sources if not given
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Share of the text that is held out
    #[arg(long, default_value_t = 0.05)]
    valid: f64,
    #[command(flatten)]
    plan: PlanArgs,
    /// Methods that one model is trained for, two or more as `name:n=LAYERS`, one drawn for each step; a
    /// model of each is saved under --out by its name
    #[arg(long, value_name = "METHOD", num_args = 1..,
        conflicts_with_all = ["method", "storage_layers", "factor"])]
    route: Vec<String>,
    /// Model to go on with, a directory in Hugging Face's layout; its shape, plan and tokenizer are
    /// taken
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "method", "storage_layers", "factor", "layers", "hidden", "heads", "kv_heads", "head_dim",
        "ffn", "vocab", "tokenizer", "fusion_init", "alpha",
    ])]
    init: Option<PathBuf>,
    /// Where learned fusion weights start
    #[arg(long, value_enum, default_value = "lite")]
    fusion_init: FusionStartName,
    /// Where the α of YOCO++ start
    #[arg(long, default_value_t = 0.0)]
    alpha: f64,
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
    /// Channels per head; width divided by heads if not given
    #[arg(long)]
    head_dim: Option<usize>,
    /// Inner width of the SwiGLU blocks; 2.75 times the width if not given
    #[arg(long)]
    ffn: Option<usize>,
    /// Size of the vocabulary to learn
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
    #[arg(long, default_value_t = 400)]
    steps: usize,
    /// Parts each step's windows are divided into to save memory
    #[arg(long, default_value_t = 1)]
    accumulation: usize,
    /// Times the model is validated and checkpointed
    #[arg(long, default_value_t = 5)]
    validations: usize,
    /// Stop when so many validations have not lowered the loss
    #[arg(long)]
    patience: Option<usize>,
    /// Keep the model with the lowest validation loss, not the last
    #[arg(long)]
    best: bool,
    /// Highest learning rate
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Directory for the model and, in `run`, the checkpoints
    #[arg(long, value_name = "DIR", default_value = "target/train_tiny")]
    out: PathBuf,
    /// Go on from the last checkpoint in --out
    #[arg(long)]
    resume: bool,
    /// What the sample at the end begins with
    #[arg(long, default_value = "/// The cache")]
    prompt: String,
}

/// Where fusion weights start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FusionStartName {
    /// Where FusedKV-Lite is
    Lite,
    /// At the mean of the sources
    Equal,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(args.backend.run(args))
}

impl Program for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        let corpus = corpus::open(self.data.as_deref(), self.valid)?;
        let init = match &self.init {
            Some(path) => Some(load_checkpoint::<Autodiff<B>>(
                path,
                WeightDtype::F32,
                device,
            )?),
            None => None,
        };
        let (init, tokenizer, mut eos) = match init {
            Some(loaded) => {
                let tokenizer = loaded.tokenizer.ok_or("the model has no tokenizer.json")?;
                (Some(loaded.model), tokenizer, loaded.eos)
            }
            None => (None, self.tokenizer(&corpus)?, Vec::new()),
        };
        // What is learned to end documents shall end texts, as whatever did before.
        if let Some(end) = tokenizer.end_of_text()
            && !eos.contains(&end)
        {
            eos.push(end);
        }
        let corpus = corpus.with_end(eos.first().copied());
        let mut config = self.config(tokenizer.vocab_size())?;
        if let Some(model) = &init {
            config.model = model.config().clone();
        }
        config.routing = self.routing(&config.model)?;
        config.validate()?;
        let plans = match &config.routing {
            Some(routing) => routing.plans.clone(),
            None => vec![config.model.plan.clone()],
        };
        println!(
            "{} parameters, {}, {} layers; a step reads {} tokens of {} bytes of text",
            config.model.costs()?.parameters(),
            plans
                .iter()
                .map(KvPlan::to_string)
                .collect::<Vec<_>>()
                .join(" or "),
            config.model.n_layers,
            config.tokens_per_step(),
            corpus.bytes(Part::Train),
        );

        // A plan is saved as any other model, under its own name where there are several.
        let directory = |plan: &KvPlan| match &config.routing {
            Some(_) => self.out.join(plan.to_string().replace(':', "-")),
            None => self.out.clone(),
        };
        corpus::make_directory(&self.out)?;
        for plan in &plans {
            check_destination(directory(plan))?;
        }
        tokenizer.save(self.run_tokenizer())?;
        let (train, valid) = corpus::windows(&corpus, &tokenizer, self.context, &self.out)?;
        let run = Run::new(self.out.join("run")).with_resume(self.resume);
        let devices = std::slice::from_ref(device);
        let mut trained = match init {
            Some(model) => {
                train_from_on::<Autodiff<B>>(&config, model, train, valid, &run, devices)?
            }
            None => train_on::<Autodiff<B>>(&config, train, valid, &run, devices)?,
        };
        if self.best {
            let (model, losses) = run.best::<B>(device)?;
            (trained.train_loss, trained.valid_loss) = (losses.train, losses.valid);
            trained.model = model;
            for (place, trained) in trained.plans.iter_mut().enumerate() {
                let (model, _) = run.best_under::<B>(&plans[place], device)?;
                (trained.model, trained.valid_loss) = (model, losses.plans[place]);
            }
            println!("\nThe best model is that of validation {}", losses.epoch);
        }
        let options = SaveOptions::new()
            .with_eos(eos)
            .with_tokenizer(tokenizer.clone());
        let mut models: Vec<_> = trained.plans.iter().map(|of| &of.model).collect();
        if models.is_empty() {
            models.push(&trained.model);
        }
        for model in models {
            save_checkpoint(directory(&model.config().plan), model, &options)?;
        }
        let first = directory(&plans[0]);

        self.summary(&trained, device)?;
        self.sample(&trained.model, &tokenizer)?;
        println!(
            "\nSaved to {0}. Write more with\n  cargo run --release --example generate -- --model {0} '{1}'",
            first.display(),
            self.prompt,
        );
        Ok(())
    }
}

impl Args {
    /// The tokenizer asked for, that of the run to resume, or a new one of what is trained on.
    fn tokenizer(&self, corpus: &Corpus) -> Result<Tokenizer, Box<dyn Error>> {
        Ok(match &self.tokenizer {
            Some(path) => Tokenizer::load(path)?,
            None if self.resume => Tokenizer::load(self.run_tokenizer())?,
            None => corpus.train_tokenizer(self.vocab)?,
        })
    }

    /// The tokenizer of the run, apart from that of a model which is there until the run has ended.
    fn run_tokenizer(&self) -> PathBuf {
        self.out.join("run-tokenizer.json")
    }

    /// The plans of `--route` for a model.
    fn routing(&self, model: &FusedKvDecoderConfig) -> Result<Option<Routing>, Box<dyn Error>> {
        if self.route.is_empty() {
            return Ok(None);
        }
        let plan = |name: &String| {
            let method = Method::parse(name, model)?.model;
            let plan = method.plan.clone();
            let same = FusedKvDecoderConfig {
                plan: model.plan.clone(),
                ..method
            };
            match same == *model {
                true => Ok(plan),
                false => {
                    Err(format!("`{name}` is more than a plan, expected n or factor alone").into())
                }
            }
        };
        let plans = self.route.iter().map(plan);
        let plans: Vec<_> = plans.collect::<Result<_, Box<dyn Error>>>()?;
        Ok(Some(Routing::new(plans)))
    }

    fn config(&self, vocab_size: usize) -> Result<TrainingConfig, Box<dyn Error>> {
        let plan = match self.route.is_empty() {
            true => self.plan.plan(self.layers)?,
            false => KvPlan::Standard,
        };
        let model = FusedKvDecoderConfig::new(vocab_size, plan)
            .with_hidden_size(self.hidden)
            .with_n_layers(self.layers)
            .with_n_heads(self.heads)
            .with_n_kv_heads(self.kv_heads.unwrap_or(self.heads))
            .with_head_dim(self.head_dim.unwrap_or(self.hidden / self.heads.max(1)))
            .with_ffn_size(self.ffn.unwrap_or(self.hidden * 11 / 4))
            .with_rope_theta(1e4)
            .with_fusion_init(
                match self.fusion_init {
                    FusionStartName::Lite => FusionInit::lite(),
                    FusionStartName::Equal => FusionInit::equal(),
                }
                .with_residual(self.alpha),
            )
            .with_max_positions(self.context.max(CACHE_TOKENS));
        Ok(
            TrainingConfig::new(model, self.context, self.batch, self.steps)
                .with_learning_rate(self.lr)
                .with_accumulation(self.accumulation)
                .with_epochs(self.validations.min(self.steps))
                .with_patience(self.patience)
                .with_warmup_steps(self.steps / 20)
                .with_valid_fraction(self.valid)
                .with_seed(self.seed),
        )
    }

    fn summary<B: Backend>(
        &self,
        trained: &Trained<B>,
        device: &B::Device,
    ) -> Result<(), Box<dyn Error>> {
        let model = &trained.model;
        let seconds = trained.elapsed.as_secs_f64();
        let what = match trained.plans.len() {
            0 => model.config().plan.to_string(),
            plans => format!("one model for {plans} plans, the first"),
        };
        println!(
            "\n{what} with {} parameters, {} tokens in {seconds:.0} s",
            model.num_params(),
            trained.tokens,
        );
        let uniform = (model.config().vocab_size as f64).ln();
        println!("  uniform guessing  loss {uniform:.3}");
        for (name, loss) in [
            ("training", trained.train_loss),
            ("validation", trained.valid_loss),
        ] {
            let perplexity = perplexity(loss);
            println!("  {name:<17} loss {loss:.3}  perplexity {perplexity:.1}");
        }
        let standard = FusedKvDecoderConfig {
            plan: KvPlan::Standard,
            ..model.config().clone()
        };
        let standard = cache_bytes(&init::<B>(&standard, device)?)?;
        let share = |bytes: usize| 100.0 * bytes as f64 / standard as f64;
        if trained.plans.is_empty() {
            let own = cache_bytes(model)?;
            println!(
                "  cache of {CACHE_TOKENS} tokens: {own} bytes, {:.0} % of the standard decoder's {standard}",
                share(own),
            );
            return Ok(());
        }
        println!(
            "\n{:<29} validation loss  perplexity  cache of {CACHE_TOKENS} tokens, bytes",
            "the model under",
        );
        for TrainedPlan {
            model, valid_loss, ..
        } in &trained.plans
        {
            let bytes = cache_bytes(model)?;
            println!(
                "  {:<27} {valid_loss:>15.3}  {:>10.1}  {bytes:>13}  {:>3.0} %",
                model.config().plan,
                perplexity(*valid_loss),
                share(bytes),
            );
        }
        Ok(())
    }

    fn sample<B: Backend>(
        &self,
        model: &FusedKvDecoder<B>,
        tokenizer: &Tokenizer,
    ) -> Result<(), Box<dyn Error>> {
        let settings = GenerationConfig::new()
            .with_max_new_tokens(120)
            .with_temperature(0.7)
            .with_top_p(Some(0.95))
            .with_seed(self.seed);
        let prompt = tokenizer.encode(&self.prompt)?;
        let mut stream = tokenizer.stream();
        let mut out = stdout().lock();
        write!(out, "\n{}", self.prompt)?;
        for token in generate(model, &[prompt], &settings)? {
            write!(out, "{}", stream.push(token?.id)?)?;
            out.flush()?;
        }
        writeln!(out, "{}", stream.finish()?)?;
        Ok(())
    }
}

fn init<B: Backend>(
    config: &FusedKvDecoderConfig,
    device: &B::Device,
) -> Result<FusedKvDecoder<B>, ConfigError> {
    config.init(device)
}

/// Bytes of a cache for one row, as allocated.
fn cache_bytes<B: Backend>(model: &FusedKvDecoder<B>) -> Result<usize, Box<dyn Error>> {
    Ok(model.new_cache(1, CACHE_TOKENS)?.bytes_allocated())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use fusedkv::tokenizer::END_OF_TEXT;
    use fusedkv::train::TrainError;
    use tempfile::tempdir;

    use super::*;

    /// A training that takes a moment, of a small decoder or by `more` arguments.
    fn train_tiny(data: &Path, out: &Path, more: &[&str]) -> Result<(), Box<dyn Error>> {
        let small =
            "train_tiny --steps 1 --validations 1 --context 4 --batch 1 --valid 0.4 --prompt the";
        let shape = [
            "--layers", "4", "--hidden", "16", "--heads", "2", "--vocab", "270",
        ];
        let shape = if more.is_empty() { &shape[..] } else { more };
        let args = small.split_whitespace().chain(shape.iter().copied());
        let mut args: Vec<_> = args.map(Into::into).collect();
        args.extend(["--data".into(), data.as_os_str().to_owned()]);
        args.extend(["--out".into(), out.as_os_str().to_owned()]);
        let args = Args::try_parse_from(args)?;
        args.backend.run(args)
    }

    #[test]
    fn the_tokenizer_is_learned_from_what_is_trained_on() {
        let directory = tempdir().unwrap();
        let [text, out] = ["text.txt", "out"].map(|name| directory.path().join(name));
        fs::write(&text, "the hat\nthe cat\nthe bat\nzyzzyzyzzyzyzzyz\n").unwrap();
        train_tiny(&text, &out, &[]).unwrap();
        let tokenizer = Tokenizer::load(out.join("tokenizer.json")).unwrap();
        assert!(tokenizer.encode("the").unwrap().len() < 3);
        assert_eq!(tokenizer.encode("zyz").unwrap().len(), 3);

        // A folder is read as well, and gone on with.
        let folder = directory.path().join("folder");
        fs::create_dir(&folder).unwrap();
        for name in ["one", "two", "three"] {
            fs::write(folder.join(name), format!("the {name}, the {name}")).unwrap();
        }
        let more = directory.path().join("more");
        let init = ["--init", out.to_str().unwrap()];
        train_tiny(&folder, &more, &init).unwrap();
        let kept = Tokenizer::load(more.join("tokenizer.json")).unwrap();
        assert_eq!(kept.vocab_size(), tokenizer.vocab_size());
    }

    #[test]
    fn a_model_gone_on_with_keeps_the_end_of_its_texts() {
        let directory = tempdir().unwrap();
        let [text, out, more] = ["text.txt", "out", "more"].map(|name| directory.path().join(name));
        fs::write(&text, "the hat\nthe cat\nthe bat\nthe rat\n").unwrap();
        train_tiny(&text, &out, &[]).unwrap();
        // Spelled as Llama 2's.
        let tokenizer = out.join("tokenizer.json");
        let json = fs::read_to_string(&tokenizer).unwrap();
        fs::write(&tokenizer, json.replace(END_OF_TEXT, "</s>")).unwrap();
        train_tiny(&text, &more, &["--init", out.to_str().unwrap()]).unwrap();
        let [before, after] = [&out, &more].map(|path| {
            let device = Default::default();
            let loaded = load_checkpoint::<fusedkv::backend::Flex>(path, WeightDtype::F32, &device);
            loaded.unwrap().eos
        });
        assert_eq!(before.len(), 1);
        assert_eq!(after, before);
        for name in ["train.bin", "valid.bin"] {
            let tokens = fs::read(more.join(name)).unwrap();
            let end = u16::try_from(after[0]).unwrap();
            assert!(tokens.ends_with(&end.to_le_bytes()), "{name}");
        }
    }

    #[test]
    fn one_model_is_saved_under_each_of_its_methods() {
        let directory = tempdir().unwrap();
        let [text, out] = ["text.txt", "out"].map(|name| directory.path().join(name));
        fs::write(&text, "the hat\nthe cat\nthe bat\nthe rat\n").unwrap();
        let args = |more: &str| -> Vec<String> {
            let shape = "--layers 4 --hidden 16 --heads 2 --vocab 270";
            let args = shape.split_whitespace().chain(more.split_whitespace());
            args.map(str::to_owned).collect()
        };
        let run = |more: &str| {
            let args = args(more);
            let args: Vec<_> = args.iter().map(String::as_str).collect();
            train_tiny(&text, &out, &args)
        };
        run("--best --route standard fused-kv fused-kv:n=3").unwrap();
        for (name, plan) in [
            ("standard", KvPlan::Standard),
            ("fused_kv-n=2", KvPlan::FusedKv { storage_layers: 2 }),
            ("fused_kv-n=3", KvPlan::FusedKv { storage_layers: 3 }),
        ] {
            let device = Default::default();
            let path = out.join(name);
            let loaded = load_checkpoint::<fusedkv::backend::Flex>(path, WeightDtype::F32, &device);
            assert_eq!(loaded.unwrap().model.config().plan, plan);
        }
        for refused in [
            "standard",
            "standard yoco:kv-heads=1",
            "standard cla:factor=9",
        ] {
            assert!(run(&format!("--route {refused}")).is_err(), "{refused}");
        }
    }

    #[test]
    fn what_cannot_be_read_or_written_is_said_in_a_line() {
        let directory = tempdir().unwrap();
        let [empty, file, out] = ["empty", "file", "out"].map(|name| directory.path().join(name));
        fs::create_dir(&empty).unwrap();
        fs::write(&file, "a text\nof two lines").unwrap();
        let line = |data: &Path, out: &Path| {
            let error = train_tiny(data, out, &[]).unwrap_err();
            assert!(!error.to_string().contains('\n'), "{error}");
            error.downcast::<TrainError>().unwrap()
        };
        assert!(matches!(*line(&empty, &out), TrainError::NoText(_)));
        let missing = directory.path().join("missing");
        assert!(matches!(
            *line(&missing, &out),
            TrainError::Unreadable { .. }
        ));
        let within = file.join("out");
        assert!(matches!(*line(&file, &within), TrainError::Write { .. }));
        assert!(!out.exists());
    }
}
