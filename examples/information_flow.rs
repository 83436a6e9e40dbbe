//! Where a model's top layers take their keys and values from: weights as JSON, and heat maps.
//!
//! ```sh
//! cargo run --release --example train_tiny -- --method dense_fusion --out target/dense
//! cargo run --release --example information_flow -- --model target/dense --out target/dense
//! ```

mod backend;
mod font;
mod json;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::backend::Backend;
use clap::Parser;
use fusedkv::checkpoint::{LoadOptions, load_checkpoint};
use fusedkv::flow::LayerFlow;
use fusedkv::information_flow;
use plotters::prelude::*;

use backend::{BackendName, Program, exit_code};
use json::{check_place, write_json};

// Keeps freed blocks; the system's gives large ones back and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Export which stored layers a model's top layers read, and draw it.
#[derive(Parser)]
struct Args {
    /// Directory of the model, e.g. one of the method `dense_fusion`
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Directory for information_flow.json, keys.svg and values.svg
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What to compute on
    #[arg(long, value_enum, default_value = "flex")]
    backend: BackendName,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(args.backend.run(args))
}

impl Program for Args {
    fn run<B: Backend>(self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        let report = self.out.join("information_flow.json");
        check_place(&report)?;
        let model = load_checkpoint::<B>(&self.model, LoadOptions::new(), device)?.model;
        let flow = information_flow(&model);
        if flow.keys.is_empty() && flow.values.is_empty() {
            return Err("every layer of the model has keys and values of its own".into());
        }
        write_json(&report, &flow)?;
        println!("{}", report.display());
        font::register()?;
        for (name, layers) in [("keys", &flow.keys), ("values", &flow.values)] {
            if layers.is_empty() {
                println!("every layer has {name} of its own");
                continue;
            }
            let path = self.out.join(format!("{name}.svg"));
            draw(&path, name, layers)?;
            println!("{}", path.display());
            for layer in layers {
                let weights = layer.sources.iter().zip(&layer.weights);
                let weights: Vec<_> = weights
                    .map(|(source, weight)| format!("{} × {weight:.3}", source + 1))
                    .collect();
                println!("  layer {:<3} {}", layer.layer + 1, weights.join("  "));
            }
        }
        Ok(())
    }
}

/// One cell per layer and source, darker for larger weights; layers count from 1, as in papers.
fn draw(path: &Path, name: &str, layers: &[LayerFlow]) -> Result<(), Box<dyn Error>> {
    let sources = layers.iter().flat_map(|layer| &layer.sources);
    let sources = sources.max().map_or(1, |highest| highest + 1);
    let (first, last) = (layers[0].layer + 1, layers[layers.len() - 1].layer + 1);
    let largest = layers.iter().flat_map(|layer| &layer.weights);
    let largest = largest.fold(f64::MIN_POSITIVE, |a, &b| a.max(b));

    let size = (
        120 + 44 * sources as u32,
        110 + 32 * (last - first + 1) as u32,
    );
    let area = SVGBackend::new(path, size).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("|weights| of {name}"), ("sans-serif", 16))
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(44)
        .build_cartesian_2d(
            0.5..sources as f64 + 0.5,
            first as f64 - 0.5..last as f64 + 0.5,
        )?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc("source layer")
        .y_desc("layer")
        .x_labels(sources)
        .y_labels(layers.len())
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    for layer in layers {
        let y = layer.layer as f64 + 1.0;
        for (source, weight) in layer.sources.iter().zip(&layer.weights) {
            let x = *source as f64 + 1.0;
            let cell = [(x - 0.5, y - 0.5), (x + 0.5, y + 0.5)];
            let share = weight / largest;
            let shade = |full: f64| (255.0 - share * (255.0 - full)) as u8;
            let color = RGBColor(shade(20.0), shade(60.0), shade(120.0));
            chart.draw_series([Rectangle::new(cell, color.filled())])?;
            let ink = if share > 0.5 { &WHITE } else { &BLACK };
            let style = ("sans-serif", 11).into_font().color(ink);
            let label = Text::new(format!("{weight:.2}"), (x - 0.3, y + 0.15), style);
            chart.draw_series([label])?;
        }
    }
    area.present()?;
    Ok(())
}
