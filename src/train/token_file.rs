//! Tokens in a file, for data larger than memory.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3Default;

use super::error::TrainError;
use crate::file::Replacement;

/// Tokens read and hashed at a time when a file is opened.
const BLOCK: usize = 1 << 16;

/// Token ids in a file, little-endian and nothing else: 2 bytes each where the vocabulary has at
/// most 65536 of them, 4 bytes otherwise. Files of 2 bytes are those of nanoGPT.
///
/// What training reads is read from the file when it is needed, so that the system keeps in memory
/// what fits. A clone shares the file.
///
/// ```
/// use fusedkv::train::{TokenFile, TokenWindows};
///
/// # let directory = tempfile::tempdir()?;
/// let path = directory.path().join("train.bin");
/// let file = TokenFile::write(&path, 50_257, [Ok(vec![464, 3797]), Ok(vec![3332])])?;
/// assert_eq!(std::fs::read(&path)?, [0xd0, 0x01, 0xd5, 0x0e, 0x04, 0x0d]);
/// let windows = TokenWindows::of_file(file, 2)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct TokenFile {
    file: Arc<File>,
    path: PathBuf,
    width: usize,
    len: usize,
    /// The largest token and where it is.
    largest: (usize, u32),
    fingerprint: u64,
}

impl TokenFile {
    /// Opens a file of tokens of a vocabulary, and reads it once to check them.
    ///
    /// # Errors
    /// [`TrainError::Unreadable`] if it is missing or ends within a token,
    /// [`TrainError::OutOfVocabulary`] if a token is not below `vocab_size`.
    pub fn open(path: impl Into<PathBuf>, vocab_size: usize) -> Result<Self, TrainError> {
        let path = path.into();
        let opened = Self::scan(&path, width(vocab_size));
        let opened = opened.map_err(|error| TrainError::Unreadable {
            path,
            reason: error.to_string(),
        })?;
        opened.check_vocabulary(vocab_size)?;
        Ok(opened)
    }

    /// Writes parts of a text one after the other, and opens the file. A part is dropped before
    /// the next is asked for.
    ///
    /// # Errors
    /// The first error among the parts; [`TrainError::Write`] if the file cannot be written; those
    /// of [`open`](Self::open). A file that was there before is then as it was.
    pub fn write(
        path: impl Into<PathBuf>,
        vocab_size: usize,
        parts: impl IntoIterator<Item = Result<Vec<u32>, TrainError>>,
    ) -> Result<Self, TrainError> {
        let path = path.into();
        let width = width(vocab_size);
        let write = |source| TrainError::Write {
            path: path.clone(),
            source,
        };
        let mut file = Replacement::create(&path).map_err(write)?;
        for part in parts {
            for token in part? {
                let bytes = token.to_le_bytes();
                file.write_all(&bytes[..width]).map_err(write)?;
            }
        }
        file.finish().map_err(write)?;
        Self::open(path, vocab_size)
    }

    /// How many tokens there are.
    #[expect(
        clippy::len_without_is_empty,
        reason = "nothing is asked of an empty one"
    )]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The tokens of a range that is in the file.
    ///
    /// # Panics
    /// If the file has become unreadable or shorter since it was opened: a training reads ahead in
    /// threads of Burn's, which take no errors.
    pub(super) fn read(&self, range: Range<usize>) -> Vec<u32> {
        let mut bytes = vec![0; range.len() * self.width];
        let place = (range.start * self.width) as u64;
        if let Err(error) = read_exact_at(&self.file, &mut bytes, place) {
            let path = self.path.display();
            panic!("tokens {range:?} can no longer be read from {path}: {error}");
        }
        tokens(&bytes, self.width).collect()
    }

    pub(super) fn check_vocabulary(&self, vocab_size: usize) -> Result<(), TrainError> {
        let (position, token) = self.largest;
        if token as usize >= vocab_size {
            return Err(TrainError::OutOfVocabulary {
                position,
                token,
                vocab_size,
            });
        }
        Ok(())
    }

    /// Of all its bytes.
    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    fn scan(path: &Path, width: usize) -> io::Result<Self> {
        let file = Arc::new(File::open(path)?);
        let mut reader = BufReader::new(&*file);
        let mut scanned = Self {
            file: file.clone(),
            path: path.to_owned(),
            width,
            len: 0,
            largest: (0, 0),
            fingerprint: 0,
        };
        let mut hash = Xxh3Default::new();
        let mut block = Vec::new();
        loop {
            block.clear();
            let limit = (BLOCK * width) as u64;
            let read = reader.by_ref().take(limit).read_to_end(&mut block)?;
            if read % width != 0 {
                let message = format!("{read} bytes at the end, expected tokens of {width}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            if read == 0 {
                scanned.fingerprint = hash.digest();
                return Ok(scanned);
            }
            hash.update(&block);
            for (place, token) in tokens(&block, width).enumerate() {
                if token > scanned.largest.1 {
                    scanned.largest = (scanned.len + place, token);
                }
            }
            scanned.len += read / width;
        }
    }
}

/// Bytes of a token.
fn width(vocab_size: usize) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

fn tokens(bytes: &[u8], width: usize) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(width).map(|bytes| {
        let byte = |place: u32, &byte: &u8| u32::from(byte) << (8 * place);
        (0..).zip(bytes).map(|(place, b)| byte(place, b)).sum()
    })
}

/// Reads at a position without moving the file's own, so that threads can share it.
#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], place: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, place)
}

/// Reads at a position. That moves the file's own, which nothing else reads from.
#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut place: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, place) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                bytes = &mut bytes[read..];
                place += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
