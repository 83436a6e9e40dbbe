//! Files that are there whole or not at all.

use std::ffi::OsString;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use super::TrainError;

/// Has `write` write a file beside `path`, then renames it to `path`.
pub(super) fn write_atomically<E: Display>(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), TrainError> {
    let temporary = beside(path);
    let written = write(&temporary).map_err(|error| TrainError::file(path, error));
    let renamed = written.and_then(|()| {
        std::fs::rename(&temporary, path).map_err(|error| TrainError::file(path, error))
    });
    if renamed.is_err() {
        // It may not exist; the error to report is the first one.
        let _ = std::fs::remove_file(&temporary);
    }
    renamed
}

/// A name in the same directory, with the same extension: recorders append their own otherwise.
fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(".partial-");
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}
