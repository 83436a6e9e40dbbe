//! Results over seeds, and their table.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::runs::{CachedResult, RunResult};
use super::speed::Speed;
use crate::cache::CacheDtype;
use crate::train::recall::DistanceAccuracy;

/// What is shown for what is not known.
const UNKNOWN: &str = "–";

/// Mean and spread over seeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MeanDeviation {
    /// The mean.
    pub mean: f64,
    /// Standard deviation of the sample, by n − 1; 0 of one value.
    pub deviation: f64,
}

impl MeanDeviation {
    /// Of some values; not a number of none.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Self {
            mean,
            deviation: if values.len() < 2 {
                0.0
            } else {
                (squares / (n - 1.0)).sqrt()
            },
        }
    }

    fn show(self, seeds: usize, digits: usize) -> String {
        match seeds {
            0 => UNKNOWN.to_owned(),
            1 => format!("{:.digits$}", self.mean),
            _ => format!("{:.digits$} ± {:.digits$}", self.mean, self.deviation),
        }
    }
}

/// The runs of one method together. Means are of those that did not diverge, and not a number where
/// all did.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodSummary {
    /// The method's name.
    pub method: String,
    /// Number of runs that did not diverge.
    pub seeds: usize,
    /// Number of runs that did.
    pub diverged: usize,
    /// Learned parameters.
    pub parameters: usize,
    /// Bytes that one token takes in a cache of f32.
    pub cache_bytes_per_token: usize,
    /// Validation loss in nats per target.
    pub valid_loss: MeanDeviation,
    /// Perplexity, seed by seed.
    pub perplexity: MeanDeviation,
    /// Training tokens per second.
    pub tokens_per_second: Option<MeanDeviation>,
    /// Share of right answers at every distance together; none for text.
    pub accuracy: Option<MeanDeviation>,
    /// The same through caches of other numbers, where all runs were evaluated so.
    pub cached: Vec<CachedSummary>,
}

/// The runs of one method together, through a cache of other numbers than the model's.
#[derive(Clone, Debug, PartialEq)]
pub struct CachedSummary {
    /// What the cache keeps.
    pub dtype: CacheDtype,
    /// Bytes that one token takes, scales included.
    pub cache_bytes_per_token: usize,
    /// Validation loss in nats per target.
    pub valid_loss: MeanDeviation,
    /// Share of right answers at every distance together; none for text.
    pub accuracy: Option<MeanDeviation>,
}

/// The runs of each method together, in the order in which methods first appear.
pub fn summarise(results: &[RunResult]) -> Vec<MethodSummary> {
    by_method(results)
        .iter()
        .map(|runs| summary(runs))
        .collect()
}

fn by_method(results: &[RunResult]) -> Vec<Vec<&RunResult>> {
    let mut groups: Vec<Vec<&RunResult>> = Vec::new();
    for result in results {
        match groups.iter_mut().find(|g| g[0].method == result.method) {
            Some(group) => group.push(result),
            None => groups.push(vec![result]),
        }
    }
    groups
}

fn summary(all: &[&RunResult]) -> MethodSummary {
    let runs = &finished(all);
    let over = |value: fn(&RunResult) -> f64| MeanDeviation::of(&collect(runs, |run| value(run)));
    let rates: Vec<f64> = runs
        .iter()
        .filter_map(|run| run.tokens_per_second)
        .collect();
    MethodSummary {
        method: all[0].method.clone(),
        seeds: runs.len(),
        diverged: all.len() - runs.len(),
        parameters: all[0].parameters,
        cache_bytes_per_token: all[0].cache_bytes_per_token,
        valid_loss: over(|run| run.valid_loss),
        perplexity: over(|run| run.perplexity),
        tokens_per_second: (!rates.is_empty()).then(|| MeanDeviation::of(&rates)),
        accuracy: accuracy(runs.iter().map(|run| &run.accuracy[..])),
        cached: runs
            .first()
            .map_or(&[][..], |first| &first.cached)
            .iter()
            .filter_map(|first| cached_summary(first, runs))
            .collect(),
    }
}

/// Those that did not diverge.
fn finished<'r>(runs: &[&'r RunResult]) -> Vec<&'r RunResult> {
    let mut runs = runs.to_vec();
    runs.retain(|run| run.diverged.is_none());
    runs
}

/// Of the cache type of `first`, none unless all runs were evaluated so.
fn cached_summary(first: &CachedResult, runs: &[&RunResult]) -> Option<CachedSummary> {
    let of_type = |run: &&RunResult| run.cached.iter().find(|c| c.dtype == first.dtype).cloned();
    let all: Vec<CachedResult> = runs.iter().map(of_type).collect::<Option<_>>()?;
    Some(CachedSummary {
        dtype: first.dtype,
        cache_bytes_per_token: first.cache_bytes_per_token,
        valid_loss: MeanDeviation::of(&collect(&all, |cached| cached.evaluation.loss)),
        accuracy: accuracy(all.iter().map(|cached| &cached.evaluation.accuracy[..])),
    })
}

fn collect<T>(of: &[T], value: impl Fn(&T) -> f64) -> Vec<f64> {
    of.iter().map(value).collect()
}

/// The share of right answers at every distance together, over runs; none if there are no answers.
fn accuracy<'a>(runs: impl Iterator<Item = &'a [DistanceAccuracy]>) -> Option<MeanDeviation> {
    let shares: Vec<f64> = runs
        .filter(|buckets| !buckets.is_empty())
        .map(|buckets| {
            let total: usize = buckets.iter().map(|bucket| bucket.total).sum();
            let correct: usize = buckets.iter().map(|bucket| bucket.correct).sum();
            correct as f64 / total as f64
        })
        .collect();
    (!shares.is_empty()).then(|| MeanDeviation::of(&shares))
}

/// A Markdown table of the methods: means ± standard deviations over seeds, speeds as measured. Runs
/// that diverged are counted beside the seeds, and in no mean.
/// Where answers were recalled, another with the share of right ones by distance; where caches of
/// other numbers were tried, one of them.
pub fn markdown(results: &[RunResult], speeds: &[Speed]) -> String {
    let summaries = summarise(results);
    let recall = summaries.iter().any(|summary| summary.accuracy.is_some());
    let mut heading = vec!["method", "seeds", "validation loss", "perplexity"];
    if recall {
        heading.push("accuracy");
    }
    heading.extend([
        "parameters",
        "cache bytes/token",
        "training tokens/s",
        "TTFT ms",
        "TPOT ms",
    ]);
    let mut table = head(&heading);
    for summary in &summaries {
        let seeds = summary.seeds;
        let speed = speeds.iter().find(|speed| speed.method == summary.method);
        let mut cells = vec![
            summary.method.clone(),
            match summary.diverged {
                0 => seeds.to_string(),
                diverged => format!("{seeds}, {diverged} diverged"),
            },
            match seeds {
                0 => "diverged".to_owned(),
                _ => summary.valid_loss.show(seeds, 4),
            },
            summary.perplexity.show(seeds, 2),
        ];
        if recall {
            cells.push(show(summary.accuracy, |a| a.show(seeds, 3)));
        }
        cells.extend([
            summary.parameters.to_string(),
            summary.cache_bytes_per_token.to_string(),
            show(summary.tokens_per_second, |rate| rate.show(seeds, 0)),
            show(speed, |speed| format!("{:.1}", speed.ttft * 1e3)),
            show(speed, |speed| format!("{:.2}", speed.tpot * 1e3)),
        ]);
        row(&mut table, &cells);
    }
    if recall {
        table.push('\n');
        table.push_str(&by_distance(results));
    }
    if summaries.iter().any(|summary| !summary.cached.is_empty()) {
        table.push('\n');
        table.push_str(&by_cache(&summaries, recall));
    }
    table
}

/// Every method through caches of other numbers.
fn by_cache(summaries: &[MethodSummary], recall: bool) -> String {
    let mut heading = vec!["method", "cache", "cache bytes/token", "validation loss"];
    if recall {
        heading.push("accuracy");
    }
    let mut table = head(&heading);
    for summary in summaries {
        for cached in &summary.cached {
            let mut cells = vec![
                summary.method.clone(),
                cached.dtype.to_string(),
                cached.cache_bytes_per_token.to_string(),
                cached.valid_loss.show(summary.seeds, 4),
            ];
            if recall {
                cells.push(show(cached.accuracy, |a| a.show(summary.seeds, 3)));
            }
            row(&mut table, &cells);
        }
    }
    table
}

/// The share of right answers by distance: means ± standard deviations over seeds.
fn by_distance(results: &[RunResult]) -> String {
    let buckets = results.iter().flat_map(|run| &run.accuracy);
    let distances: BTreeSet<usize> = buckets.map(|bucket| bucket.up_to).collect();
    let mut heading = vec!["accuracy up to distance".to_owned()];
    heading.extend(distances.iter().map(ToString::to_string));
    let mut table = head(&heading);
    for runs in by_method(results) {
        let mut cells = vec![runs[0].method.clone()];
        cells.extend(distances.iter().map(|&distance| {
            let here = runs.iter().flat_map(|run| &run.accuracy);
            let shares: Vec<f64> = here
                .filter(|bucket| bucket.up_to == distance)
                .map(|bucket| bucket.correct as f64 / bucket.total as f64)
                .collect();
            MeanDeviation::of(&shares).show(shares.len(), 3)
        }));
        row(&mut table, &cells);
    }
    table
}

/// A table without rows.
fn head(columns: &[impl AsRef<str>]) -> String {
    let names: Vec<&str> = columns.iter().map(AsRef::as_ref).collect();
    let rule = "---|".repeat(columns.len());
    format!("| {} |\n|{rule}\n", names.join(" | "))
}

fn row(table: &mut String, cells: &[String]) {
    // Writing to a string does not fail.
    let _ = writeln!(table, "| {} |", cells.join(" | "));
}

/// A dash for what is not known.
fn show<T>(value: Option<T>, shown: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), shown)
}
