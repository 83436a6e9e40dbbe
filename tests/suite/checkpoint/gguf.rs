//! GGUF files: what tests/reference/gguf_golden.py has written becomes what it says, and every kind of
//! broken file is refused by name.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::f16;
use fusedkv::checkpoint::gguf::{
    GgufArray, GgufError, GgufFile, GgufOptions, GgufValue, import_gguf,
};
use fusedkv::checkpoint::{CheckpointError, WeightDtype};
use fusedkv::tokenizer::Tokenizer;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::{TempDir, tempdir};

pub fn golden(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden/gguf").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The tensors of a safetensors file: dtype, shape, bytes.
fn tensors(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let of = (
            view.dtype().to_string(),
            view.shape().to_vec(),
            view.data().to_vec(),
        );
        (name, of)
    };
    file.tensors().into_iter().map(tensor).collect()
}

fn imported(name: &str) -> TempDir {
    let directory = tempdir().unwrap();
    let path = golden(&format!("{name}.gguf"));
    import_gguf(path, directory.path(), &GgufOptions::new()).unwrap();
    directory
}

const FAMILIES: [&str; 10] = [
    "llama",
    "llama_biases",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
];

#[test]
fn every_format_is_widened_to_the_bits_that_python_has() {
    let file = GgufFile::open(golden("formats.gguf")).unwrap();
    let expected = tensors(&golden("formats.safetensors"));
    assert_eq!(expected.len(), 11);
    for (name, (_, shape, bytes)) in expected {
        let tensor = &file.tensors()[&name];
        assert_eq!((tensor.format(), tensor.shape()), (&*name, &*shape));
        let numbers = file.numbers(&name).unwrap();
        let found: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(found, bytes, "{name}");
    }
}

#[test]
fn every_type_of_value_is_read() {
    let file = GgufFile::open(golden("formats.gguf")).unwrap();
    let value = |name: &str| file.metadata()[&format!("value.{name}")].clone();
    let values = [
        ("u8", GgufValue::Unsigned(200)),
        ("i8", GgufValue::Signed(-100)),
        ("u16", GgufValue::Unsigned(60000)),
        ("i16", GgufValue::Signed(-30000)),
        ("u32", GgufValue::Unsigned(4_000_000_000)),
        ("i32", GgufValue::Signed(-2_000_000_000)),
        ("f32", GgufValue::Float(0.5)),
        ("bool", GgufValue::Bool(true)),
        ("text", GgufValue::Text("é".into())),
        ("u64", GgufValue::Unsigned(1 << 60)),
        ("i64", GgufValue::Signed(-(1 << 60))),
        ("f64", GgufValue::Float(0.1)),
    ];
    for (name, expected) in values {
        assert_eq!(value(name), expected, "{name}");
    }
    let GgufValue::Array(GgufArray::Numbers(numbers)) = value("numbers") else {
        panic!("no numbers");
    };
    let numbers: Vec<_> = numbers.iter().map(|number| number.as_number()).collect();
    assert_eq!(numbers, [Some(1.0), Some(-2.0), Some(3.0)]);
    let texts = ["a", "", "é"].map(str::to_owned).to_vec();
    assert_eq!(value("texts"), GgufValue::Array(GgufArray::Texts(texts)));
}

#[test]
fn tensors_become_those_of_the_family() {
    for name in FAMILIES {
        let directory = imported(name);
        let found = tensors(&directory.path().join("model.safetensors"));
        let expected = tensors(&golden(&format!("{name}.safetensors")));
        let names = |tensors: &BTreeMap<String, _>| tensors.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected), "{name}");
        for (tensor, expected) in expected {
            assert!(found[&tensor] == expected, "{tensor} of {name}");
        }
    }
}

#[test]
fn keys_become_those_of_the_family() {
    for name in FAMILIES {
        let directory = imported(name);
        let found = json(&directory.path().join("config.json"));
        let expected = json(&golden(&format!("{name}.json")));
        for (key, expected) in expected.as_object().unwrap() {
            assert_eq!(&found[key], expected, "{key} of {name}");
        }
    }
}

#[test]
fn texts_become_the_tokens_of_the_reference() {
    let expected = json(&golden("tokens.json"));
    for name in ["llama", "gemma3"] {
        let directory = imported(name);
        let path = directory.path().join("tokenizer.json");
        let tokenizer = tokenizers::Tokenizer::from_file(path).unwrap();
        for (text, ids) in expected["texts"]
            .as_array()
            .unwrap()
            .iter()
            .zip(expected[name].as_array().unwrap())
        {
            let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            let found = tokenizer.encode(text.as_str().unwrap(), true).unwrap();
            assert_eq!(found.get_ids(), ids, "{text} by {name}");
        }
    }
}

#[test]
fn the_template_and_the_tokens_that_end_a_text_come_along() {
    let directory = imported("llama");
    let config = json(&directory.path().join("tokenizer_config.json"));
    assert_eq!(config["bos_token"], "<|end|>");
    assert_eq!(config["eos_token"], "<|stop|>");
    assert_eq!(config["add_bos_token"], false);
    assert!(
        config["chat_template"]
            .as_str()
            .unwrap()
            .contains("<|end|>")
    );
    // The one the file names, and the one its template ends a turn with.
    let generation = json(&directory.path().join("generation_config.json"));
    assert_eq!(generation["eos_token_id"], serde_json::json!([1, 0]));
    let tokenizer = Tokenizer::load(directory.path().join("tokenizer.json")).unwrap();
    assert_eq!(
        tokenizer.decode(&[43, 51, 2, 0]).unwrap(),
        "the cat<tool><|end|>"
    );

    let directory = imported("gemma3");
    let config = json(&directory.path().join("tokenizer_config.json"));
    assert_eq!(config["add_bos_token"], true);
    let generation = json(&directory.path().join("generation_config.json"));
    assert_eq!(generation["eos_token_id"], 1);
    let tokenizer = Tokenizer::load(directory.path().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.decode(&[10, 18, 4, 5]).unwrap(), "the caté");
}

#[test]
fn weights_are_written_as_the_type_asked_for() {
    for (dtype, name, bytes) in [(WeightDtype::F16, "F16", 2), (WeightDtype::Bf16, "BF16", 2)] {
        let directory = tempdir().unwrap();
        let options = GgufOptions::new().with_dtype(dtype);
        import_gguf(golden("qwen2.gguf"), directory.path(), &options).unwrap();
        for (tensor, (found, shape, data)) in tensors(&directory.path().join("model.safetensors")) {
            assert_eq!(found, name, "{tensor}");
            assert_eq!(data.len(), bytes * shape.iter().product::<usize>());
        }
    }
    // Tensors of f16 pass through f16 unchanged.
    let [half, whole] = [WeightDtype::F16, WeightDtype::F32].map(|dtype| {
        let directory = tempdir().unwrap();
        let options = GgufOptions::new().with_dtype(dtype);
        import_gguf(golden("olmo2.gguf"), directory.path(), &options).unwrap();
        tensors(&directory.path().join("model.safetensors"))["lm_head.weight"]
            .2
            .clone()
    });
    let half = half
        .chunks_exact(2)
        .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32());
    let whole = whole
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    assert!(half.eq(whole));
}

/// A GGUF file in the making.
#[derive(Clone)]
struct Writer {
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn texts(all: &[&str]) -> Vec<u8> {
    let mut bytes = [9_u32, 8].map(u32::to_le_bytes).concat();
    bytes.extend((all.len() as u64).to_le_bytes());
    bytes.extend(all.iter().flat_map(|one| text(one)));
    bytes
}

impl Writer {
    /// A llama of one layer, all of whose numbers are 1.
    fn llama() -> Self {
        let mut this = Self {
            keys: Vec::new(),
            tensors: Vec::new(),
        };
        this.text("general.architecture", "llama");
        for (key, number) in [
            ("block_count", 1),
            ("context_length", 16),
            ("embedding_length", 4),
            ("feed_forward_length", 6),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            this.u32(&format!("llama.{key}"), number);
        }
        this.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        this.tensor("token_embd.weight", &[4, 5]);
        this.tensor("output_norm.weight", &[4]);
        for (name, dims) in [
            ("attn_norm", &[4][..]),
            ("ffn_norm", &[4]),
            ("attn_q", &[4, 4]),
            ("attn_k", &[4, 2]),
            ("attn_v", &[4, 2]),
            ("attn_output", &[4, 4]),
            ("ffn_gate", &[4, 6]),
            ("ffn_up", &[4, 6]),
            ("ffn_down", &[6, 4]),
        ] {
            this.tensor(&format!("blk.0.{name}.weight"), dims);
        }
        this
    }

    /// With a vocabulary of the letters a and b.
    fn with_tokens(mut self) -> Self {
        self.text("tokenizer.ggml.model", "gpt2");
        self.key("tokenizer.ggml.tokens", texts(&["a", "b", "ab"]));
        self.key("tokenizer.ggml.merges", texts(&["a b"]));
        self
    }

    fn key(&mut self, key: &str, value: Vec<u8>) -> &mut Self {
        self.keys.retain(|(known, _)| known != key);
        self.keys.push((key.to_owned(), value));
        self
    }

    fn u32(&mut self, key: &str, number: u32) -> &mut Self {
        self.key(key, [4, number].map(u32::to_le_bytes).concat())
    }

    fn f32(&mut self, key: &str, number: f32) -> &mut Self {
        self.key(key, [6_u32.to_le_bytes(), number.to_le_bytes()].concat())
    }

    fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key, [&8_u32.to_le_bytes()[..], &text(value)].concat())
    }

    fn without(&mut self, name: &str) -> &mut Self {
        self.keys.retain(|(key, _)| key != name);
        self.tensors.retain(|(tensor, ..)| tensor != name);
        self
    }

    /// A tensor of f32, innermost dimension first.
    fn tensor(&mut self, name: &str, dims: &[u64]) -> &mut Self {
        let elements = dims.iter().product::<u64>() as usize;
        let data = 1_f32.to_le_bytes().repeat(elements);
        self.without(name);
        self.tensors.push((name.to_owned(), dims.to_vec(), 0, data));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut offset = 0;
        self.with_offsets(|data| {
            let at = offset;
            offset += data.len().next_multiple_of(32) as u64;
            at
        })
    }

    fn with_offsets(&self, mut offset: impl FnMut(&[u8]) -> u64) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            bytes.extend(text(key));
            bytes.extend(value);
        }
        for (name, dims, kind, data) in &self.tensors {
            bytes.extend(text(name));
            bytes.extend((dims.len() as u32).to_le_bytes());
            bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset(data).to_le_bytes());
        }
        for (.., data) in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(data);
        }
        bytes
    }
}

fn import(bytes: &[u8]) -> Result<TempDir, GgufError> {
    let directory = tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    import_gguf(path, directory.path().join("model"), &GgufOptions::new())?;
    Ok(directory)
}

/// The error of a file, whose message names `model.gguf` and what `says` has.
fn refused(bytes: &[u8], says: &[&str]) -> GgufError {
    let error = import(bytes).unwrap_err();
    for word in [&["model.gguf"], says].concat() {
        assert!(
            error.to_string().contains(word),
            "`{error}` without `{word}`"
        );
    }
    error
}

macro_rules! refuses {
    ($file:expr, $variant:ident, $says:expr) => {{
        let error = refused(&$file, &$says);
        assert!(matches!(error, GgufError::$variant { .. }), "{error:?}");
    }};
}

#[test]
fn a_file_of_our_own_is_read() {
    import(&Writer::llama().bytes()).unwrap();
    let directory = import(&Writer::llama().with_tokens().bytes()).unwrap();
    let path = directory.path().join("model/tokenizer.json");
    assert_eq!(
        Tokenizer::load(path).unwrap().encode("aab").unwrap(),
        [0, 2]
    );
}

#[test]
fn a_factor_without_a_type_scales_linearly() {
    let (factor, older) = ("llama.rope.scaling.factor", "llama.rope.scale_linear");
    let kind = "llama.rope.scaling.type";
    let rope = |file: &Writer| {
        let directory = import(&file.bytes()).unwrap();
        let config = json(&directory.path().join("model/config.json"));
        config["rope_parameters"].clone()
    };
    for linear in [false, true] {
        let file = |keys: &[(&str, f32)]| {
            let mut file = Writer::llama();
            for (key, number) in keys {
                file.f32(key, *number);
            }
            if linear {
                file.text(kind, "linear");
            }
            file
        };
        for (keys, expected) in [
            (&[(factor, 4.0)][..], 4.0_f64),
            (&[(older, 4.0)], 4.0),
            (&[(older, 0.5)], 0.5),
            (&[(older, 8.0), (factor, 4.0)], 4.0),
        ] {
            let found = rope(&file(keys));
            assert_eq!(found["rope_type"], "linear", "{keys:?}, {linear}");
            assert_eq!(found["factor"], expected, "{keys:?}, {linear}");
        }
        // No scaling.
        for keys in [
            &[(factor, 0.0)][..],
            &[(factor, 1.0)],
            &[(older, 0.0)],
            &[(older, 1.0)],
            &[(older, 8.0), (factor, 1.0)],
        ] {
            let found = rope(&file(keys));
            assert_eq!(found["rope_type"], "default", "{keys:?}, {linear}");
        }
        for key in [factor, older] {
            refuses!(file(&[(key, -4.0)]).bytes(), Metadata, [key, "above 0"]);
        }
    }
    assert_eq!(rope(&Writer::llama())["rope_type"], "default");
    let mut file = Writer::llama();
    file.f32(older, 4.0).text(kind, "none");
    assert_eq!(rope(&file)["rope_type"], "default");
    let mut file = Writer::llama();
    file.text(kind, "linear");
    refuses!(file.bytes(), Metadata, [factor, "missing", "above 0"]);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = Writer::llama().with_tokens().bytes();
    for length in 0..bytes.len() {
        let error = refused(&bytes[..length], &["truncated"]);
        let truncated = matches!(
            error,
            GgufError::Truncated { .. } | GgufError::TruncatedTensor { .. }
        );
        assert!(truncated, "{length}: {error:?}");
    }
}

#[test]
fn what_is_no_gguf_file_is_refused() {
    let mut bytes = Writer::llama().bytes();
    bytes[0] = b'g';
    refuses!(bytes, Magic, ["expected \"GGUF\""]);
    for version in [0, 1, 4, 3_u32.swap_bytes()] {
        let mut bytes = Writer::llama().bytes();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        refuses!(bytes, Version, [&*version.to_string(), "2 or 3"]);
    }
    let nowhere = GgufFile::open("/nowhere/model.gguf").unwrap_err();
    assert!(matches!(nowhere, GgufError::Read { .. }), "{nowhere:?}");
}

#[test]
fn counts_and_lengths_that_lie_are_refused() {
    // More tensors, more keys than there are bytes for.
    for at in [8, 16] {
        for count in [1 << 20, 1 << 62, u64::MAX] {
            let mut bytes = Writer::llama().bytes();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            refuses!(bytes, Truncated, ["truncated in"]);
        }
    }
    // A text and arrays that are longer than the file.
    let long = u64::MAX.to_le_bytes();
    let value = [&8_u32.to_le_bytes()[..], &long].concat();
    refuses!(
        Writer::llama().key("a.text", value).bytes(),
        Truncated,
        ["`a.text`"]
    );
    for kind in [0_u32, 6, 8, 9, 12] {
        let value = [&9_u32.to_le_bytes()[..], &kind.to_le_bytes(), &long].concat();
        refuses!(
            Writer::llama().key("an.array", value).bytes(),
            Truncated,
            ["`an.array`"]
        );
    }
    // Tensors that are larger than the file.
    let mut file = Writer::llama();
    file.tensors[1].1 = vec![1 << 40];
    refuses!(file.bytes(), TruncatedTensor, ["`output_norm.weight`"]);
    file.tensors[1].1 = vec![1 << 40, 1 << 40];
    refuses!(
        file.bytes(),
        Entry,
        ["`output_norm.weight`", "more than can be"]
    );
    file.tensors[1].1 = vec![1; 5];
    refuses!(
        file.bytes(),
        Entry,
        ["`output_norm.weight`", "5 dimensions"]
    );
}

#[test]
fn entries_that_contradict_themselves_or_others_are_refused() {
    let unknown = 13_u32.to_le_bytes().to_vec();
    refuses!(
        Writer::llama().key("a.key", unknown).bytes(),
        Entry,
        ["`a.key`", "type 13"]
    );
    let flag = [&7_u32.to_le_bytes()[..], &[2]].concat();
    refuses!(
        Writer::llama().key("a.flag", flag).bytes(),
        Entry,
        ["`a.flag`", "0 or 1"]
    );
    let invalid = [&8_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &[0xff]].concat();
    refuses!(
        Writer::llama().key("a.text", invalid).bytes(),
        Entry,
        ["`a.text`", "utf-8"]
    );
    let mut deep = 9_u32.to_le_bytes().to_vec();
    for _ in 0..5 {
        deep.extend([&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes()].concat());
    }
    deep.extend([0; 32]);
    refuses!(
        Writer::llama().key("an.array", deep).bytes(),
        Entry,
        ["`an.array`", "deep"]
    );
    let mut file = Writer::llama();
    file.keys.push(file.keys[0].clone());
    refuses!(file.bytes(), Entry, ["`general.architecture`", "two"]);
    let mut file = Writer::llama();
    file.tensors.push(file.tensors[0].clone());
    refuses!(file.bytes(), Entry, ["`token_embd.weight`", "two"]);
    refuses!(
        Writer::llama().u32("general.alignment", 3).bytes(),
        Entry,
        ["power of two"]
    );
    let file = Writer::llama();
    refuses!(file.with_offsets(|_| 4), Entry, ["multiple of 32"]);
    refuses!(
        file.with_offsets(|_| 0),
        Entry,
        ["starts at byte", "before the end of"]
    );
    // A row that is no whole number of blocks.
    let mut file = Writer::llama();
    file.tensors[0].2 = 8;
    refuses!(
        file.bytes(),
        Entry,
        ["`token_embd.weight`", "multiple of 32", "Q8_0"]
    );
}

#[test]
fn what_is_not_known_is_refused_with_what_is() {
    let mut file = Writer::llama();
    file.tensors[0].2 = 23;
    refuses!(
        file.bytes(),
        TensorType,
        ["`token_embd.weight`", "IQ4_XS (23)", "Q6_K"]
    );
    file.tensors[0].2 = 999;
    refuses!(file.bytes(), TensorType, ["`token_embd.weight`", "999"]);
    let mut file = Writer::llama();
    file.text("general.architecture", "mamba");
    refuses!(file.bytes(), Architecture, ["mamba", "qwen3"]);
    refuses!(
        file.without("general.architecture").bytes(),
        Metadata,
        ["general.architecture"]
    );
    let mut file = Writer::llama().with_tokens();
    file.text("tokenizer.ggml.pre", "klingon");
    refuses!(file.bytes(), Metadata, ["klingon", "llama-bpe", "smollm"]);
    file.text("tokenizer.ggml.model", "t5");
    refuses!(file.bytes(), Metadata, ["t5", "gpt2 or llama"]);
    refuses!(
        Writer::llama().u32("llama.expert_count", 8).bytes(),
        Metadata,
        ["expert_count", "8"]
    );
    let mut file = Writer::llama();
    file.text("llama.rope.scaling.type", "spiral");
    refuses!(file.bytes(), Metadata, ["spiral", "yarn"]);
}

#[test]
fn tensors_that_are_not_those_of_the_model_are_refused() {
    for name in [
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_k.weight",
    ] {
        refuses!(Writer::llama().without(name).bytes(), MissingTensor, [name]);
    }
    // However many layers there are said to be.
    refuses!(
        Writer::llama().u32("llama.block_count", u32::MAX).bytes(),
        MissingTensor,
        ["blk.1."]
    );
    let mut file = Writer::llama();
    refuses!(
        file.tensor("blk.0.ffn_gate_exps.weight", &[4, 6, 2])
            .bytes(),
        UnexpectedTensor,
        ["ffn_gate_exps"]
    );
    let mut file = Writer::llama();
    refuses!(
        file.tensor("blk.0.attn_q.bias", &[4]).bytes(),
        MissingTensor,
        ["attn_k.bias"]
    );
    let mut file = Writer::llama();
    refuses!(
        file.tensor("blk.0.attn_v.weight", &[4, 4]).bytes(),
        Shape,
        ["[4, 4]", "[2, 4]"]
    );
    let mut file = Writer::llama();
    refuses!(
        file.tensor("rope_freqs.weight", &[3]).bytes(),
        Shape,
        ["rope_freqs.weight"]
    );
    // A head of two channels, whose one frequency no scaling as Llama 3's would change.
    file.tensor("rope_freqs.weight", &[1]);
    import(&file.bytes()).unwrap();
    file.tensors.last_mut().unwrap().3 = 5_f32.to_le_bytes().to_vec();
    refuses!(file.bytes(), Entry, ["`rope_freqs.weight`", "Llama 3"]);
}

#[test]
fn keys_that_are_missing_or_of_another_kind_are_refused() {
    for key in [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ] {
        let key = format!("llama.{key}");
        refuses!(
            Writer::llama().without(&key).bytes(),
            Metadata,
            [&*key, "missing"]
        );
        refuses!(
            Writer::llama().text(&key, "many").bytes(),
            Metadata,
            [&*key, "many"]
        );
    }
    for key in [
        "llama.block_count",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.context_length",
    ] {
        refuses!(
            Writer::llama().u32(key, 0).bytes(),
            Metadata,
            [key, "above 0"]
        );
    }
    for theta in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let mut file = Writer::llama();
        file.f32("llama.rope.freq_base", theta);
        refuses!(file.bytes(), Metadata, ["llama.rope.freq_base", "a number"]);
    }
    let tokens = Writer::llama().with_tokens();
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        refuses!(
            tokens.clone().without(key).bytes(),
            Metadata,
            [key, "missing"]
        );
    }
    let many = texts(&["a", "b", "c", "d", "e", "f"]);
    refuses!(
        tokens.clone().key("tokenizer.ggml.tokens", many).bytes(),
        Metadata,
        ["at most 5"]
    );
    refuses!(
        tokens.clone().u32("tokenizer.ggml.eos_token_id", 3).bytes(),
        Metadata,
        ["below 3"]
    );
    refuses!(
        tokens
            .clone()
            .key("tokenizer.ggml.merges", texts(&["ab"]))
            .bytes(),
        Tokenizer,
        ["\"ab\""]
    );
    refuses!(
        tokens
            .clone()
            .key("tokenizer.ggml.merges", texts(&["b a"]))
            .bytes(),
        Tokenizer,
        ["`ba`"]
    );
}

#[test]
fn what_cannot_be_imported_leaves_the_directory_as_it_is() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let model = directory.path().join("model");
    let mut file = Writer::llama();
    fs::write(&path, file.bytes()).unwrap();
    import_gguf(&path, &model, &GgufOptions::new()).unwrap();
    let before = fs::read(model.join("model.safetensors")).unwrap();
    // Too large for f16, found when much is written already.
    file.tensors.last_mut().unwrap().3 = 1e5_f32.to_le_bytes().repeat(24);
    fs::write(&path, file.bytes()).unwrap();
    let options = GgufOptions::new().with_dtype(WeightDtype::F16);
    let error = import_gguf(&path, &model, &options).unwrap_err();
    let overflow = matches!(&error, GgufError::Checkpoint(CheckpointError::Overflow { tensor, .. }) if tensor.contains("down_proj"));
    assert!(overflow, "{error:?}");
    assert_eq!(fs::read(model.join("model.safetensors")).unwrap(), before);
    let names: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(names.len(), 2);
}

#[test]
fn what_another_model_has_left_does_not_stay_but_other_files_do() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let model = directory.path().join("model");
    fs::create_dir(&model).unwrap();
    for name in [
        "tokenizer.json",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "notes.txt",
    ] {
        fs::write(model.join(name), "old").unwrap();
    }
    fs::write(&path, Writer::llama().bytes()).unwrap();
    import_gguf(&path, &model, &GgufOptions::new()).unwrap();
    let mut names: Vec<_> = fs::read_dir(&model)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "notes.txt"]);
}

proptest! {
    #[test]
    fn no_header_makes_the_reader_panic(
        changes in prop::collection::vec((0.0..1.0_f64, any::<u8>()), 1..12),
        length in 0.0..1.2_f64,
    ) {
        let mut bytes = Writer::llama().with_tokens().bytes();
        let header = bytes.len() - 600;
        for (at, byte) in changes {
            bytes[(at * header as f64) as usize] = byte;
        }
        bytes.truncate((length * bytes.len() as f64) as usize);
        // Whatever it is, it is said or read.
        let _ = import(&bytes);
    }

    #[test]
    fn no_bytes_make_the_reader_panic(
        tail in prop::collection::vec(any::<u8>(), 0..200),
        counts in (0..4_u64, 0..4_u64),
    ) {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(counts.0.to_le_bytes());
        bytes.extend(counts.1.to_le_bytes());
        bytes.extend(tail);
        let directory = tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        fs::write(&path, bytes).unwrap();
        let _ = GgufFile::open(path);
    }
}
