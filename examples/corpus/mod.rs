//! The text that examples learn from.

use std::fs;
use std::path::Path;

use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::{Corpus, Part, TokenWindows, TrainError};

/// A text of this crate that does not change with it; README.md beside it says more.
const FROZEN: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/examples/corpus/fusedkv-0.1.txt"
);

/// Opens a file or folder, the frozen text if none is given.
pub fn open(data: Option<&Path>, valid_fraction: f64) -> Result<Corpus, TrainError> {
    Corpus::open(data.unwrap_or(Path::new(FROZEN)), valid_fraction)
}

/// Windows to train on and to validate with. Their tokens are kept in two files of a directory.
pub fn windows(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    context: usize,
    directory: &Path,
) -> Result<(TokenWindows, TokenWindows), TrainError> {
    let windows = |part| windows_of(part, corpus, tokenizer, context, directory);
    let (train, valid) = (windows(Part::Train)?, windows(Part::Valid)?);
    if corpus.passed_over() > 0 {
        println!("{} files are no text", corpus.passed_over());
    }
    Ok((train, valid))
}

/// Windows of one part, whose tokens are kept in a file of a directory. They begin as the tokenizer has
/// prompts begin.
pub fn windows_of(
    part: Part,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    context: usize,
    directory: &Path,
) -> Result<TokenWindows, TrainError> {
    let name = match part {
        Part::Train => "train.bin",
        Part::Valid => "valid.bin",
    };
    let tokens = corpus.tokenize(part, tokenizer, directory.join(name))?;
    println!(
        "{name}: {} document(s), {} bytes, {} tokens",
        corpus.documents(part),
        corpus.bytes(part),
        tokens.len(),
    );
    Ok(TokenWindows::of_file(tokens, context)?.with_bos(tokenizer.bos()?))
}

/// Makes the directory that an example writes to, if need be.
pub fn make_directory(path: &Path) -> Result<(), TrainError> {
    fs::create_dir_all(path).map_err(|source| TrainError::Write {
        path: path.to_owned(),
        source,
    })
}
