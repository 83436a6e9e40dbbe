//! What is imported from GGUF is a directory that loads.

use fusedkv::checkpoint::gguf::{GgufOptions, import_gguf};
use tempfile::tempdir;

use crate::gguf::golden;
use crate::{load, parameters};

#[test]
fn an_imported_model_is_a_decoder_with_the_files_numbers() {
    let directory = tempdir().unwrap();
    let path = golden("qwen3.gguf");
    let imported = import_gguf(path, directory.path(), &GgufOptions::new()).unwrap();
    assert_eq!(imported.model_type, "qwen3");
    let model = load(directory.path()).unwrap().model;
    let config = model.config();
    assert_eq!((config.n_layers, config.head_dim), (2, 6));
    let numbers: usize = parameters(&model)
        .iter()
        .map(|data| data.num_elements())
        .sum();
    assert_eq!(numbers as u64, imported.parameters);
}
