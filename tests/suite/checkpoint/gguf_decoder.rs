//! What is imported from GGUF is a directory that loads.

use burn_ndarray::NdArray;
use fusedkv::WeightFormat;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::gguf::{GgufError, GgufOptions, import_gguf, load_gguf};
use fusedkv::checkpoint::{LoadOptions, LoadedCheckpoint, load_checkpoint};
use fusedkv::config::Family;
use tempfile::tempdir;

use super::gguf::golden;
use super::{load, parameters};

#[test]
fn an_imported_model_is_a_decoder_with_the_files_numbers() {
    for (file, family) in [
        ("llama", Family::Llama),
        ("mistral", Family::Mistral),
        ("qwen2", Family::Qwen2),
        ("qwen3", Family::Qwen3),
        ("gemma2", Family::Gemma2),
        ("gemma3", Family::Gemma3Text),
        ("phi3", Family::Phi3),
        ("smollm3", Family::SmolLm3),
        ("olmo2", Family::Olmo2),
    ] {
        let directory = tempdir().unwrap();
        let path = golden(&format!("{file}.gguf"));
        let imported = import_gguf(path, directory.path(), &GgufOptions::new()).unwrap();
        let model = load(directory.path())
            .unwrap_or_else(|error| panic!("{file}: {error}"))
            .model;
        assert_eq!(model.config().block.family, family, "{file}");
        let numbers = parameters(&model)
            .iter()
            .map(|data| data.num_elements())
            .sum::<usize>();
        assert_eq!(numbers as u64, imported.parameters, "{file}");

        // The same from the file itself.
        let path = golden(&format!("{file}.gguf"));
        for (name, format) in WeightFormat::NAMES {
            let options = LoadOptions::new().with_weights(*format);
            let of_directory =
                load_checkpoint::<Flex>(directory.path(), options.clone(), &FlexDevice).unwrap();
            let of_file = load_gguf::<Flex>(&path, options, &FlexDevice).unwrap();
            assert_eq!(of_file.eos, of_directory.eos, "{file}");
            assert_eq!(
                of_file.model.config(),
                of_directory.model.config(),
                "{file}"
            );
            let text = |loaded: &LoadedCheckpoint<Flex>| {
                let tokenizer = loaded.tokenizer.as_ref()?;
                Some((
                    tokenizer.vocab_size(),
                    tokenizer.encode("the cat sat").unwrap(),
                ))
            };
            assert_eq!(text(&of_file), text(&of_directory), "{file}");
            let found = parameters(&of_file.model);
            if *format == WeightFormat::Int8 {
                // Codes of Q8_0 are those that the file has, to the bit.
                let exact = found
                    .iter()
                    .zip(parameters(&model))
                    .filter(|(a, b)| *a == b);
                let norms = found.iter().filter(|data| data.shape.len() == 1).count();
                assert!(file != "llama" || exact.count() > norms + 1, "{file}");
                continue;
            }
            assert_eq!(found, parameters(&of_directory.model), "{file} as {name}");
        }
    }
}

#[test]
fn a_file_that_cannot_be_loaded_is_named() {
    let options = LoadOptions::new().with_weights(WeightFormat::Bf16);
    let error = load_gguf::<NdArray>(golden("llama.gguf"), options, &Default::default());
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("llama.gguf") && error.contains("bf16"),
        "{error}"
    );
    let error = load_gguf::<Flex>("/nowhere/model.gguf", LoadOptions::new(), &FlexDevice);
    assert!(matches!(error, Err(GgufError::Read { .. })));
}
