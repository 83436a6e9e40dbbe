//! Medians, and the files that figures go to.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

pub const MIB: f64 = 1024.0 * 1024.0;

pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

/// That figures can go to `path`, whose folder is made, before any is measured.
pub fn check_place(path: &Path) -> Result<(), String> {
    let no_file =
        |reason: &dyn std::fmt::Display| format!("cannot write {}: {reason}", path.display());
    if path.is_dir() {
        return Err(no_file(&"a directory, expected a file"));
    }
    let directory = path.parent().unwrap_or(Path::new(""));
    fs::create_dir_all(directory).map_err(|error| no_file(&error))
}

/// Writes JSON to a place that was checked, complete or not at all.
pub fn write_json(path: &Path, figures: &impl Serialize) -> io::Result<()> {
    let partial = path.with_extension("partial");
    fs::write(&partial, serde_json::to_string_pretty(figures)?)?;
    fs::rename(partial, path)
}
