//! How fast the machine reads its memory.

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
