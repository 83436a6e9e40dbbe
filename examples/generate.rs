//! Continues prompts, or answers in a chat, with a model: a directory in Hugging Face's layout, e.g.
//! one that `train_tiny` saved.
//!
//! ```sh
//! cargo run --release --example generate -- 'impl Config {'
//! cargo run --release --example generate -- --temperature 0 --stats 'pub fn' 'let mut'
//! cargo run --release --example generate -- --samples 3 --stop $'\n\n' 'use burn::'
//! echo 'use burn::' | cargo run --release --example generate
//! cargo run --release --example generate -- --model DIR --chat 'How far is the moon?'
//! cargo run --release --example generate -- --model DIR --chat     # a question per line
//! ```

mod backend;

use std::error::Error;
use std::io::{self, BufRead, IsTerminal, Read, Write, stderr, stdin, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::backend::Backend;
use clap::Parser;
use fusedkv::checkpoint::{LoadOptions, WeightDtype};
use fusedkv::generate::GeneratedToken;
use fusedkv::text::{ChatMessage, Completion, Prompt, TextConfig, TextError, TextGenerator};
use fusedkv::tokenizer::Tokenizer;
use fusedkv::{CacheDtype, WeightFormat};

use backend::{BackendName, DtypeName, Program, exit_code};

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How tokens are drawn where neither model nor caller says.
const TEMPERATURE: f64 = 0.7;

/// Continue prompts, or answer in a chat, with a model in Hugging Face's layout.
#[derive(Parser)]
struct Args {
    /// What to continue or to answer; several are one batch. Standard input if there is none
    prompts: Vec<String>,
    /// Directory of the model
    #[arg(long, value_name = "DIR", default_value = "target/train_tiny")]
    model: PathBuf,
    /// Directory of adapters in PEFT's layout, to be taken beside the model's weights
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Answer by the model's chat template; without a prompt, every line of standard input, in one
    /// conversation
    #[arg(long)]
    chat: bool,
    /// What the model is told before a chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Tokens that a conversation may have, at most the model's positions
    #[arg(long, default_value_t = 2048)]
    context: usize,
    /// What numbers to compute with
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
    /// What numbers the matrices are kept in: model, f16, bf16, int8 or int4
    #[arg(long, default_value = "model")]
    weights: WeightFormat,
    /// What numbers the cache keeps: model, f32, f16, bf16 or int8
    #[arg(long, default_value = "model")]
    cache_dtype: CacheDtype,
    /// Tokens to write per prompt
    #[arg(long, default_value_t = 120)]
    max_new_tokens: usize,
    /// Divides the logits; 0 always takes the most likely token [default: the model's, or 0.7]
    #[arg(long)]
    temperature: Option<f64>,
    /// Draw among this many most likely tokens [default: the model's]
    #[arg(long)]
    top_k: Option<usize>,
    /// Draw among the most likely tokens that together reach this probability [default: the model's]
    #[arg(long)]
    top_p: Option<f64>,
    /// Above 1, makes tokens that are already there less likely [default: the model's]
    #[arg(long)]
    repetition_penalty: Option<f64>,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Continuations of each prompt
    #[arg(long, default_value_t = 1)]
    samples: usize,
    /// Print how likely each token was, and this many of the likeliest in its place
    #[arg(long, value_name = "N")]
    log_probabilities: Option<usize>,
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
        let generator = {
            let options = LoadOptions::from(WeightDtype::from(self.dtype));
            TextGenerator::<B>::load(&self.model, options.with_weights(self.weights), device)?
        };
        let generator = match &self.adapter {
            Some(directory) => generator.with_adapter(directory)?,
            None => generator,
        };
        let config = self.config(generator.defaults());
        for key in generator.ignored_settings() {
            eprintln!("the model's generation_config.json asks for `{key}`, which is left out");
        }
        if self.chat && self.prompts.is_empty() {
            return self.talk(&generator, &config);
        }
        if self.prompts.is_empty() {
            self.prompts.push(read_prompt()?);
        }
        self.write(&generator, &config)
    }
}

impl Args {
    fn config(&self, defaults: &TextConfig) -> TextConfig {
        let mut config = defaults.clone();
        let generation = &mut config.generation;
        generation.max_new_tokens = self.max_new_tokens;
        if generation.temperature == 0.0 {
            generation.temperature = TEMPERATURE;
        }
        generation.temperature = self.temperature.unwrap_or(generation.temperature);
        generation.top_k = self.top_k.or(generation.top_k);
        generation.top_p = self.top_p.or(generation.top_p);
        let penalty = self.repetition_penalty;
        generation.repetition_penalty = penalty.unwrap_or(generation.repetition_penalty);
        generation.samples = self.samples;
        generation.log_probabilities = self.log_probabilities;
        generation.seed = self.seed;
        generation.cache_dtype = self.cache_dtype;
        config.stop_strings.extend(self.stop.iter().cloned());
        config
    }

    /// What the model is told before the first question.
    fn opening(&self) -> Vec<ChatMessage> {
        let system = self.system.iter();
        system.map(|text| ChatMessage::system(text)).collect()
    }

    /// Continues all prompts in one batch.
    fn write<B: Backend>(
        &self,
        generator: &TextGenerator<B>,
        config: &TextConfig,
    ) -> Result<(), Box<dyn Error>> {
        let prompt = |text: &String| match self.chat {
            true => {
                let mut chat = self.opening();
                chat.push(ChatMessage::user(text));
                Prompt::Chat(chat)
            }
            false => Prompt::Text(text.clone()),
        };
        let prompts: Vec<Prompt> = self.prompts.iter().map(prompt).collect();
        let start = Instant::now();
        let mut generation = generator.generate(&prompts, config)?;
        // An answer stands by itself, a continuation behind its prompt.
        let before = |row: usize| match self.chat {
            true => "",
            false => &*self.prompts[row / self.samples],
        };
        let rows = prompts.len() * self.samples;
        let mut texts: Vec<String> = (0..rows).map(|row| before(row).to_owned()).collect();
        let mut tokens = vec![Vec::new(); rows];
        if let [text] = &texts[..] {
            print(text)?;
        }
        let mut times = Vec::new();
        let mut failed = None;
        for piece in generation.by_ref() {
            let piece = match piece {
                Ok(piece) => piece,
                // The other rows go on.
                Err(error) if rows > 1 => {
                    failed.get_or_insert(error);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let row = piece.token.row;
            match rows {
                1 => print(&piece.text)?,
                _ => texts[row].push_str(&piece.text),
            }
            tokens[row].push(piece.token);
            // Rows take turns: the first row's tokens mark the steps, and those of a longer row.
            if tokens[row].len() > times.len() {
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        match rows {
            1 => print("\n")?,
            _ => print(&format!("{}\n", texts.join("\n---\n")))?,
        }
        for tokens in &tokens {
            print_likelihoods(generator.tokenizer(), tokens)?;
        }
        if let Some(error) = failed {
            return Err(error.into());
        }
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

    /// Answers every line of standard input, in one conversation. Where that outgrows its cache, the
    /// oldest question and its answer are forgotten.
    fn talk<B: Backend>(
        &self,
        generator: &TextGenerator<B>,
        config: &TextConfig,
    ) -> Result<(), Box<dyn Error>> {
        let context = self.context.min(generator.model().config().max_positions);
        let mut conversation = generator.conversation(context, self.cache_dtype)?;
        let mut chat = self.opening();
        let opening = chat.len();
        let mut lines = stdin().lock().lines();
        while let Some(line) = next_line(&mut lines)? {
            if line.trim().is_empty() {
                continue;
            }
            chat.push(ChatMessage::user(&line));
            let start = Instant::now();
            let answer = loop {
                let answer = conversation.write_with(&chat[..], config, |piece| {
                    print(&piece.text).map_err(Box::<dyn Error>::from)
                });
                match answer {
                    Err(error) if outgrown(&*error) && chat.len() > opening + 1 => {
                        chat.drain(opening..opening + 2);
                    }
                    answer => break answer?,
                }
            };
            print("\n")?;
            let Completion { text, tokens, .. } = answer;
            print_likelihoods(generator.tokenizer(), &tokens)?;
            if self.stats {
                eprintln!(
                    "{} tokens in {:.2} s; of the prompt, {} were cached",
                    tokens.len(),
                    start.elapsed().as_secs_f64(),
                    conversation.reused()
                );
            }
            chat.push(ChatMessage::assistant(&text));
        }
        Ok(())
    }
}

fn outgrown(error: &(dyn Error + 'static)) -> bool {
    matches!(
        error.downcast_ref(),
        Some(TextError::ConversationTooLong { .. } | TextError::PromptTooLong { .. })
    )
}

/// The next line, asked for where somebody sits at a terminal.
fn next_line(lines: &mut impl Iterator<Item = io::Result<String>>) -> io::Result<Option<String>> {
    if stdin().is_terminal() && stderr().is_terminal() {
        eprint!("> ");
    }
    lines.next().transpose()
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

/// A line per token: its log-probability, and what else was likely.
fn print_likelihoods(
    tokenizer: &Tokenizer,
    tokens: &[GeneratedToken],
) -> Result<(), Box<dyn Error>> {
    for token in tokens {
        let Some(likelihood) = &token.likelihood else {
            continue;
        };
        let mut line = format!("{:8.3}", likelihood.log_probability);
        line.push_str(&format!("  {:?}", tokenizer.decode(&[token.id])?));
        for (i, (id, log_probability)) in likelihood.top.iter().enumerate() {
            let separator = if i == 0 { "  of" } else { "," };
            let text = tokenizer.decode(&[*id])?;
            line.push_str(&format!("{separator} {text:?} {log_probability:.3}"));
        }
        eprintln!("{line}");
    }
    Ok(())
}

fn print(text: &str) -> io::Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
