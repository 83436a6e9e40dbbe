//! The font of the plots, which are drawn where no font is installed.

use std::error::Error;

use epaint_default_fonts::UBUNTU_LIGHT;
use plotters::style::{FontStyle, register_font};

/// Makes `sans-serif` the embedded font.
pub fn register() -> Result<(), Box<dyn Error>> {
    register_font("sans-serif", FontStyle::Normal, UBUNTU_LIGHT)
        .map_err(|_| "the embedded font cannot be read".into())
}
