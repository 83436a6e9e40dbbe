//! Progress of a comparison: one bar over all steps of all runs.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fusedkv::train::compare::{Comparison, RunEvent};
use indicatif::{ProgressBar, ProgressStyle};

/// The bar, and what the time left is reckoned from.
pub struct Watch {
    bar: ProgressBar,
    steps: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Steps of the runs before this one.
    before: u64,
    /// The first step seen here, and when: steps made before an interruption say nothing of the
    /// pace.
    first: Option<(u64, Instant)>,
    /// Steps of finished runs that were only read.
    skipped: u64,
    label: String,
}

impl Watch {
    pub fn new(comparison: &Comparison) -> Self {
        let runs = comparison.methods.len() * comparison.seeds.len();
        let steps = comparison.training.steps as u64;
        let bar = ProgressBar::new(runs as u64 * steps);
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} steps  {msg}") {
            bar.set_style(style);
        }
        Self {
            bar,
            steps,
            state: Mutex::default(),
        }
    }

    pub fn tell(&self, event: RunEvent<'_>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            RunEvent::Started { method, seed } => state.label = format!("{method} seed {seed}"),
            RunEvent::Step(report) => {
                let here = state.before + report.step as u64;
                let (first, since) = *state.first.get_or_insert((here, Instant::now()));
                let made = here - first - state.skipped.min(here - first);
                let left = match made {
                    0 => "…".to_owned(),
                    made => {
                        let pace = since.elapsed().as_secs_f64() / made as f64;
                        let left = self.bar.length().unwrap_or(here).saturating_sub(here);
                        clock(Duration::from_secs_f64(pace * left as f64))
                    }
                };
                let label = &state.label;
                let loss = report.loss;
                self.bar.set_position(here);
                self.bar
                    .set_message(format!("{label}  loss {loss:.3}  {left} left"));
            }
            RunEvent::Finished { result, kept } => {
                state.before += self.steps;
                if kept && state.first.is_some() {
                    state.skipped += self.steps;
                }
                self.bar.set_position(state.before);
                let outcome = match result.diverged {
                    Some(epoch) => format!("diverged at validation {epoch}"),
                    None => format!("validation loss {:.4}", result.valid_loss),
                };
                self.say(&format!(
                    "{} seed {}: {outcome}{}",
                    result.method,
                    result.config.seed,
                    if kept { ", kept" } else { "" },
                ));
            }
        }
    }

    /// Prints a line above the bar. Without a terminal the bar is hidden, and so would be what it
    /// prints.
    pub fn say(&self, line: &str) {
        if self.bar.is_hidden() {
            println!("{line}");
        } else {
            self.bar.println(line);
        }
    }
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}
