//! What is imported from GGUF is a directory that loads.

use fusedkv::checkpoint::gguf::{GgufOptions, import_gguf};
use fusedkv::config::Family;
use tempfile::tempdir;

use crate::gguf::golden;
use crate::{load, parameters};

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
    }
}
