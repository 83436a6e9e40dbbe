//! What loading takes of memory, counted at the allocator. One test alone: others would be counted.

#[path = "../benches/memory/mod.rs"]
mod memory;

use burn::tensor::TensorData;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{
    LoadOptions, SaveOptions, WeightDtype, load_checkpoint, save_checkpoint,
};
use fusedkv::{FusedKvDecoder, FusedKvDecoderConfig, KvPlan, WeightFormat};
use memory::PeakMemory;
use tempfile::tempdir;

#[global_allocator]
static ALLOCATOR: memory::Allocator = memory::Allocator;

/// Of 34 million parameters, half of them in an embedding that is the head as well.
fn config() -> FusedKvDecoderConfig {
    FusedKvDecoderConfig::new(32_768, KvPlan::Standard)
        .with_hidden_size(512)
        .with_n_layers(6)
        .with_n_heads(8)
        .with_n_kv_heads(2)
        .with_head_dim(64)
        .with_ffn_size(1300)
        .with_max_positions(1 << 20)
        .with_tie_embeddings(true)
}

/// Matrices of all kinds, one of them not of whole squares or groups.
fn some(model: &FusedKvDecoder<Flex>) -> Vec<TensorData> {
    let names = [
        "model.embed_tokens.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    ];
    let numbers = names.map(|name| model.parameter::<2>(name).unwrap().into_data());
    numbers.to_vec()
}

#[test]
fn there_is_no_second_copy_of_the_weights() {
    // Each thread has a buffer of its own.
    let threads = rayon::ThreadPoolBuilder::new().num_threads(2);
    threads.build_global().unwrap();
    let memory = PeakMemory::start();
    let model = config().init::<Flex>(&FlexDevice).unwrap();
    // Neither weights nor angles of all positions.
    assert!(
        memory.peak() < 1 << 18,
        "{} bytes to begin with",
        memory.peak()
    );

    let directory = tempdir().unwrap();
    let [f32, bf16, int8] = ["f32", "bf16", "int8"].map(|name| directory.path().join(name));
    let options = SaveOptions::new();
    save_checkpoint(&f32, &model, &options).unwrap();
    save_checkpoint(
        &bf16,
        &model,
        &options.clone().with_dtype(WeightDtype::Bf16),
    )
    .unwrap();
    let packed = model.clone().with_weights(WeightFormat::Int8).unwrap();
    save_checkpoint(&int8, &packed, &options).unwrap();
    drop(packed);
    for files in [&f32, &bf16, &int8] {
        for (name, format) in WeightFormat::NAMES {
            let options = LoadOptions::new().with_weights(*format);
            let memory = PeakMemory::start();
            let loaded = load_checkpoint::<Flex>(files, options, &FlexDevice).unwrap();
            let times = memory.peak() as f64 / loaded.model.weight_bytes() as f64;
            println!("{} as {name}: {times:.3} of the weights", files.display());
            assert!(
                (1.0..1.15).contains(&times),
                "{} as {name}: {times}",
                files.display()
            );
            if files == &f32 {
                // And of many pieces, that each is in its place.
                let expected = model.clone().with_weights(*format).unwrap();
                assert!(some(&loaded.model) == some(&expected), "as {name}");
            }
        }
    }
}
