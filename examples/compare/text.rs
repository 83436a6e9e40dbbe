//! Tokens of a text file or a folder of them, or of token files.

use std::error::Error;
use std::fs;
use std::path::Path;

use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::compare::Comparison;
use fusedkv::train::{Corpus, TokenFile, TokenWindows};

use super::{Args, corpus};

/// What is trained on, and validated with.
pub struct Text {
    /// None of token files.
    pub tokenizer: Option<Tokenizer>,
    pub vocab_size: usize,
    pub train: TokenWindows,
    pub valid: TokenWindows,
}

impl Text {
    pub fn open(args: &Args) -> Result<Self, Box<dyn Error>> {
        if let [train, valid] = &args.tokens[..] {
            let windows =
                |path| TokenWindows::of_file(TokenFile::open(path, args.vocab)?, args.context);
            return Ok(Self {
                tokenizer: None,
                vocab_size: args.vocab,
                train: windows(train)?,
                valid: windows(valid)?,
            });
        }
        let corpus = corpus::open(args.data.as_deref(), args.valid)?;
        corpus::make_directory(&args.out)?;
        // That of a comparison stays as it is; what a command left that failed before is of no use.
        let path = args.out.join("tokenizer.json");
        let is_kept = Comparison::exists(&args.out) && path.exists();
        let tokenizer = match &args.tokenizer {
            Some(path) => Tokenizer::load(path)?,
            None if is_kept => kept(&path, &corpus, args.vocab)?,
            None => corpus.train_tokenizer(args.vocab)?,
        };
        if !is_kept {
            tokenizer.save(&path)?;
        }
        let (train, valid) = corpus::windows(&corpus, &tokenizer, args.context, &args.out)?;
        Ok(Self {
            vocab_size: tokenizer.vocab_size(),
            tokenizer: Some(tokenizer),
            train,
            valid,
        })
    }
}

/// The tokenizer that a comparison has learned, if it was asked for as many tokens as this command is.
fn kept(path: &Path, corpus: &Corpus, vocab: usize) -> Result<Tokenizer, Box<dyn Error>> {
    let tokenizer = Tokenizer::load(path)?;
    let size = tokenizer.vocab_size();
    // A short text gives fewer than are asked for.
    if size == vocab || size < vocab && corpus.train_tokenizer(vocab)?.vocab_size() == size {
        return Ok(tokenizer);
    }
    Err(format!(
        "{} has {size} tokens, expected --vocab {size} or another --out",
        path.display(),
    )
    .into())
}

/// A file, with its path where it cannot be read.
pub fn read(path: &Path) -> Result<String, Box<dyn Error>> {
    Ok(fs::read_to_string(path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?)
}
