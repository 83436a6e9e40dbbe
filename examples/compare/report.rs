//! Table and plots of a comparison, written anew after every run.

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fusedkv::train::compare::{RunResult, Speed, markdown};

use super::plots;

/// What is known so far, and where it is written.
pub struct Report {
    directory: PathBuf,
    results: Mutex<Vec<RunResult>>,
}

impl Report {
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            results: Mutex::default(),
        }
    }

    /// Adds a run. One that was only read was reported when it was made.
    pub fn add(&self, result: &RunResult, kept: bool) -> Result<(), Box<dyn Error>> {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        results.push(result.clone());
        if !kept {
            self.table(&results, &[])?;
            self.plots(&results)?;
        }
        Ok(())
    }

    /// Writes and returns the table, and writes speeds where they are known.
    pub fn table(&self, results: &[RunResult], speeds: &[Speed]) -> Result<String, Box<dyn Error>> {
        let table = markdown(results, speeds);
        self.publish(|directory| {
            fs::write(directory.join("table.md"), &table)?;
            if !speeds.is_empty() {
                let speeds = serde_json::to_string_pretty(speeds)?;
                fs::write(directory.join("speed.json"), speeds)?;
            }
            Ok(())
        })?;
        Ok(table)
    }

    /// Draws the plots.
    pub fn plots(&self, results: &[RunResult]) -> Result<(), Box<dyn Error>> {
        self.publish(|directory| plots::draw(results, directory))
    }

    /// Moves the files that `write` makes in a directory of its own to that of the comparison, so
    /// that none there is half-written.
    fn publish(
        &self,
        write: impl FnOnce(&Path) -> Result<(), Box<dyn Error>>,
    ) -> Result<(), Box<dyn Error>> {
        let publish = || {
            let partial = tempfile::tempdir_in(&self.directory)?;
            write(partial.path())?;
            for entry in fs::read_dir(partial.path())? {
                let entry = entry?;
                OpenOptions::new()
                    .write(true)
                    .open(entry.path())?
                    .sync_all()?;
                fs::rename(entry.path(), self.directory.join(entry.file_name()))?;
            }
            Ok(())
        };
        publish().map_err(|error: Box<dyn Error>| {
            let directory = self.directory.display();
            format!("cannot write results to {directory}: {error}").into()
        })
    }
}
