//! Reports as JSON, shared by examples and benches.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use tempfile::{Builder, NamedTempFile};

/// That a report can be written to `path`, whose folder is made, before anything is computed.
pub fn check_place(path: &Path) -> Result<(), String> {
    let place = || match path.is_dir() {
        true => Err(io::Error::other("a directory, expected a file")),
        false if is_special(path) => Ok(()),
        false => {
            fs::create_dir_all(folder_of(path))?;
            partial(&behind_links(path)).map(drop)
        }
    };
    place().map_err(|error| cannot_write(path, &error))
}

/// Writes a report to a place that was checked: a file complete or not at all.
pub fn write_json(path: &Path, report: &impl Serialize) -> Result<(), String> {
    let write = || {
        let text = serde_json::to_string_pretty(report)? + "\n";
        if is_special(path) {
            return fs::write(path, text);
        }
        let path = behind_links(path);
        let mut file = partial(&path)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|error| cannot_write(path, &error))
}

fn cannot_write(path: &Path, error: &io::Error) -> String {
    format!("cannot write {}: {error}", path.display())
}

/// Whether there is something that is written to and not replaced, as a terminal.
fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| !found.is_file())
}

/// The file that a link leads to, if there is one: it is replaced, not the link.
fn behind_links(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// A file beside `path`, readable as others are.
fn partial(path: &Path) -> io::Result<NamedTempFile> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let prefix = format!(".{name}.partial-");
    let mut builder = Builder::new();
    builder.prefix(&prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder_of(path))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}
