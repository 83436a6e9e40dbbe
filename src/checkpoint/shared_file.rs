//! A file that threads read at once, each at an offset of its own.
//!
//! Read rather than mapped: a map's memory may change under the reader when the file does, which is
//! why making one is `unsafe`, and this crate has no such code. The system's page cache serves both
//! alike.

use std::fs::File;
use std::io;

/// A file without a position.
#[derive(Debug)]
pub(super) struct SharedFile {
    #[cfg(unix)]
    file: File,
    /// Where reading moves the file's position, by one thread at a time.
    #[cfg(not(unix))]
    file: std::sync::Mutex<File>,
}

impl From<File> for SharedFile {
    #[cfg(unix)]
    fn from(file: File) -> Self {
        Self { file }
    }

    #[cfg(not(unix))]
    fn from(file: File) -> Self {
        let file = std::sync::Mutex::new(file);
        Self { file }
    }
}

impl SharedFile {
    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// As [`Read::read_exact`](std::io::Read::read_exact).
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, offset);
        #[cfg(not(unix))]
        {
            use std::io::{Read, Seek, SeekFrom};
            use std::sync::PoisonError;
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(bytes)
        }
    }
}
