//! Matrices in fewer bits in files.

use std::fs;
use std::path::Path;

use burn::tensor::Tensor;
use burn_ndarray::NdArray;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::gguf::{GgufOptions, import_gguf};
use fusedkv::checkpoint::{
    CheckpointError, LoadOptions, SaveOptions, WeightDtype, load_checkpoint, save_checkpoint,
};
use fusedkv::{FusedKvDecoder, KvPlan, TokenBatch, WeightError, WeightFormat};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use tempfile::tempdir;

use super::gguf::golden;
use super::{load, parameters};
use crate::models::{any_case, changed, fixed, model, off, values};

const FORMATS: [WeightFormat; 4] = [
    WeightFormat::F16,
    WeightFormat::Bf16,
    WeightFormat::Int8,
    WeightFormat::Int4,
];

fn logits(model: &FusedKvDecoder<Flex>, rows: &[Vec<u32>]) -> Vec<f64> {
    let batch = TokenBatch::from_rows(rows, model.config().vocab_size, &FlexDevice).unwrap();
    values(&model.forward(batch).unwrap())
}

fn load_as(path: &Path, weights: WeightFormat) -> Result<FusedKvDecoder<Flex>, CheckpointError> {
    let options = LoadOptions::new().with_weights(weights);
    Ok(load_checkpoint::<Flex>(path, options, &FlexDevice)?.model)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What is packed while it is read is what is packed in memory, whatever the files have; what is
    /// saved is read as it was.
    #[test]
    fn a_directory_in_any_format(
        mut case in any_case(1..6),
        format in prop::sample::select(FORMATS.to_vec()),
        shard_bytes in 500u64..9000,
    ) {
        case.config.block = Default::default();
        let directory = tempdir().unwrap();
        let [floats, packed] = ["floats", "packed"].map(|name| directory.path().join(name));
        let options = SaveOptions::new().with_shard_bytes(shard_bytes);
        let original = case.model::<Flex>();
        save_checkpoint(&floats, &original, &options).unwrap();
        let expected = original.with_weights(format).unwrap();
        let loaded = load_as(&floats, format).unwrap();
        let of = |model: &FusedKvDecoder<Flex>| logits(model, &case.tokens);
        prop_assert_eq!(of(&loaded), of(&expected));
        prop_assert_eq!(loaded.weight_bytes(), expected.weight_bytes());

        let saved = save_checkpoint(&packed, &loaded, &options);
        if format == WeightFormat::Int4 {
            let refused = matches!(saved, Err(CheckpointError::WeightFormat { format: WeightFormat::Int4, .. }));
            prop_assert!(refused && !packed.exists());
            let options = options.with_dtype(WeightDtype::F32);
            save_checkpoint(&packed, &loaded, &options).unwrap();
            let read = load(&packed).unwrap().model;
            prop_assert_eq!(parameters(&read), parameters(&loaded));
            return Ok(());
        }
        saved.unwrap();
        // As it is, from there into memory, and to disk again.
        let again = load_as(&packed, format).unwrap();
        prop_assert_eq!(of(&again), of(&expected));
        prop_assert_eq!(parameters(&again), parameters(&loaded));
        // As floats of the same numbers, on any backend.
        let wide = load_checkpoint::<NdArray>(&packed, WeightDtype::F32, &Default::default());
        let numbers = parameters(&loaded).into_iter().map(|data| data.convert::<f32>());
        let wide = parameters(&wide.unwrap().model);
        prop_assert_eq!(wide, numbers.collect::<Vec<_>>());
        // In yet another format.
        for other in FORMATS {
            load_as(&packed, other).unwrap();
        }
    }
}

/// 8-bit codes, a file of them by its bytes.
#[test]
fn codes_and_scales_have_their_names() {
    let directory = tempdir().unwrap();
    let config = fixed(KvPlan::FusedKv { storage_layers: 2 });
    let floats = model::<Flex>(&config, 2);
    let packed = floats.clone().with_weights(WeightFormat::Int8).unwrap();
    save_checkpoint(directory.path(), &packed, &SaveOptions::new()).unwrap();
    let json = fs::read(directory.path().join("config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["weight_format"], "int8_g32");
    let file = fs::read(directory.path().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let (codes, scales) = (
        file.tensor(&format!("{name}.q8")).unwrap(),
        file.tensor(&format!("{name}.scale")).unwrap(),
    );
    assert!(file.tensor(name).is_err());
    let (hidden, ffn) = (config.hidden_size, config.ffn_size);
    assert_eq!(
        (codes.dtype(), codes.shape()),
        (Dtype::I8, &[hidden, ffn][..])
    );
    assert_eq!(
        (scales.dtype(), scales.shape()),
        (Dtype::F16, &[hidden, 1][..])
    );
    let weight = floats.parameter::<2>(name).unwrap().transpose();
    let weight: Vec<f32> = weight.into_data().iter().collect();
    for (row, weight) in weight.chunks(ffn).enumerate() {
        let scale = &scales.data()[2 * row..][..2];
        let scale = burn::tensor::f16::from_le_bytes([scale[0], scale[1]]).to_f32();
        for (code, x) in codes.data()[row * ffn..][..ffn].iter().zip(weight) {
            let found = f32::from(*code as i8) * scale;
            assert!((found - x).abs() <= scale * 0.51, "{found} {x}");
        }
    }
    // Norms and the weights of blends stay floats.
    for name in [
        "model.norm.weight",
        "model.layers.3.self_attn.kv_fusion.key_weight",
    ] {
        assert_eq!(file.tensor(name).unwrap().dtype(), Dtype::F32);
    }
}

/// The codes of a file of Q8_0 are taken over: to the bit.
#[test]
fn q8_0_is_int8() {
    let directory = tempdir().unwrap();
    let [wide, int8] = ["wide", "int8"].map(|name| directory.path().join(name));
    let path = golden("llama.gguf");
    import_gguf(&path, &wide, &GgufOptions::new()).unwrap();
    let options = GgufOptions::new().with_weights(WeightFormat::Int8);
    import_gguf(&path, &int8, &options).unwrap();
    let (wide, codes) = (load(&wide).unwrap().model, load(&int8).unwrap().model);
    let mut exact = 0;
    for (wide, codes) in parameters(&wide).iter().zip(parameters(&codes)) {
        let [wide, codes] = [wide, &codes].map(|data| data.iter::<f32>().collect::<Vec<_>>());
        exact += usize::from(wide == codes);
    }
    // The norms, and every tensor that the file has in this format.
    let norms = 2 * wide.config().n_layers + 1;
    assert!(exact > norms, "{exact} {norms}");
    let packed = load_as(&int8, WeightFormat::Int8).unwrap();
    let tokens = [vec![1, 5, 3]];
    assert!(off(&logits(&packed, &tokens), &logits(&codes, &tokens)) < 1e-5);
    let options = GgufOptions::new().with_weights(WeightFormat::Int4);
    let error = import_gguf(&path, directory.path().join("int4"), &options).unwrap_err();
    assert!(error.to_string().contains("int4"), "{error}");
}

#[test]
fn broken_codes_are_named() {
    let directory = tempdir().unwrap();
    let path = directory.path();
    let packed = model::<Flex>(&fixed(KvPlan::Standard), 2).with_weights(WeightFormat::Int8);
    save_checkpoint(path, &packed.unwrap(), &SaveOptions::new()).unwrap();
    let whole = fs::read(path.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&whole).unwrap();
    let name = "model.layers.2.mlp.up_proj.weight";
    let (codes, scale) = (format!("{name}.q8"), format!("{name}.scale"));
    type Raw = (Dtype, Vec<usize>, Vec<u8>);
    let with = |change: &dyn Fn(&str, TensorView<'_>) -> Option<Raw>| {
        let kept = tensors.tensors().into_iter().filter_map(|(name, view)| {
            let (dtype, shape, data) = change(&name, view)?;
            Some((name, dtype, shape, data))
        });
        let kept: Vec<_> = kept.collect();
        let views = kept.iter().map(|(name, dtype, shape, data)| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        serialize_to_file(views, None, &path.join("model.safetensors")).unwrap();
        load(path).unwrap_err()
    };
    let same = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    let error = with(&|name, view| (name != scale).then(|| same(view)));
    assert!(
        matches!(&error, CheckpointError::MissingTensor { tensor, .. } if *tensor == scale),
        "{error}"
    );
    let error = with(&|name, view| {
        let (dtype, shape, data) = same(view);
        Some((if name == codes { Dtype::U8 } else { dtype }, shape, data))
    });
    assert!(
        matches!(&error, CheckpointError::Dtype { tensor, found, .. } if *tensor == codes && found == "U8"),
        "{error}"
    );
    let error = with(&|name, view| {
        let (dtype, mut shape, data) = same(view);
        if name == scale {
            shape.reverse();
        }
        Some((dtype, shape, data))
    });
    assert!(
        matches!(&error, CheckpointError::Shape { tensor, .. } if *tensor == scale),
        "{error}"
    );
    fs::write(path.join("model.safetensors"), &whole).unwrap();
    let config = fs::read_to_string(path.join("config.json")).unwrap();
    fs::write(
        path.join("config.json"),
        config.replace("int8_g32", "int8_g64"),
    )
    .unwrap();
    let error = load(path).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Setting { key, found, .. } if key == "weight_format" && found.contains("int8_g64")),
        "{error}"
    );
}

#[test]
fn what_cannot_be_packed_is_refused_before_anything_is_read() {
    let directory = tempdir().unwrap();
    let floats = model::<Flex>(&fixed(KvPlan::Standard), 2);
    save_checkpoint(directory.path(), &floats, &SaveOptions::new()).unwrap();
    let options = LoadOptions::new().with_weights(WeightFormat::Bf16);
    let error = load_checkpoint::<NdArray>(directory.path(), options, &Default::default());
    assert!(matches!(
        error.unwrap_err(),
        CheckpointError::Weight {
            source: WeightError::Unsupported {
                format: WeightFormat::Bf16,
                ..
            },
            ..
        }
    ));
    let up = "model.layers.1.mlp.up_proj.weight";
    let large = |weight: Tensor<Flex, 2>| weight.zeros_like() + 1e7;
    let large = changed(floats, up, large);
    save_checkpoint(directory.path(), &large, &SaveOptions::new()).unwrap();
    let error = load_as(directory.path(), WeightFormat::Int8).unwrap_err();
    assert!(
        matches!(
            &error,
            CheckpointError::Weight { source: WeightError::Overflow { tensor, value: 1e7, .. }, .. }
                if tensor == "model.layers.1.mlp.up_proj.weight"
        ),
        "{error}"
    );
    let error = load_as(directory.path(), WeightFormat::F16).unwrap_err();
    assert!(matches!(error, CheckpointError::Overflow { .. }), "{error}");
}
