//! Every backend computes what Flex computes in f32, which other tests compare with independent
//! implementations: one suite, and a file for each backend that says what it is run with.
//!
//! ```sh
//! cargo test --release --test conformance
//! cargo test --release --features wgpu --test conformance wgpu:: -- --test-threads 1
//! cargo test --release --features cuda --test conformance cuda:: -- --test-threads 1
//! ```

#[path = "../formula/mod.rs"]
mod formula;
#[macro_use]
mod checks;
mod road;
mod script;
mod training;

#[cfg(feature = "cuda")]
mod cuda;
mod flex;
mod ndarray;
#[cfg(feature = "wgpu")]
mod wgpu;
