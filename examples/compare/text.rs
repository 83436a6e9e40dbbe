//! Tokens of a text file, a folder of them, or the sources of this crate.

use std::error::Error;
use std::fs;
use std::path::Path;

use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::{Corpus, Part, TokenFile, TokenWindows};

use super::{Args, corpus};

/// The vocabulary's size, windows to train on, windows to validate with.
pub fn windows(args: &Args) -> Result<(usize, TokenWindows, TokenWindows), Box<dyn Error>> {
    match (&args.data, &args.tokens[..]) {
        (_, [train, valid]) => {
            let windows =
                |path| TokenWindows::of_file(TokenFile::open(path, args.vocab)?, args.context);
            Ok((args.vocab, windows(train)?, windows(valid)?))
        }
        (Some(path), _) => {
            let corpus = Corpus::open(path, args.valid)?;
            let tokenizer = tokenizer(args, || Ok(corpus.train_tokenizer(args.vocab)?))?;
            let windows = |part, name| -> Result<_, Box<dyn Error>> {
                let tokens = corpus.tokenize(part, &tokenizer, args.kept(name)?)?;
                println!(
                    "{name}: {} document(s), {} bytes, {} tokens",
                    corpus.documents(part),
                    corpus.bytes(part),
                    tokens.len(),
                );
                Ok(TokenWindows::of_file(tokens, args.context)?)
            };
            let (train, valid) = (
                windows(Part::Train, "train.bin")?,
                windows(Part::Valid, "valid.bin")?,
            );
            if corpus.passed_over() > 0 {
                println!("{} files are no text", corpus.passed_over());
            }
            Ok((tokenizer.vocab_size(), train, valid))
        }
        (None, _) => {
            let text = corpus::default_text();
            let tokenizer = tokenizer(args, || {
                // Of what is trained on alone.
                let trained_on = text.len() as f64 * (1.0 - args.valid.clamp(0.0, 1.0));
                let end = text.floor_char_boundary(trained_on as usize);
                Ok(Tokenizer::train_bpe(&text[..end], args.vocab)?)
            })?;
            let tokens = tokenizer.encode(&text)?;
            println!("{} bytes of text are {} tokens", text.len(), tokens.len());
            let (train, valid) = TokenWindows::split(tokens, args.context, args.valid)?;
            Ok((tokenizer.vocab_size(), train, valid))
        }
    }
}

/// The one given, the one an interrupted comparison has learned, or a new one.
fn tokenizer(
    args: &Args,
    learn: impl FnOnce() -> Result<Tokenizer, Box<dyn Error>>,
) -> Result<Tokenizer, Box<dyn Error>> {
    let kept = args.kept("tokenizer.json")?;
    let tokenizer = match &args.tokenizer {
        Some(path) => Tokenizer::load(path)?,
        None if kept.exists() => Tokenizer::load(&kept)?,
        None => learn()?,
    };
    tokenizer.save(&kept)?;
    Ok(tokenizer)
}

/// A file, with its path where it cannot be read.
pub fn read(path: &Path) -> Result<String, Box<dyn Error>> {
    Ok(fs::read_to_string(path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?)
}
