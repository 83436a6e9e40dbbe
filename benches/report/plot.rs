//! Seconds over context length as SVG.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

/// One method's points: context length and time.
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// Draws `lines` with both axes from 0.
pub fn plot(path: &Path, title: &str, unit: &str, lines: &[Line]) -> Result<(), Box<dyn Error>> {
    let most = |of: fn(&(f64, f64)) -> f64| {
        let points = lines.iter().flat_map(|line| &line.points);
        points.map(of).fold(0.0, f64::max) * 1.05
    };
    let area = SVGBackend::new(path, (720, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..most(|point| point.0), 0.0..most(|point| point.1))?;
    chart
        .configure_mesh()
        .x_desc("tokens in the prompt")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_desc(unit)
        .draw()?;
    for (i, line) in lines.iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(
                line.points.iter().copied(),
                color.stroke_width(2),
            ))?
            .label(&line.name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 14, y + 4)], color.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.4))
        .draw()?;
    area.present()?;
    Ok(())
}
