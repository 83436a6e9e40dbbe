//! Results over seeds, and their table.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::runs::RunResult;
use super::speed::Speed;

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
            1 => format!("{:.digits$}", self.mean),
            _ => format!("{:.digits$} ± {:.digits$}", self.mean, self.deviation),
        }
    }
}

/// The runs of one method together.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodSummary {
    /// The method's name.
    pub method: String,
    /// Number of runs.
    pub seeds: usize,
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

fn summary(runs: &[&RunResult]) -> MethodSummary {
    let over = |value: fn(&RunResult) -> f64| {
        let values: Vec<f64> = runs.iter().map(|run| value(run)).collect();
        MeanDeviation::of(&values)
    };
    let some = |values: Vec<f64>| (!values.is_empty()).then(|| MeanDeviation::of(&values));
    let rates = runs.iter().filter_map(|run| run.tokens_per_second);
    let accuracies = runs.iter().filter_map(|run| {
        let total: usize = run.accuracy.iter().map(|bucket| bucket.total).sum();
        let correct: usize = run.accuracy.iter().map(|bucket| bucket.correct).sum();
        (total > 0).then(|| correct as f64 / total as f64)
    });
    MethodSummary {
        method: runs[0].method.clone(),
        seeds: runs.len(),
        parameters: runs[0].parameters,
        cache_bytes_per_token: runs[0].cache_bytes_per_token,
        valid_loss: over(|run| run.valid_loss),
        perplexity: over(|run| run.perplexity),
        tokens_per_second: some(rates.collect()),
        accuracy: some(accuracies.collect()),
    }
}

/// A Markdown table of the methods: means ± standard deviations over seeds, speeds as measured.
/// Where answers were recalled, a second one with the share of right ones by distance.
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
    let mut table = format!(
        "| {} |\n|{}\n",
        heading.join(" | "),
        "---|".repeat(heading.len())
    );
    for summary in summaries {
        let seeds = summary.seeds;
        let dash = || "–".to_owned();
        let speed = speeds.iter().find(|speed| speed.method == summary.method);
        let mut cells = vec![
            summary.method,
            seeds.to_string(),
            summary.valid_loss.show(seeds, 4),
            summary.perplexity.show(seeds, 2),
        ];
        if recall {
            cells.push(summary.accuracy.map_or_else(dash, |a| a.show(seeds, 3)));
        }
        cells.extend([
            summary.parameters.to_string(),
            summary.cache_bytes_per_token.to_string(),
            summary
                .tokens_per_second
                .map_or_else(dash, |rate| rate.show(seeds, 0)),
            speed.map_or_else(dash, |speed| format!("{:.1}", speed.ttft * 1e3)),
            speed.map_or_else(dash, |speed| format!("{:.2}", speed.tpot * 1e3)),
        ]);
        row(&mut table, &cells);
    }
    if recall {
        table.push_str(&by_distance(results));
    }
    table
}

/// The share of right answers by distance: means ± standard deviations over seeds.
fn by_distance(results: &[RunResult]) -> String {
    let buckets = results.iter().flat_map(|run| &run.accuracy);
    let distances: BTreeSet<usize> = buckets.map(|bucket| bucket.up_to).collect();
    let mut table = format!(
        "\n| accuracy up to distance | {} |\n|{}\n",
        distances
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(" | "),
        "---|".repeat(distances.len() + 1)
    );
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

fn row(table: &mut String, cells: &[String]) {
    // Writing to a string does not fail.
    let _ = writeln!(table, "| {} |", cells.join(" | "));
}
