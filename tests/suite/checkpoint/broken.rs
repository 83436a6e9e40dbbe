//! Every kind of broken directory is refused by name, and none makes the loader panic.

use std::fs;
use std::path::{Path, PathBuf};

use burn_ndarray::NdArray;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{
    CheckpointError, SaveOptions, WeightDtype, load_checkpoint, save_checkpoint,
};
use fusedkv::tokenizer::{Tokenizer, TokenizerError};
use fusedkv::{KvPlan, TokenBatch, TokensError};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use super::{load, parameters};
use crate::models::{VOCAB, fixed, model};

/// A sound directory to break.
pub struct Checkpoint(TempDir);

impl Checkpoint {
    pub fn new(plan: KvPlan) -> Self {
        Self::with(plan, &SaveOptions::new())
    }

    pub fn with(plan: KvPlan, options: &SaveOptions) -> Self {
        let directory = tempdir().unwrap();
        save_checkpoint(directory.path(), &model::<Flex>(&fixed(plan), 0), options).unwrap();
        Self(directory)
    }

    pub fn fused() -> Self {
        Self::new(KvPlan::FusedKv { storage_layers: 2 })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Edits a JSON file.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) -> &Self {
        let path = self.path(name);
        let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
        self
    }

    pub fn config(&self, key: &str, value: Value) -> &Self {
        self.edit("config.json", |json| json[key] = value)
    }

    /// Edits the header of `model.safetensors`, and its data.
    fn weights(&self, change: impl FnOnce(&mut Value, &mut Vec<u8>)) -> &Self {
        let path = self.path("model.safetensors");
        let (mut header, mut data) = split(&fs::read(&path).unwrap());
        change(&mut header, &mut data);
        fs::write(path, joined(&header, &data)).unwrap();
        self
    }

    /// The error, whose message must name what `says` has.
    pub fn error(&self, says: &[&str]) -> CheckpointError {
        let error = load(self.0.path()).unwrap_err();
        for word in says {
            assert!(
                error.to_string().contains(word),
                "`{error}` without `{word}`"
            );
        }
        error
    }
}

fn split(file: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header = serde_json::from_slice(&file[8..8 + length]).unwrap();
    (header, file[8 + length..].to_vec())
}

fn joined(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// Takes a tensor out of a header and its numbers out of the data.
fn take(header: &mut Value, data: &mut Vec<u8>, tensor: &str) {
    let entry = header.as_object_mut().unwrap().remove(tensor).unwrap();
    let offset = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
    let (start, end) = (offset(0), offset(1));
    data.drain(start..end);
    for (name, entry) in header.as_object_mut().unwrap() {
        if name == "__metadata__" || entry["data_offsets"][0].as_u64().unwrap() < end as u64 {
            continue;
        }
        for i in 0..2 {
            let moved = entry["data_offsets"][i].as_u64().unwrap() as usize - (end - start);
            entry["data_offsets"][i] = json!(moved);
        }
    }
}

/// Appends a tensor of zeros.
fn add(
    header: &mut Value,
    data: &mut Vec<u8>,
    tensor: &str,
    dtype: &str,
    bytes: usize,
    shape: &[usize],
) {
    let end = data.len() + bytes;
    header[tensor] = json!({ "dtype": dtype, "shape": shape, "data_offsets": [data.len(), end] });
    data.resize(end, 0);
}

const KEY_WEIGHT: &str = "model.layers.3.self_attn.kv_fusion.key_weight";

#[test]
fn files_that_are_not_there() {
    let c = Checkpoint::fused();
    fs::remove_file(c.path("model.safetensors")).unwrap();
    let error = c.error(&["model.safetensors", "model.safetensors.index.json"]);
    assert!(
        matches!(error, CheckpointError::MissingFile { .. }),
        "{error}"
    );
    fs::remove_file(c.path("config.json")).unwrap();
    let error = c.error(&["it has no config.json"]);
    assert!(
        matches!(error, CheckpointError::MissingFile { .. }),
        "{error}"
    );
    let error = load(Path::new("/nowhere")).unwrap_err();
    assert!(
        matches!(error, CheckpointError::MissingFile { .. }),
        "{error}"
    );
}

#[test]
fn a_missing_tensor() {
    for tensor in [
        "model.norm.weight",
        "model.layers.1.self_attn.k_norm.weight",
        KEY_WEIGHT,
    ] {
        let c = Checkpoint::fused();
        c.weights(|header, data| take(header, data, tensor));
        let error = c.error(&["model.safetensors", tensor]);
        assert!(
            matches!(error, CheckpointError::MissingTensor { .. }),
            "{error}"
        );
    }
}

#[test]
fn an_unexpected_tensor() {
    for tensor in [
        "model.layers.3.self_attn.k_proj.weight",
        "model.layers.4.mlp.up_proj.weight",
    ] {
        let c = Checkpoint::fused();
        c.weights(|header, data| add(header, data, tensor, "F32", 4, &[1]));
        let error = c.error(&["model.safetensors", tensor]);
        assert!(
            matches!(error, CheckpointError::UnexpectedTensor { .. }),
            "{error}"
        );
    }
}

#[test]
fn frequencies_of_rope_are_not_read() {
    let c = Checkpoint::fused();
    let expected = parameters(&load(c.0.path()).unwrap().model);
    c.weights(|header, data| {
        for layer in 0..4 {
            let tensor = format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq");
            add(header, data, &tensor, "F32", 12, &[3]);
        }
        add(header, data, "model.rotary_emb.inv_freq", "F32", 12, &[3]);
    });
    assert_eq!(parameters(&load(c.0.path()).unwrap().model), expected);
}

#[test]
fn a_wrong_shape() {
    let c = Checkpoint::fused();
    c.weights(|header, _| header[KEY_WEIGHT]["shape"] = json!([2, 6]));
    let error = c.error(&["model.safetensors", KEY_WEIGHT, "[2, 6]", "[2, 2, 3]"]);
    assert!(matches!(error, CheckpointError::Shape { .. }), "{error}");
    // The same number of elements the other way round.
    let c = Checkpoint::fused();
    let tensor = "model.layers.0.mlp.up_proj.weight";
    c.weights(|header, _| header[tensor]["shape"] = json!([12, 10]));
    let error = c.error(&[tensor, "[12, 10]", "[10, 12]"]);
    assert!(matches!(error, CheckpointError::Shape { .. }), "{error}");
}

#[test]
fn a_wrong_dtype() {
    for (dtype, known) in [("I32", true), ("F64", true), ("F9", false)] {
        let c = Checkpoint::fused();
        c.weights(|header, data| {
            take(header, data, KEY_WEIGHT);
            let bytes = if dtype == "F64" { 96 } else { 48 };
            add(header, data, KEY_WEIGHT, dtype, bytes, &[2, 2, 3]);
        });
        let error = c.error(&["model.safetensors", KEY_WEIGHT, dtype]);
        match known {
            true => assert!(matches!(error, CheckpointError::Dtype { .. }), "{error}"),
            false => assert!(matches!(error, CheckpointError::Entry { .. }), "{error}"),
        }
    }
}

#[test]
fn a_truncated_file() {
    let c = Checkpoint::fused();
    let path = c.path("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for end in [0, 7, 8, header - 1] {
        fs::write(&path, &whole[..end]).unwrap();
        let error = c.error(&["model.safetensors", "truncated"]);
        assert!(
            matches!(error, CheckpointError::HeaderLength { .. }),
            "{error}"
        );
    }
    for end in [header, header + 100, whole.len() - 1] {
        fs::write(&path, &whole[..end]).unwrap();
        let error = c.error(&["model.safetensors", "is truncated", "`model."]);
        assert!(
            matches!(error, CheckpointError::Truncated { .. }),
            "{error}"
        );
    }
    let mut longer = whole;
    longer.push(0);
    fs::write(&path, longer).unwrap();
    let error = c.error(&["model.safetensors"]);
    assert!(
        matches!(error, CheckpointError::TrailingBytes { .. }),
        "{error}"
    );
}

/// None of these can be allowed to allocate what it says.
#[test]
fn a_header_that_lies_about_sizes() {
    let huge = u64::MAX / 16;
    for (entry, says) in [
        (json!({ "shape": [huge, 2, 3] }), "bytes"),
        (json!({ "shape": [huge, huge, huge] }), "more than can be"),
        (json!({ "data_offsets": [0, huge] }), "bytes"),
        (
            json!({ "shape": [1_u64 << 40], "data_offsets": [0, 1_u64 << 42] }),
            "is truncated",
        ),
        (json!({ "data_offsets": [48, 0] }), "before its start"),
        (json!({ "data_offsets": [0, 48] }), "starts at byte"),
        (json!({ "shape": [-1] }), "expected usize"),
        (json!({ "shape": "many" }), "expected a sequence"),
    ] {
        let c = Checkpoint::fused();
        c.weights(|header, _| {
            for (key, value) in entry.as_object().unwrap() {
                header[KEY_WEIGHT][key] = value.clone();
            }
        });
        let error = c.error(&["model.safetensors", says]);
        assert!(
            matches!(
                error,
                CheckpointError::Entry { .. } | CheckpointError::Truncated { .. }
            ),
            "{entry}: {error}"
        );
    }
    let c = Checkpoint::fused();
    let path = c.path("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    for length in [file.len() as u64 - 7, 1 << 40, u64::MAX] {
        file[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(&path, &file).unwrap();
        let error = c.error(&["model.safetensors", &length.to_string()]);
        assert!(
            matches!(error, CheckpointError::HeaderLength { .. }),
            "{error}"
        );
    }
    fs::write(&path, joined(&json!([1, 2]), &[])).unwrap();
    let error = c.error(&["model.safetensors", "header"]);
    assert!(matches!(error, CheckpointError::Header { .. }), "{error}");
}

#[test]
fn broken_shards() {
    let sharded = || {
        let options = SaveOptions::new().with_shard_bytes(2000);
        Checkpoint::with(KvPlan::Cla { factor: 2 }, &options)
    };
    let index = "model.safetensors.index.json";
    let tensor = "model.norm.weight";
    let c = sharded();
    let map = |shard: Value| move |json: &mut Value| json["weight_map"][tensor] = shard;
    for shard in [
        "missing.safetensors",
        "../model.safetensors",
        "/etc/passwd",
        "",
        ".",
    ] {
        let c = sharded();
        let error = c
            .edit(index, map(json!(shard)))
            .error(&[index, tensor, shard]);
        assert!(matches!(error, CheckpointError::Shard { .. }), "{error}");
    }
    // Said to be in the shard of another tensor, the first.
    c.edit(index, |json| {
        json["weight_map"][tensor] = json["weight_map"]["model.embed_tokens.weight"].clone();
    });
    let error = c.error(&[index, tensor, "does not have it"]);
    assert!(matches!(error, CheckpointError::Shard { .. }), "{error}");
    // In a shard, but not in the index.
    let c = sharded();
    c.edit(index, |json| {
        json["weight_map"].as_object_mut().unwrap().remove(tensor);
    });
    let error = c.error(&[tensor]);
    assert!(
        matches!(
            error,
            CheckpointError::UnexpectedTensor { .. } | CheckpointError::MissingTensor { .. }
        ),
        "{error}"
    );
    for (map, found) in [
        (json!(null), "null"),
        (json!([]), "[]"),
        (json!({ "a": 1 }), "1"),
    ] {
        let c = sharded();
        let error = c
            .edit(index, |json| json["weight_map"] = map)
            .error(&[index, found]);
        assert!(matches!(error, CheckpointError::Setting { .. }), "{error}");
    }
    let c = sharded();
    fs::write(c.path(index), "{").unwrap();
    let error = c.error(&[index]);
    assert!(matches!(error, CheckpointError::Json { .. }), "{error}");
}

#[test]
fn numbers_too_large_and_dtypes_a_backend_does_not_have() {
    let c = Checkpoint::fused();
    c.weights(|_, data| data[..4].copy_from_slice(&1e6_f32.to_le_bytes()));
    let error = load_checkpoint::<Flex>(c.0.path(), WeightDtype::F16, &Default::default());
    let error = error.unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Overflow { tensor, .. }
            if tensor == "model.embed_tokens.weight"),
        "{error}"
    );
    let error = load_checkpoint::<NdArray>(c.0.path(), WeightDtype::Bf16, &Default::default());
    let error = error.unwrap_err();
    assert!(
        matches!(
            error,
            CheckpointError::UnsupportedDtype {
                dtype: WeightDtype::Bf16,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn tokenizers_that_do_not_fit() {
    let c = Checkpoint::fused();
    fs::write(c.path("tokenizer.json"), "{}").unwrap();
    let error = c.error(&["tokenizer.json"]);
    assert!(
        matches!(
            error,
            CheckpointError::Tokenizer(TokenizerError::Unreadable { .. })
        ),
        "{error}"
    );
    let tokenizer = Tokenizer::train_bpe("", 257).unwrap();
    tokenizer.save(c.path("tokenizer.json")).unwrap();
    let error = c.error(&["257", "11"]);
    assert!(
        matches!(error, CheckpointError::Vocabulary { .. }),
        "{error}"
    );
    // By one token, whatever is added.
    fs::write(c.path("tokenizer.json"), letters(VOCAB + 1).to_string()).unwrap();
    let error = c.error(&["12", "11"]);
    assert!(
        matches!(error, CheckpointError::Vocabulary { .. }),
        "{error}"
    );
}

/// A tokenizer of the first letters, and of one added token.
fn letters(n: usize) -> Value {
    let ids: serde_json::Map<_, _> = ('a'..='z')
        .take(n)
        .enumerate()
        .map(|(id, letter)| (letter.to_string(), json!(id)))
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": n, "content": "<pad>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false,
        }],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": null,
        "model": { "type": "BPE", "vocab": ids, "merges": [] },
    })
}

#[test]
fn added_tokens_beyond_the_vocabulary_are_refused_where_they_are_read() {
    let c = Checkpoint::fused();
    fs::write(c.path("tokenizer.json"), letters(VOCAB).to_string()).unwrap();
    let loaded = load(c.0.path()).unwrap();
    let tokenizer = loaded.tokenizer.unwrap();
    assert_eq!(tokenizer.vocab_size(), VOCAB + 1);
    let batch = |text: &str| {
        let row = tokenizer.encode(text).unwrap();
        TokenBatch::<Flex>::from_rows(&[row], loaded.model.config().vocab_size, &FlexDevice)
    };
    assert_eq!(batch("abk").unwrap().dims(), [1, 3]);
    let unknown = TokensError::OutOfVocabulary {
        row: 0,
        position: 2,
        token: VOCAB as u32,
        vocab_size: VOCAB,
    };
    assert_eq!(batch("ab<pad>").unwrap_err(), unknown);
    // It is kept where the model is saved.
    let options = SaveOptions::new().with_tokenizer(tokenizer);
    save_checkpoint(c.0.path(), &loaded.model, &options).unwrap();
    load(c.0.path()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever a header, an index or a configuration becomes, loading ends, and not in a panic.
    #[test]
    fn no_bytes_make_it_panic(
        file in 0usize..3,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let options = SaveOptions::new().with_shard_bytes(if file == 1 { 2000 } else { 1 << 20 });
        let c = Checkpoint::with(KvPlan::FusedKv { storage_layers: 2 }, &options);
        let path = c.path(["model.safetensors", "model.safetensors.index.json", "config.json"][file]);
        let mut bytes = fs::read(&path).unwrap();
        // The numbers may be anything; what is before them is what is looked at.
        let looked_at = match file {
            0 => 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize,
            _ => bytes.len(),
        };
        for (index, bit) in flips {
            bytes[index.index(looked_at)] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, bytes).unwrap();
        if let Err(error) = load(c.0.path()) {
            prop_assert!(error.to_string().contains(&*c.0.path().to_string_lossy()), "{}", error);
        }
    }
}
