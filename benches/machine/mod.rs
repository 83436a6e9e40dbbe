//! What the machine gives: memory bandwidth, and the process's peak memory.

use std::fs;
use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

/// Bytes read: far more than any cache holds.
const PROBE: usize = 1 << 29;
/// Bytes a thread reads at a time.
const CHUNK: usize = 1 << 20;

/// The best of several readings of a large buffer by all threads, in bytes per second.
pub fn read_bandwidth() -> f64 {
    let buffer = vec![1u64; PROBE / size_of::<u64>()];
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let start = Instant::now();
        let sum: u64 = buffer
            .par_chunks(CHUNK / size_of::<u64>())
            .map(|chunk| chunk.iter().fold(0, |sum: u64, x| sum.wrapping_add(*x)))
            .sum();
        black_box(sum);
        best = best.min(start.elapsed().as_secs_f64());
    }
    PROBE as f64 / best
}

/// Peak memory from a moment on, where Linux tells.
pub struct PeakMemory {
    before: Option<usize>,
}

impl PeakMemory {
    /// Forgets earlier peaks.
    pub fn start() -> Self {
        // 5 resets the high-water mark of the resident set.
        let reset = fs::write("/proc/self/clear_refs", "5").is_ok();
        Self {
            before: if reset { status("VmRSS:") } else { None },
        }
    }

    /// Bytes by which the resident set rose since the start.
    pub fn peak(&self) -> Option<usize> {
        Some(status("VmHWM:")?.saturating_sub(self.before?))
    }
}

fn status(field: &str) -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kilobytes: usize = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes * 1024)
}
