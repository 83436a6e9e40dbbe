//! The table and the plots.

mod plot;

use std::error::Error;
use std::path::Path;

use burn::tensor::backend::Backend;
use fusedkv::{ConfigError, FusedKvDecoder};
use serde::Serialize;

use crate::Turn;
use crate::draws::Draws;
use crate::figures::{MIB, median};
use crate::font;
use plot::{Line, plot};

const GIB: f64 = 1024.0 * MIB;

/// All figures of a run.
#[derive(Serialize)]
pub struct Report {
    backend: String,
    threads: usize,
    /// Bytes per second; of the processor's memory, and nothing of a GPU's is measured.
    read_bandwidth: Option<f64>,
    cases: Vec<Figures>,
    draws: Vec<Draws>,
}

/// One method at one batch and prompt.
pub struct Case {
    method: String,
    batch: usize,
    prompt: usize,
    /// Bytes of the weights that a decoded token reads.
    weight_bytes: f64,
    /// Cached bytes that a decoded token reads, against those that are cached.
    reads_per_cached_byte: f64,
    prefill_flops: f64,
    turns: Vec<Turn>,
}

/// Medians, and ratios to the first method.
#[derive(Serialize)]
struct Figures {
    method: String,
    batch: usize,
    prompt: usize,
    ttft_s: f64,
    ttft_ratio: f64,
    /// Operations of the prefill, against the first method's.
    flops_ratio: f64,
    prefill_gflops: f64,
    tpot_s: f64,
    tpot_ratio: f64,
    /// Bytes read per decoded token, against the first method's.
    bytes_ratio: f64,
    /// Bytes read per decoded token ÷ its time ÷ the bandwidth probed.
    bandwidth_share: Option<f64>,
    cache_bytes: usize,
    /// Of the processor's memory.
    peak_bytes: Option<usize>,
}

impl Case {
    pub fn new<B: Backend>(
        method: &str,
        batch: usize,
        prompt: usize,
        model: &FusedKvDecoder<B>,
    ) -> Result<Self, ConfigError> {
        let config = model.config();
        let costs = config.costs()?;
        Ok(Self {
            method: method.to_owned(),
            batch,
            prompt,
            weight_bytes: model.weight_bytes_read() as f64,
            reads_per_cached_byte: costs.cache_bytes_read_per_token(prompt, 4) as f64
                / (costs.cache_bytes_per_token(4) * prompt) as f64,
            prefill_flops: costs.prefill_flops(prompt) as f64 * batch as f64,
            turns: Vec::new(),
        })
    }

    pub fn add(&mut self, turn: Turn) {
        self.turns.push(turn);
    }

    fn median(&self, of: impl Fn(&Turn) -> f64) -> f64 {
        median(&mut self.turns.iter().map(of).collect::<Vec<_>>())
    }

    /// Bytes a decoded token reads.
    fn bytes_read(&self) -> f64 {
        let cached = self.turns[0].cache_bytes as f64;
        self.weight_bytes + cached * self.reads_per_cached_byte
    }
}

impl Report {
    pub fn new(backend: String, read_bandwidth: Option<f64>) -> Self {
        Self {
            backend,
            threads: rayon::current_num_threads(),
            read_bandwidth,
            cases: Vec::new(),
            draws: Vec::new(),
        }
    }

    pub fn heading(&self) -> String {
        let bandwidth = match self.read_bandwidth {
            Some(bandwidth) => format!(", memory is read at {:.1} GiB/s", bandwidth / GIB),
            None => String::new(),
        };
        format!(
            "{}, {} threads{bandwidth}\n\n\
             | method | batch | prompt | TTFT s | ratio | FLOP ratio | GFLOP/s | TPOT ms | ratio | bytes ratio | of bandwidth | cache MiB | peak MiB |\n\
             |---|---|---|---|---|---|---|---|---|---|---|---|---|",
            self.backend, self.threads,
        )
    }

    /// Adds methods measured side by side, and prints their rows.
    pub fn add(&mut self, cases: Vec<Case>) {
        let (ttft, tpot) = (|t: &Turn| t.ttft, |t: &Turn| t.tpot);
        let first = &cases[0];
        for case in &cases {
            let figures = Figures {
                method: case.method.clone(),
                batch: case.batch,
                prompt: case.prompt,
                ttft_s: case.median(ttft),
                ttft_ratio: case.median(ttft) / first.median(ttft),
                flops_ratio: case.prefill_flops / first.prefill_flops,
                prefill_gflops: case.prefill_flops / case.median(ttft) / 1e9,
                tpot_s: case.median(tpot),
                tpot_ratio: case.median(tpot) / first.median(tpot),
                bytes_ratio: case.bytes_read() / first.bytes_read(),
                bandwidth_share: self
                    .read_bandwidth
                    .map(|bandwidth| case.bytes_read() / case.median(tpot) / bandwidth),
                cache_bytes: case.turns[0].cache_bytes,
                peak_bytes: self
                    .read_bandwidth
                    .and(case.turns.iter().map(|turn| turn.peak_bytes).max()),
            };
            println!("{}", figures.row());
            self.cases.push(figures);
        }
    }

    /// Adds ways to draw at one vocabulary, and prints their rows.
    pub fn add_draws(&mut self, draws: Vec<Draws>) {
        for draws in &draws {
            println!("{}", draws.row());
        }
        self.draws.extend(draws);
    }

    /// Draws TTFT and TPOT of the first batch over the prompts' lengths, beside the file of figures.
    pub fn plot(&self, figures: &Path) -> Result<(), Box<dyn Error>> {
        let Some(batch) = self.cases.first().map(|case| case.batch) else {
            return Ok(());
        };
        font::register()?;
        let lines = |of: fn(&Figures) -> f64| -> Vec<Line> {
            let mut lines: Vec<Line> = Vec::new();
            for case in self.cases.iter().filter(|case| case.batch == batch) {
                let point = (case.prompt as f64, of(case));
                match lines.iter_mut().find(|line| line.name == case.method) {
                    Some(line) => line.points.push(point),
                    None => lines.push(Line {
                        name: case.method.clone(),
                        points: vec![point],
                    }),
                }
            }
            lines
        };
        let title = |what| format!("{what}, {}, batch {batch}", self.backend);
        plot(
            &figures.with_extension("ttft.svg"),
            &title("Time to the first token"),
            "seconds",
            &lines(|case| case.ttft_s),
        )?;
        plot(
            &figures.with_extension("tpot.svg"),
            &title("Time per decoded token"),
            "milliseconds",
            &lines(|case| case.tpot_s * 1e3),
        )
    }
}

impl Figures {
    fn row(&self) -> String {
        format!(
            "| {} | {} | {} | {:.3} | {:.3} | {:.3} | {:.0} | {:.1} | {:.2} | {:.2} | {} | {:.1} | {} |",
            self.method,
            self.batch,
            self.prompt,
            self.ttft_s,
            self.ttft_ratio,
            self.flops_ratio,
            self.prefill_gflops,
            self.tpot_s * 1e3,
            self.tpot_ratio,
            self.bytes_ratio,
            or_dash(self.bandwidth_share, |share| format!(
                "{:.0} %",
                share * 100.0
            )),
            self.cache_bytes as f64 / MIB,
            or_dash(self.peak_bytes, |bytes| format!(
                "{:.1}",
                bytes as f64 / MIB
            )),
        )
    }
}

fn or_dash<T>(figure: Option<T>, show: impl FnOnce(T) -> String) -> String {
    figure.map_or_else(|| "–".to_owned(), show)
}
