//! What a training cost, shared by the examples.

use std::error::Error;
use std::fs;
use std::path::Path;

use fusedkv::train::LogLine;

/// Prints tokens/s and the peak of memory of a run that read `tokens`.
pub fn print(run: &Path, tokens: usize) -> Result<(), Box<dyn Error>> {
    println!("{tokens} tokens at {:.0} tokens/s", tokens_per_second(run)?);
    if let Some(mib) = peak_memory() {
        println!("{mib} MiB of memory at the peak");
    }
    Ok(())
}

/// Of the run's median step.
fn tokens_per_second(run: &Path) -> Result<f64, Box<dyn Error>> {
    let log = fs::read_to_string(run.join("metrics.jsonl"))?;
    let mut rates = Vec::new();
    for line in log.lines() {
        if let LogLine::Train {
            tokens_per_second, ..
        } = serde_json::from_str(line)?
        {
            rates.push(tokens_per_second);
        }
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[rates.len() / 2])
}

/// The most memory the process had, in MiB, where the system tells it.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib / 1024)
}
