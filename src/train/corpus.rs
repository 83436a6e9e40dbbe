//! Text files as documents, some of them held out.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::data::{FNV_BASIS, check_fraction, fnv_1a};
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
/// In a folder every UTF-8 file is a document, those below it included; other files and empty ones
/// are passed over. Which are held out is decided by a hash of their content: files that are copies
/// of one another are on the same side, and neither names nor order matter. Of a single document,
/// the end is held out.
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
}

/// A file, or a part of one.
#[derive(Clone, Debug)]
struct Document {
    path: PathBuf,
    bytes: Range<u64>,
    /// Of its text.
    hash: u64,
}

impl Corpus {
    /// Finds the documents and holds out about `valid_fraction` of their bytes, at least one
    /// document and never all. Every file is read once, in pieces.
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
            let mut files = Vec::new();
            list(path, &mut files)?;
            files.sort();
            for file in files {
                match Document::scan(&file) {
                    Ok(document) if !document.bytes.is_empty() => documents.push(document),
                    Err(error) if error.kind() != io::ErrorKind::InvalidData => {
                        return Err(unreadable(&file, &error));
                    }
                    _ => passed_over += 1,
                }
            }
        } else {
            documents.push(Document::scan(path).map_err(|error| unreadable(path, &error))?);
        }
        let total: u64 = documents.iter().map(Document::len).sum();
        if total == 0 {
            return Err(TrainError::NoText(path.to_owned()));
        }
        let quota = (total as f64 * valid_fraction) as u64;
        documents.sort_by_key(|document| document.hash);
        let copies = documents.chunk_by(|a, b| a.hash == b.hash);
        let documents = if copies.count() > 1 {
            hold_out(&documents, quota)
        } else {
            let document = documents.swap_remove(0);
            document
                .cut(quota)
                .map_err(|error| unreadable(&document.path, &error))?
        };
        Ok(Self {
            documents,
            passed_over,
        })
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
        self.of(part).flat_map(|document| {
            let (pieces, error) = match document.pieces() {
                Ok(pieces) => (Some(pieces), None),
                Err(error) => (None, Some(Err(error))),
            };
            let end = Some(Ok(END_OF_TEXT.to_owned()));
            let text = error.into_iter().chain(pieces.into_iter().flatten());
            text.chain(end)
                .map(|piece| piece.map_err(|error| unreadable(&document.path, &error)))
        })
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

    /// Writes the tokens of a part to a file, piece by piece.
    ///
    /// # Errors
    /// [`TrainError::Unreadable`] for a file that has changed meanwhile, [`TrainError::Tokenizer`]
    /// for a text the tokenizer cannot take, and those of [`TokenFile::write`].
    pub fn tokenize(
        &self,
        part: Part,
        tokenizer: &Tokenizer,
        path: impl Into<PathBuf>,
    ) -> Result<TokenFile, TrainError> {
        let tokens = self.text(part).map(|piece| Ok(tokenizer.encode(&piece?)?));
        TokenFile::write(path, tokenizer.vocab_size(), tokens)
    }

    fn of(&self, part: Part) -> impl Iterator<Item = &Document> {
        let documents = self.documents.iter();
        documents.filter_map(move |(document, p)| (*p == part).then_some(document))
    }
}

/// Takes documents in order of their hashes, copies together, as long as they fit into `quota`
/// bytes; the smallest if none does. Of two or more, that is never all.
fn hold_out(documents: &[Document], quota: u64) -> Vec<(Document, Part)> {
    let copies: Vec<&[Document]> = documents.chunk_by(|a, b| a.hash == b.hash).collect();
    let bytes = |copies: &[Document]| copies.iter().map(Document::len).sum::<u64>();
    let smallest = copies.iter().map(|copies| bytes(copies)).min();
    let mut left = quota.max(smallest.unwrap_or(0));
    let mut parts = Vec::with_capacity(documents.len());
    for copies in copies {
        let part = if bytes(copies) <= left {
            left -= bytes(copies);
            Part::Valid
        } else {
            Part::Train
        };
        parts.extend(copies.iter().map(|document| (document.clone(), part)));
    }
    parts.sort_by(|(a, _), (b, _)| a.path.cmp(&b.path));
    parts
}

impl Document {
    /// Reads a file to see that it is text.
    fn scan(path: &Path) -> io::Result<Self> {
        let mut document = Self {
            path: path.to_owned(),
            bytes: 0..File::open(path)?.metadata()?.len(),
            hash: FNV_BASIS,
        };
        for piece in document.pieces()? {
            document.hash = fnv_1a(document.hash, piece?.bytes());
        }
        Ok(document)
    }

    fn len(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    fn pieces(&self) -> io::Result<Pieces> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.bytes.start))?;
        Ok(Pieces(BufReader::new(file).take(self.len())))
    }

    /// Cuts the whole document where a line ends, so that at least `quota` bytes are held out; a
    /// text of one line where a character does.
    fn cut(&self, quota: u64) -> io::Result<Vec<(Self, Part)>> {
        let last = self.len().saturating_sub(quota.max(1));
        let mut reader = BufReader::new(File::open(&self.path)?);
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
        Ok(vec![
            (part(0..end), Part::Train),
            (part(end..self.len()), Part::Valid),
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

fn list(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), TrainError> {
    let entries: io::Result<Vec<_>> = fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    for path in entries.map_err(|error| unreadable(directory, &error))? {
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

fn unreadable(path: &Path, error: &io::Error) -> TrainError {
    TrainError::Unreadable {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}
