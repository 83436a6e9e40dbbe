//! Tokens of a text file, a folder of them, or the sources of this crate.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use fusedkv::tokenizer::{END_OF_TEXT, Tokenizer};
use fusedkv::train::TokenWindows;

use super::{Args, corpus};

/// The vocabulary's size, windows to train on, windows to validate with.
pub fn windows(args: &Args) -> Result<(usize, TokenWindows, TokenWindows), Box<dyn Error>> {
    let text = match &args.data {
        Some(path) => read_all(path)?,
        None => corpus::default_text(),
    };
    // An interrupted comparison goes on with its own tokenizer.
    let kept = args.kept("tokenizer.json")?;
    let tokenizer = match &args.tokenizer {
        Some(path) => Tokenizer::load(path)?,
        None if kept.exists() => Tokenizer::load(&kept)?,
        None => {
            // Of what is trained on alone.
            let trained_on = text.len() as f64 * (1.0 - args.valid.clamp(0.0, 1.0));
            let end = text.floor_char_boundary(trained_on as usize);
            Tokenizer::train_bpe(&text[..end], args.vocab)?
        }
    };
    tokenizer.save(&kept)?;
    let tokens = tokenizer.encode(&text)?;
    println!("{} bytes of text are {} tokens", text.len(), tokens.len());
    let (train, valid) = TokenWindows::split(tokens, args.context, args.valid)?;
    Ok((tokenizer.vocab_size(), train, valid))
}

/// A file, with its path where it cannot be read.
pub fn read(path: &Path) -> Result<String, Box<dyn Error>> {
    Ok(fs::read_to_string(path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?)
}

/// The file, or all text files in the folder and those below, by name, each ended by the end of
/// text. Other files in a folder are passed over.
fn read_all(path: &Path) -> Result<String, Box<dyn Error>> {
    if !path.is_dir() {
        return read(path);
    }
    let mut files = Vec::new();
    list(path, &mut files)?;
    files.sort();
    let texts: Vec<String> = files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .collect();
    println!("{} of {} files are text", texts.len(), files.len());
    Ok(texts.join(END_OF_TEXT))
}

fn list(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    let entries = fs::read_dir(directory)
        .map_err(|error| format!("cannot read {}: {error}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}
