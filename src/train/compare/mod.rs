//! Methods trained alike: the same tokens in the same order, seeds and learning rates.
//!
//! A [`Comparison`] trains every [`Method`] with every seed, keeps what is finished, and
//! [`markdown`] makes a table of the results. `examples/compare` is its command.

mod method;
mod runs;
mod speed;
mod table;

pub use method::{DEFAULT_METHODS, Method, MethodError};
pub use runs::{CachedResult, Comparison, RunEvent, RunResult};
pub use speed::{Speed, measure_speed};
pub use table::{CachedSummary, MeanDeviation, MethodSummary, markdown, summarise};
