//! Reports as JSON, shared by examples and benches.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use tempfile::NamedTempFile;

/// That a report can go to `path`, whose folder is made, before anything is computed.
pub fn check_place(path: &Path) -> Result<(), String> {
    let no_file =
        |reason: &dyn std::fmt::Display| format!("cannot write {}: {reason}", path.display());
    if path.is_dir() {
        return Err(no_file(&"a directory, expected a file"));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    fs::create_dir_all(folder).map_err(|error| no_file(&error))
}

/// Writes a report to a place that was checked, complete or not at all.
pub fn write_json(path: &Path, report: &impl Serialize) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let mut file = NamedTempFile::new_in(folder)?;
    serde_json::to_writer_pretty(&mut file, report)?;
    file.write_all(b"\n")?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
