//! Directories that tests/reference/checkpoints.py has written, and the logits it computes.

use std::fs;
use std::path::Path;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{WeightDtype, load_checkpoint};
use fusedkv::{Logits, TokenBatch};
use serde_json::Value;

use crate::models::{F64, difference};

fn agrees<B: Backend>(name: &str, dtype: WeightDtype, tolerance: f64) {
    let device = B::Device::default();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints");
    let directory = directory.join(name);
    let loaded = load_checkpoint::<B>(&directory, dtype, &device).unwrap();
    assert_eq!(loaded.eos, [3, 5]);
    assert!(loaded.tokenizer.is_none());
    let model = loaded.model;

    let case: Value =
        serde_json::from_slice(&fs::read(directory.join("logits.json")).unwrap()).unwrap();
    let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
    let expected: Vec<Vec<f64>> = serde_json::from_value(case["logits"].clone()).unwrap();
    let dims = [1, expected.len(), expected[0].len()];
    let expected: Vec<f64> = expected.into_iter().flatten().collect();
    let expected =
        Tensor::<F64, 3>::from_data(TensorData::new(expected, dims), &Default::default());

    let batch = || TokenBatch::<B>::from_rows(&[&tokens], dims[2], &device).unwrap();
    let mut cache = model.new_cache(1, tokens.len()).unwrap();
    for logits in [
        model.forward(batch()).unwrap(),
        model
            .forward_cached(batch(), &mut cache, Logits::All)
            .unwrap(),
    ] {
        let found: Vec<f64> = logits.into_data().iter().collect();
        let found = Tensor::<F64, 3>::from_data(TensorData::new(found, dims), &Default::default());
        let difference = difference(&found, &expected);
        assert!(difference < tolerance, "{name}: {difference}");
    }
}

macro_rules! golden {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            agrees::<Flex>(stringify!($name), WeightDtype::F32, 1e-5);
            agrees::<burn_ndarray::NdArray>(stringify!($name), WeightDtype::F32, 1e-5);
        }
    )*};
}

golden!(
    standard,
    standard_shards,
    fused_kv,
    fused_kv_shards,
    fused_kv_lite,
    fused_kv_lite_learnable,
    fused_kv_lite_reversed,
    yoco,
    yoco_plus_plus,
    cla,
    dense_fusion,
    custom,
    apart,
);

/// In half precision the decoder computes what it does in single, to the precision of the numbers.
#[test]
fn half_precision_is_close() {
    for name in ["standard", "fused_kv", "yoco_plus_plus", "custom", "apart"] {
        agrees::<Flex>(name, WeightDtype::F16, 1e-2);
        agrees::<Flex>(name, WeightDtype::Bf16, 8e-2);
    }
}

#[test]
fn a_directory_without_its_unknown_keys_is_the_same() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints/custom");
    let loaded = load_checkpoint::<Flex>(&directory, WeightDtype::F32, &FlexDevice).unwrap();
    let saved = tempfile::tempdir().unwrap();
    fusedkv::checkpoint::save_checkpoint(
        saved.path(),
        &loaded.model,
        &fusedkv::checkpoint::SaveOptions::new(),
    )
    .unwrap();
    let again = load_checkpoint::<Flex>(saved.path(), WeightDtype::F32, &FlexDevice).unwrap();
    assert_eq!(again.model.config(), loaded.model.config());
    assert_eq!(
        super::parameters(&again.model),
        super::parameters(&loaded.model)
    );
}
