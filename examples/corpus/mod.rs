//! The text `train_tiny` trains on by default: this crate.

/// Joins files of this repository.
macro_rules! files {
    ($($path:literal),* $(,)?) => {
        &[$(include_str!(concat!("../../", $path))),*]
    };
}

/// The crate's own docs and sources; the last of them are held out for validation.
const FILES: &[&str] = files![
    "README.md",
    "docs/method.md",
    "docs/architecture.md",
    "src/lib.rs",
    "src/plan.rs",
    "src/config.rs",
    "src/cost.rs",
    "src/decoder/mod.rs",
    "src/decoder/layer.rs",
    "src/decoder/attention.rs",
    "src/decoder/attend.rs",
    "src/decoder/fusion.rs",
    "src/decoder/kv.rs",
    "src/decoder/rope.rs",
    "src/tokens.rs",
    "src/backend.rs",
    "src/generate/mod.rs",
    "src/generate/sampling.rs",
    "src/error.rs",
    "src/train/mod.rs",
    "src/train/run.rs",
    "src/train/config.rs",
    "src/train/data.rs",
    "src/train/step.rs",
    "src/train/metrics.rs",
    "src/train/optimizer.rs",
    "src/train/checkpoint.rs",
    "src/train/progress.rs",
    "src/tokenizer.rs",
    "src/file.rs",
    "src/checkpoint/mod.rs",
    "src/checkpoint/config.rs",
    "src/checkpoint/directory.rs",
    "src/checkpoint/load.rs",
    "src/checkpoint/names.rs",
    "src/checkpoint/safetensors.rs",
    "src/checkpoint/save.rs",
    "src/checkpoint/weights.rs",
    "src/score.rs",
    "src/train/error.rs",
    "examples/train_tiny.rs",
    "examples/generate.rs",
    "src/cache.rs",
];

/// All files, one after the other.
pub fn default_text() -> String {
    FILES.join("\n")
}
