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

/// Writes JSON, complete or not at all.
pub fn write_json(path: &Path, figures: &impl Serialize) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let partial = path.with_extension("partial");
    fs::write(&partial, serde_json::to_string_pretty(figures)?)?;
    fs::rename(partial, path)
}
