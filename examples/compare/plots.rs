//! Loss curves, gradient norms, and quality and recall against cache, as SVG and PNG.

use std::error::Error;
use std::path::Path;

use fusedkv::train::compare::{MeanDeviation, MethodSummary, RunResult, summarise};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::font;

const SIZE: (u32, u32) = (1000, 620);

/// Writes `loss.{svg,png}`, `gradients.{svg,png}`, `quality.{svg,png}` and, where answers were
/// recalled, `recall.{svg,png}` to the directory. Runs that diverged are in none of them.
pub fn draw(results: &[RunResult], directory: &Path) -> Result<(), Box<dyn Error>> {
    if by_method(results).next().is_none() {
        return Ok(());
    }
    font::register()?;
    let mut plots = vec![("loss", Plot::Loss), ("quality", Plot::Quality)];
    if gradients(results)
        .iter()
        .any(|(_, points)| !points.is_empty())
    {
        plots.push(("gradients", Plot::Gradients));
    }
    if summaries(results).any(|summary| summary.accuracy.is_some()) {
        plots.push(("recall", Plot::Recall));
    }
    for (name, plot) in plots {
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
    Gradients,
    Quality,
    Recall,
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
            Self::Loss => {
                let names = ["tokens, thousands", "validation loss, nats per target"];
                curves(&area, names, losses(results))?;
            }
            Self::Gradients => {
                let names = ["layer", "mean gradient norm"];
                curves(&area, names, gradients(results))?;
            }
            Self::Quality => {
                let trails = trails(results, |_, loss| Some(loss));
                against_cache(trails, &area, "validation loss, nats per target")?;
            }
            Self::Recall => {
                let trails = trails(results, |accuracy, _| accuracy);
                against_cache(trails, &area, "share of right answers")?;
            }
        }
        area.present()?;
        Ok(())
    }
}

/// A method's name and its points.
type Curve = (String, Vec<(f64, f64)>);

/// The methods of which runs are finished.
fn summaries(results: &[RunResult]) -> impl Iterator<Item = MethodSummary> {
    let summaries = summarise(results).into_iter();
    summaries.filter(|summary| summary.seeds > 0)
}

/// The finished runs of every method.
fn by_method(results: &[RunResult]) -> impl Iterator<Item = (String, Vec<&RunResult>)> {
    let finished = |run: &&RunResult| run.diverged.is_none();
    summaries(results).map(move |summary| {
        let runs = results.iter().filter(finished);
        let runs = runs.filter(|run| run.method == summary.method);
        (label(&summary), runs.collect())
    })
}

/// A method's name, and how many of its runs are left out.
fn label(summary: &MethodSummary) -> String {
    match summary.diverged {
        0 => summary.method.clone(),
        diverged => format!("{} ({diverged} diverged)", summary.method),
    }
}

/// Mean validation loss over the tokens read.
fn losses(results: &[RunResult]) -> Vec<Curve> {
    let curve = |(method, runs): (String, Vec<&RunResult>)| {
        let epochs = runs.iter().map(|run| run.epochs.len()).min().unwrap_or(0);
        let points = (0..epochs).map(|epoch| {
            let losses: Vec<f64> = runs.iter().map(|run| run.epochs[epoch].valid).collect();
            let tokens = runs[0].config.tokens_until(epoch + 1) as f64;
            (tokens / 1e3, MeanDeviation::of(&losses).mean)
        });
        (method, points.collect())
    };
    by_method(results).map(curve).collect()
}

/// Mean norm of the gradients of each layer, counted from 1, over epochs and seeds.
fn gradients(results: &[RunResult]) -> Vec<Curve> {
    let curve = |(method, runs): (String, Vec<&RunResult>)| {
        let epochs = runs.iter().flat_map(|run| &run.epochs);
        let norms: Vec<_> = epochs.filter_map(|e| e.gradient_norms.as_ref()).collect();
        let points = (0..runs[0].config.model.n_layers).filter_map(|layer| {
            let of_layer = norms.iter().filter_map(|norms| norms.layers.get(layer));
            let of_layer: Vec<f64> = of_layer.copied().collect();
            let mean = MeanDeviation::of(&of_layer).mean;
            (!of_layer.is_empty()).then_some((layer as f64 + 1.0, mean))
        });
        (method, points.collect())
    };
    by_method(results).map(curve).collect()
}

fn curves<D: DrawingBackend>(
    area: &DrawingArea<D, Shift>,
    [x, y]: [&str; 2],
    curves: Vec<Curve>,
) -> Result<(), Box<dyn Error>>
where
    D::ErrorType: 'static,
{
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
        .x_desc(x)
        .y_desc(y)
        .x_label_formatter(&|x| format!("{x:.0}"))
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

/// A mean at some cache bytes per token, and what it is labelled with.
struct Point {
    label: String,
    bytes: f64,
    value: MeanDeviation,
}

/// Of every method its f32 cache, then the same models through other caches: what `value` makes of
/// accuracy and loss.
fn trails(
    results: &[RunResult],
    value: impl Fn(Option<MeanDeviation>, MeanDeviation) -> Option<MeanDeviation>,
) -> Vec<Vec<Point>> {
    let point = |label, bytes: usize, accuracy, loss| {
        let value = value(accuracy, loss)?;
        // A cache of too few bits may make a loss that is no number.
        value.mean.is_finite().then_some(Point {
            label,
            bytes: bytes as f64,
            value,
        })
    };
    let trail = |summary: MethodSummary| {
        let cached = summary.cached.iter().filter_map(|c| {
            let bytes = c.cache_bytes_per_token;
            point(c.dtype.to_string(), bytes, c.accuracy, c.valid_loss)
        });
        let bytes = summary.cache_bytes_per_token;
        let name = label(&summary);
        let plain = point(name, bytes, summary.accuracy, summary.valid_loss);
        plain.into_iter().chain(cached).collect::<Vec<_>>()
    };
    let trails = summaries(results).map(trail);
    trails.filter(|trail| !trail.is_empty()).collect()
}

/// A mean of every method against cache bytes per token, with a standard deviation to either side,
/// and from it a line to the same models through other caches.
fn against_cache<D: DrawingBackend>(
    trails: Vec<Vec<Point>>,
    area: &DrawingArea<D, Shift>,
    name: &str,
) -> Result<(), Box<dyn Error>>
where
    D::ErrorType: 'static,
{
    let points = || trails.iter().flatten();
    let (low, high) = range(points().flat_map(|point| {
        let MeanDeviation { mean, deviation } = point.value;
        [mean - deviation, mean + deviation]
    }));
    let (fewest, most) = points().fold((f64::MAX, 1f64), |(few, most), point| {
        (few.min(point.bytes), most.max(point.bytes))
    });
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d((fewest / 1.2..most * 2.4).log_scale().base(2.0), low..high)?;
    chart
        .configure_mesh()
        .x_desc("cache bytes per token")
        .y_desc(name)
        .x_label_formatter(&|bytes| format!("{bytes:.0}"))
        .label_style(("sans-serif", 17))
        .draw()?;
    let mut labels = Vec::new();
    for (i, trail) in trails.into_iter().enumerate() {
        let color = Palette99::pick(i).stroke_width(2);
        let at = |point: &Point| (point.bytes, point.value.mean);
        let line: Vec<_> = trail.iter().map(at).collect();
        chart.draw_series([PathElement::new(line, color.stroke_width(1))])?;
        for (n, point) in trail.into_iter().enumerate() {
            let (bytes, mean) = at(&point);
            let deviation = point.value.deviation;
            let bar = [(bytes, mean - deviation), (bytes, mean + deviation)];
            let size = if n == 0 { 5 } else { 3 };
            chart.draw_series([PathElement::new(bar, color)])?;
            // Some colors are light: the edge is seen.
            for style in [color.filled(), BLACK.mix(0.4).stroke_width(1)] {
                chart.draw_series([Circle::new((bytes, mean), size, style)])?;
            }
            labels.push((chart.backend_coord(&(bytes, mean)), point.label));
        }
    }
    drop(chart);
    place(area, labels)
}

/// Writes names beside points, in pixels: from the top down, none over another.
fn place<D: DrawingBackend>(
    area: &DrawingArea<D, Shift>,
    mut labels: Vec<((i32, i32), String)>,
) -> Result<(), Box<dyn Error>>
where
    D::ErrorType: 'static,
{
    /// Of the letters, about.
    const WIDTH: i32 = 8;
    const HEIGHT: i32 = 15;

    labels.sort_by_key(|((x, y), _)| (*y, *x));
    let mut taken: Vec<(i32, i32, i32)> = Vec::new();
    for ((x, y), label) in labels {
        let left = x + 10;
        let right = left + WIDTH * label.chars().count() as i32;
        let mut top = y;
        // Those above were placed first: further down there is room.
        while let Some(hit) = taken
            .iter()
            .find(|(from, to, other)| left < *to && *from < right && (top - other).abs() < HEIGHT)
        {
            top = hit.2 + HEIGHT;
        }
        taken.push((left, right, top));
        let style = ("sans-serif", 15).into_font().color(&BLACK);
        let style = style.pos(Pos::new(HPos::Left, VPos::Center));
        let pointer = vec![(x, y), (left - 2, top)];
        area.draw(&PathElement::new(pointer, BLACK.mix(0.3)))?;
        area.draw(&Text::new(label, (left, top), style))?;
    }
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
