//! Tokens of a text file or a folder of them, or of token files.

use std::error::Error;
use std::fs;
use std::path::Path;

use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::{TokenFile, TokenWindows};

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
        // The one given, the one an interrupted comparison has learned, or a new one.
        let kept = args.out.join("tokenizer.json");
        let tokenizer = match &args.tokenizer {
            Some(path) => Tokenizer::load(path)?,
            None if kept.exists() => Tokenizer::load(&kept)?,
            None => corpus.train_tokenizer(args.vocab)?,
        };
        tokenizer.save(&kept)?;
        let (train, valid) = corpus::windows(&corpus, &tokenizer, args.context, &args.out)?;
        Ok(Self {
            vocab_size: tokenizer.vocab_size(),
            tokenizer: Some(tokenizer),
            train,
            valid,
        })
    }
}

/// A file, with its path where it cannot be read.
pub fn read(path: &Path) -> Result<String, Box<dyn Error>> {
    Ok(fs::read_to_string(path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?)
}
