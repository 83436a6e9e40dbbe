//! Text files as documents, some of them held out.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ignore::WalkBuilder;
use xxhash_rust::xxh3::Xxh3Default;

use super::data::check_fraction;
use super::error::TrainError;
use super::token_file::TokenFile;
use crate::tokenizer::{END_OF_TEXT, Tokenizer};

/// Bytes of text in memory at a time; a longer line is held whole.
const PIECE: usize = 1 << 20;

/// Which documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Those to train on.
    Train,
    /// Those held out.
    Valid,
}

/// The text of a file or a folder, divided into documents to train on and others to validate with.
///
/// A file is a document, or several: each line that is [`END_OF_TEXT`] alone ends one. In a folder
/// every UTF-8 file is read, those below it included; other files and empty ones are passed over, and
/// so are hidden ones and those that a `.gitignore` in the folder excludes.
///
/// A document is held out if its hash, XXH3 of its bytes, is below the fraction of all 2⁶⁴: copies
/// of one another are on the same side, and neither names nor order nor the other documents matter.
/// Only where that would hold out none is the one of the smallest hash held out, and where it would
/// hold out all, the one of the largest trained on. Of a single document, the end is held out.
///
/// ```
/// use fusedkv::tokenizer::Tokenizer;
/// use fusedkv::train::{Corpus, Part, TokenWindows};
///
/// # let directory = tempfile::tempdir()?;
/// # let directory = directory.path();
/// let file = directory.join("fish.txt");
/// std::fs::write(&file, "one fish\ntwo fish\nred fish\nblue fish\n")?;
/// let corpus = Corpus::open(&file, 0.25)?;
/// let text: Result<String, _> = corpus.text(Part::Valid).collect();
/// assert_eq!(text?, "blue fish\n<|endoftext|>");
///
/// let tokenizer = corpus.train_tokenizer(260)?;
/// let tokens = corpus.tokenize(Part::Train, &tokenizer, directory.join("train.bin"))?;
/// let windows = TokenWindows::of_file(tokens, 8)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Corpus {
    documents: Vec<(Document, Part)>,
    passed_over: usize,
    /// What ends a text for a tokenizer without [`END_OF_TEXT`].
    end: Option<u32>,
}

/// A file, or a part of one.
#[derive(Clone, Debug)]
struct Document {
    /// Shared with the file's other documents, of which there may be millions.
    path: Arc<Path>,
    bytes: Range<u64>,
    /// Of its text.
    hash: u64,
}

impl Corpus {
    /// Finds the documents and holds out about `valid_fraction` of them, at least one and never
    /// all. Every file is read once, in pieces.
    ///
    /// # Errors
    /// [`TrainError::Setting`] if the fraction is not between 0 and 1, [`TrainError::Unreadable`]
    /// for a file or folder that cannot be read or a file that is not UTF-8,
    /// [`TrainError::NoText`] if there is no text in it.
    pub fn open(path: impl AsRef<Path>, valid_fraction: f64) -> Result<Self, TrainError> {
        let path = path.as_ref();
        check_fraction(valid_fraction)?;
        let mut documents = Vec::new();
        let mut passed_over = 0;
        if path.is_dir() {
            for file in files(path)? {
                match Document::scan(&file) {
                    Ok(found) if !found.is_empty() => documents.extend(found),
                    Err(error) if error.kind() != io::ErrorKind::InvalidData => {
                        return Err(unreadable(&file, &error));
                    }
                    _ => passed_over += 1,
                }
            }
        } else {
            documents = Document::scan(path).map_err(|error| unreadable(path, &error))?;
        }
        let Some(first) = documents.first() else {
            return Err(TrainError::NoText(path.to_owned()));
        };
        let documents = if documents.iter().all(|other| other.hash == first.hash) {
            let cut = first.cut(valid_fraction);
            cut.map_err(|error| unreadable(&first.path, &error))?
        } else {
            hold_out(documents, valid_fraction)
        };
        Ok(Self {
            documents,
            passed_over,
            end: None,
        })
    }

    /// The corpus for tokenizers that may have no [`END_OF_TEXT`]: there, this token ends each
    /// document, e.g. the first of [`LoadedCheckpoint::eos`](crate::checkpoint::LoadedCheckpoint::eos).
    #[must_use]
    pub fn with_end(self, token: Option<u32>) -> Self {
        Self { end: token, ..self }
    }

    /// How many documents a part has.
    pub fn documents(&self, part: Part) -> usize {
        self.of(part).count()
    }

    /// How many bytes of text a part has.
    pub fn bytes(&self, part: Part) -> u64 {
        self.of(part).map(Document::len).sum()
    }

    /// How many files of the folder are no text, or empty.
    pub fn passed_over(&self) -> usize {
        self.passed_over
    }

    /// The text of a part in pieces that end where a line does, each document followed by
    /// [`END_OF_TEXT`].
    pub fn text(&self, part: Part) -> impl Iterator<Item = Result<String, TrainError>> + Send {
        let text = |piece: Option<String>| piece.unwrap_or_else(|| END_OF_TEXT.to_owned());
        self.pieces(part).map(move |piece| piece.map(text))
    }

    /// Learns a byte-level BPE from the part trained on.
    ///
    /// # Errors
    /// [`TrainError::Tokenizer`] below 257 tokens, [`TrainError::Unreadable`] for a file that has
    /// changed meanwhile.
    pub fn train_tokenizer(&self, vocab_size: usize) -> Result<Tokenizer, TrainError> {
        let mut unread = None;
        let text = self.text(Part::Train);
        let text = text.map_while(|piece| piece.map_err(|error| unread = Some(error)).ok());
        let tokenizer = Tokenizer::train_bpe_on(text, vocab_size);
        match unread {
            Some(error) => Err(error),
            None => Ok(tokenizer?),
        }
    }

    /// Writes the tokens of a part to a file, piece by piece. Behind each document is one token: the
    /// tokenizer's [`end_of_text`](Tokenizer::end_of_text) or, if it has none, that of
    /// [`with_end`](Self::with_end).
    ///
    /// # Errors
    /// [`TrainError::NoEnd`] if there is neither, [`TrainError::Setting`] for an end that is no token
    /// of the tokenizer, [`TrainError::Unreadable`] for a file that has changed meanwhile,
    /// [`TrainError::Tokenizer`] for a text the tokenizer cannot take, and those of
    /// [`TokenFile::write`].
    pub fn tokenize(
        &self,
        part: Part,
        tokenizer: &Tokenizer,
        path: impl Into<PathBuf>,
    ) -> Result<TokenFile, TrainError> {
        let vocab_size = tokenizer.vocab_size();
        let end = self.end_of(tokenizer, vocab_size)?;
        let tokens = self.pieces(part).map(|piece| match piece? {
            Some(text) => Ok(tokenizer.encode(&text)?),
            None => Ok(vec![end]),
        });
        TokenFile::write(path, vocab_size, tokens)
    }

    /// The token behind each document.
    fn end_of(&self, tokenizer: &Tokenizer, vocab_size: usize) -> Result<u32, TrainError> {
        let end = tokenizer.end_of_text().or(self.end);
        let end = end.ok_or(TrainError::NoEnd)?;
        if end as usize >= vocab_size {
            return Err(TrainError::Setting {
                field: "end",
                value: f64::from(end),
                expected: "a token of the tokenizer",
            });
        }
        Ok(end)
    }

    /// The text of a part in pieces that end where a line does; none: the end of a document.
    fn pieces(
        &self,
        part: Part,
    ) -> impl Iterator<Item = Result<Option<String>, TrainError>> + Send {
        self.of(part).flat_map(|document| {
            let (pieces, error) = match document.reader() {
                Ok(reader) => (Some(Pieces(reader)), None),
                Err(error) => (None, Some(Err(error))),
            };
            let text = error.into_iter().chain(pieces.into_iter().flatten());
            text.map(|piece: io::Result<String>| piece.map(Some))
                .chain([Ok(None)])
                .map(|piece| piece.map_err(|error| unreadable(&document.path, &error)))
        })
    }

    fn of(&self, part: Part) -> impl Iterator<Item = &Document> {
        let documents = self.documents.iter();
        documents.filter_map(move |(document, p)| (*p == part).then_some(document))
    }
}

/// Holds out the documents with a hash below the fraction of all 2⁶⁴, but no fewer than those with
/// the smallest and none with the largest. Of two or more that differ, some are on either side.
fn hold_out(documents: Vec<Document>, valid_fraction: f64) -> Vec<(Document, Part)> {
    let hashes = || documents.iter().map(|document| document.hash);
    let threshold = (valid_fraction * 2f64.powi(64)) as u64;
    let threshold = threshold
        .min(hashes().max().unwrap_or(0))
        .max(hashes().min().unwrap_or(0).saturating_add(1));
    documents
        .into_iter()
        .map(|document| match document.hash < threshold {
            true => (document, Part::Valid),
            false => (document, Part::Train),
        })
        .collect()
}

impl Document {
    /// Reads a file to find its documents, and to see that they are text. Empty ones are none.
    fn scan(path: &Path) -> io::Result<Vec<Self>> {
        let path: Arc<Path> = path.into();
        let mut reader = BufReader::new(File::open(&path)?);
        let mut documents = Vec::new();
        let mut hash = Xxh3Default::new();
        let (mut start, mut end) = (0, 0);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line)? as u64;
            let text = str::from_utf8(&line);
            let text = text.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            if read > 0 && text.trim_end_matches(['\r', '\n']) != END_OF_TEXT {
                hash.update(&line);
                end += read;
                continue;
            }
            if end > start {
                documents.push(Self {
                    path: path.clone(),
                    bytes: start..end,
                    hash: hash.digest(),
                });
            }
            if read == 0 {
                return Ok(documents);
            }
            hash.reset();
            end += read;
            start = end;
        }
    }

    fn len(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    fn reader(&self) -> io::Result<io::Take<BufReader<File>>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.bytes.start))?;
        Ok(BufReader::new(file).take(self.len()))
    }

    /// Cuts the document where a line ends, so that at least a fraction of its bytes is held out; a
    /// text of one line where a character does.
    fn cut(&self, valid_fraction: f64) -> io::Result<Vec<(Self, Part)>> {
        let quota = (self.len() as f64 * valid_fraction) as u64;
        let last = self.len().saturating_sub(quota.max(1));
        let mut reader = self.reader()?;
        let mut line = Vec::new();
        let mut end = 0;
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line)? as u64;
            if read == 0 || end + read > last {
                break;
            }
            end += read;
        }
        if end == 0 {
            end = String::from_utf8_lossy(&line).floor_char_boundary(last as usize) as u64;
        }
        let part = |bytes| Self {
            bytes,
            ..self.clone()
        };
        let middle = self.bytes.start + end;
        Ok(vec![
            (part(self.bytes.start..middle), Part::Train),
            (part(middle..self.bytes.end), Part::Valid),
        ])
    }
}

/// A document's text, some lines at a time.
struct Pieces(io::Take<BufReader<File>>);

impl Iterator for Pieces {
    type Item = io::Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut piece = Vec::new();
        while piece.len() < PIECE {
            match self.0.read_until(b'\n', &mut piece) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => return Some(Err(error)),
            }
        }
        if piece.is_empty() {
            return None;
        }
        let text = String::from_utf8(piece);
        Some(text.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)))
    }
}

/// The files of a folder in order, by the folder's own rules alone: neither those of folders above
/// nor the user's decide what is read.
fn files(directory: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let walk = WalkBuilder::new(directory)
        .standard_filters(false)
        .hidden(true)
        .git_ignore(true)
        .require_git(false)
        .follow_links(true)
        .build();
    let mut files = Vec::new();
    for entry in walk {
        let entry = entry.map_err(|error| TrainError::Unreadable {
            path: directory.to_owned(),
            reason: error.to_string(),
        })?;
        // A pipe would be waited for.
        if entry.file_type().is_some_and(|kind| kind.is_file()) {
            files.push(entry.into_path());
        }
    }
    files.sort();
    Ok(files)
}

fn unreadable(path: &Path, error: &io::Error) -> TrainError {
    TrainError::Unreadable {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}
