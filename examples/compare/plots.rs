//! Loss curves, and quality against cache, as SVG and PNG.

use std::error::Error;
use std::path::Path;

use epaint_default_fonts::UBUNTU_LIGHT;
use fusedkv::train::compare::{MeanDeviation, RunResult, summarise};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

const SIZE: (u32, u32) = (1000, 620);

/// Writes `loss.{svg,png}`, and `quality.{svg,png}`, to the directory.
pub fn draw(results: &[RunResult], directory: &Path) -> Result<(), Box<dyn Error>> {
    register_font("sans-serif", FontStyle::Normal, UBUNTU_LIGHT)
        .map_err(|_| "the embedded font cannot be read")?;
    for (name, plot) in [("loss", Plot::Loss), ("quality", Plot::Quality)] {
        let svg = directory.join(format!("{name}.svg"));
        plot.draw(results, SVGBackend::new(&svg, SIZE).into_drawing_area())?;
        let png = directory.join(format!("{name}.png"));
        plot.draw(results, BitMapBackend::new(&png, SIZE).into_drawing_area())?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Plot {
    Loss,
    Quality,
}

impl Plot {
    fn draw<D: DrawingBackend>(
        self,
        results: &[RunResult],
        area: DrawingArea<D, Shift>,
    ) -> Result<(), Box<dyn Error>>
    where
        D::ErrorType: 'static,
    {
        area.fill(&WHITE)?;
        match self {
            Self::Loss => loss(results, &area)?,
            Self::Quality => quality(results, &area)?,
        }
        area.present()?;
        Ok(())
    }
}

/// Mean validation loss of every method over the tokens read.
fn loss<D: DrawingBackend>(
    results: &[RunResult],
    area: &DrawingArea<D, Shift>,
) -> Result<(), Box<dyn Error>>
where
    D::ErrorType: 'static,
{
    let curves: Vec<(String, Vec<(f64, f64)>)> = summarise(results)
        .into_iter()
        .map(|summary| {
            let runs: Vec<_> = results
                .iter()
                .filter(|run| run.method == summary.method)
                .collect();
            let epochs = runs.iter().map(|run| run.epochs.len()).min().unwrap_or(0);
            let points = (0..epochs).map(|epoch| {
                let config = &runs[0].config;
                let steps = config.steps * (epoch + 1) / config.epochs;
                let losses: Vec<f64> = runs.iter().map(|run| run.epochs[epoch].valid).collect();
                let tokens = (steps * config.tokens_per_step()) as f64;
                (tokens, MeanDeviation::of(&losses).mean)
            });
            (summary.method, points.collect())
        })
        .collect();
    let points = || curves.iter().flat_map(|(_, points)| points);
    let (low, high) = range(points().map(|point| point.1));
    let (_, longest) = range(points().map(|point| point.0));
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..longest, low..high)?;
    chart
        .configure_mesh()
        .x_desc("tokens")
        .y_desc("validation loss, nats per target")
        .x_label_formatter(&|tokens| format!("{:.0} k", tokens / 1e3))
        .label_style(("sans-serif", 17))
        .draw()?;
    for (i, (method, points)) in curves.into_iter().enumerate() {
        let color = Palette99::pick(i).stroke_width(2);
        chart
            .draw_series(LineSeries::new(points, color))?
            .label(method)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 17))
        .draw()?;
    Ok(())
}

/// Mean validation loss against cache bytes per token, with a standard deviation to either side.
fn quality<D: DrawingBackend>(
    results: &[RunResult],
    area: &DrawingArea<D, Shift>,
) -> Result<(), Box<dyn Error>>
where
    D::ErrorType: 'static,
{
    let summaries = summarise(results);
    let ends = summaries.iter().flat_map(|summary| {
        let MeanDeviation { mean, deviation } = summary.valid_loss;
        [mean - deviation, mean + deviation]
    });
    let (low, high) = range(ends);
    let bytes = |summary: &fusedkv::train::compare::MethodSummary| summary.cache_bytes_per_token;
    let largest = summaries.iter().map(bytes).max().unwrap_or(1) as f64;
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..largest * 1.3, low..high)?;
    chart
        .configure_mesh()
        .x_desc("cache bytes per token")
        .y_desc("validation loss, nats per target")
        .label_style(("sans-serif", 17))
        .draw()?;
    for (i, summary) in summaries.into_iter().enumerate() {
        let color = Palette99::pick(i).stroke_width(2);
        let at = summary.cache_bytes_per_token as f64;
        let MeanDeviation { mean, deviation } = summary.valid_loss;
        let bar = [(at, mean - deviation), (at, mean + deviation)];
        chart.draw_series([PathElement::new(bar, color)])?;
        chart
            .draw_series([Circle::new((at, mean), 5, color.filled())])?
            .label(summary.method)
            .legend(move |(x, y)| Circle::new((x + 9, y), 5, color.filled()));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 17))
        .draw()?;
    Ok(())
}

/// The least and the largest, a little apart.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    let margin = ((high - low) * 0.05).max(1e-3);
    (low - margin, high + margin)
}
