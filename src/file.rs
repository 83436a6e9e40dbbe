//! Files that are either the old or the new one, whenever the process dies.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Writes a file through `write`, which is given a temporary name beside `path`, then renames it.
/// Nothing is left of one that could not be written.
pub(crate) fn replace<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let partial = partial(path);
    let written = write(&partial).and_then(|()| Ok(fs::rename(&partial, path)?));
    if written.is_err() {
        // It may never have been made; the error that counts is the first.
        let _ = fs::remove_file(&partial);
    }
    written
}

/// The temporary name, with the extension of `path`: some writers choose a format by it.
pub(crate) fn partial(path: &Path) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = format!("{stem}.partial");
    match path.extension() {
        Some(extension) => path.with_file_name(format!("{name}.{}", extension.to_string_lossy())),
        None => path.with_file_name(name),
    }
}
