//! What a model's directory says of chats and of how its texts are drawn.

use std::fs;
use std::path::Path;
use std::slice;

use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::checkpoint::{CheckpointError, SaveOptions, WeightDtype, save_checkpoint};
use fusedkv::text::{ChatError, ChatMessage, ChatOptions, ChatTemplate, TextError, TextGenerator};
use fusedkv::{GenerationConfig, KvPlan};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

fn directory(files: &[(&str, Value)]) -> TempDir {
    let directory = tempdir().unwrap();
    for (name, content) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text = content.as_str().map(str::to_owned);
        fs::write(path, text.unwrap_or_else(|| content.to_string())).unwrap();
    }
    directory
}

fn rendered(files: &[(&str, Value)], options: &ChatOptions) -> Result<String, ChatError> {
    let directory = directory(files);
    let template = ChatTemplate::from_directory(directory.path())
        .unwrap()
        .unwrap();
    template.render(&[ChatMessage::user("Hi")], options)
}

#[test]
fn templates_come_from_where_transformers_looks() {
    let plain = ChatOptions::new();
    let config = |template: Value| {
        let tokens = json!({"chat_template": template, "bos_token": "<s>", "add_bos_token": true,
            "eos_token": {"__type": "AddedToken", "content": "</s>", "special": true}, "unk_token": null});
        ("tokenizer_config.json", tokens)
    };
    let one = config(json!(
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}"
    ));
    assert_eq!(
        rendered(slice::from_ref(&one), &plain).unwrap(),
        "<s>Hi</s>"
    );
    let map = (
        "special_tokens_map.json",
        json!({"bos_token": "<old>", "unk_token": {"content": "<unk>"}}),
    );
    assert_eq!(
        rendered(&[one.clone(), map], &plain).unwrap(),
        "<s>Hi</s><unk>"
    );

    let several = config(json!([
        {"name": "default", "template": "default"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "rag"},
    ]));
    assert_eq!(
        rendered(slice::from_ref(&several), &plain).unwrap(),
        "default"
    );
    let tools = ChatOptions::new().with_tools([1]);
    assert_eq!(
        rendered(slice::from_ref(&several), &tools).unwrap(),
        "tools"
    );
    let rag = ChatOptions::new().with_template("rag").with_tools([1]);
    assert_eq!(rendered(&[several], &rag).unwrap(), "rag");
    let nameless = config(json!([{"name": "rag", "template": "rag"}]));
    let error = rendered(&[nameless], &plain).unwrap_err();
    assert!(matches!(error, ChatError::UnknownTemplate { name, .. } if name == "default"));

    let file = (
        "chat_template.jinja",
        json!("{% if true %}\r\nfile{{ bos_token }}\r\n{% endif %}\r\n"),
    );
    assert_eq!(
        rendered(&[one.clone(), file.clone()], &plain).unwrap(),
        "file<s>\n"
    );
    let other = ("additional_chat_templates/rag.jinja", json!("other"));
    assert_eq!(rendered(&[one, file, other], &rag).unwrap(), "other");
}

#[test]
fn directories_without_a_template_have_none_and_broken_ones_say_so() {
    let none = directory(&[("tokenizer_config.json", json!({"bos_token": "<s>"}))]);
    assert!(ChatTemplate::from_directory(none.path()).unwrap().is_none());
    let wrong = directory(&[(
        "tokenizer_config.json",
        json!({"chat_template": [{"name": "a"}]}),
    )]);
    let error = ChatTemplate::from_directory(wrong.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Setting { key, .. } if key == "chat_template"));
    let broken = directory(&[("tokenizer_config.json", json!("{"))]);
    let error = ChatTemplate::from_directory(broken.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Json { .. }), "{error}");
}

fn saved(directory: &Path) {
    let config = super::config(KvPlan::FusedKv { storage_layers: 2 });
    let model = crate::models::model::<Flex>(&config, 1);
    save_checkpoint(directory, &model, &SaveOptions::new().with_eos(vec![7])).unwrap();
    super::tokenizer()
        .save(directory.join("tokenizer.json"))
        .unwrap();
}

fn load(directory: &Path) -> Result<TextGenerator<Flex>, TextError> {
    TextGenerator::load(directory, WeightDtype::F32, &FlexDevice)
}

#[test]
fn generators_come_with_their_defaults() {
    let directory = tempdir().unwrap();
    let path = &directory.path().join("model");
    saved(path);
    let generator = load(path).unwrap();
    let greedy = GenerationConfig::new().with_stop_tokens(vec![7]);
    assert_eq!(generator.defaults().generation, greedy);
    assert!(generator.template().is_none());

    let defaults = |json: Value| {
        fs::write(path.join("generation_config.json"), json.to_string()).unwrap();
        let ignored = |generator: &TextGenerator<Flex>| generator.ignored_settings().to_vec();
        load(path).map(|generator| (generator.defaults().clone(), ignored(&generator)))
    };
    let all = json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
        "repetition_penalty": 1.05, "max_new_tokens": 9, "eos_token_id": [3, 4], "stop_strings": ["\n\n"],
        "min_p": 0.1, "num_beams": 1, "typical_p": null, "suppress_tokens": [1], "_from_model_config": true});
    let (found, ignored) = defaults(all).unwrap();
    let expected = GenerationConfig::new()
        .with_temperature(0.6)
        .with_top_k(Some(20))
        .with_top_p(Some(0.95))
        .with_repetition_penalty(1.05)
        .with_max_new_tokens(9)
        .with_stop_tokens(vec![3, 4]);
    assert_eq!(found.generation, expected);
    assert_eq!(found.stop_strings, ["\n\n"]);
    assert_eq!(ignored, ["min_p", "suppress_tokens"]);
    // transformers' own defaults, where it draws.
    let (found, _) = defaults(json!({"do_sample": true, "top_p": 1.0})).unwrap();
    let expected = GenerationConfig::new()
        .with_stop_tokens(vec![7])
        .with_temperature(1.0)
        .with_top_k(Some(50));
    assert_eq!(found.generation, expected);
    let (found, _) = defaults(json!({"do_sample": true, "top_k": 0})).unwrap();
    assert_eq!(
        found.generation,
        GenerationConfig::new()
            .with_stop_tokens(vec![7])
            .with_temperature(1.0)
    );
    let (found, _) = defaults(json!({"temperature": 0.6, "top_k": 20})).unwrap();
    assert_eq!(
        found.generation,
        GenerationConfig::new().with_stop_tokens(vec![7])
    );

    for (key, json) in [
        ("do_sample", json!({"do_sample": 1})),
        ("temperature", json!({"temperature": "hot"})),
        ("max_new_tokens", json!({"max_new_tokens": -1})),
        ("stop_strings", json!({"stop_strings": [1]})),
    ] {
        let error = defaults(json).unwrap_err();
        let TextError::Checkpoint(CheckpointError::Setting { key: found, .. }) = error else {
            panic!("{error}");
        };
        assert_eq!(found, key);
    }
}

#[test]
fn a_model_without_a_tokenizer_writes_no_text() {
    let directory = tempdir().unwrap();
    let path = &directory.path().join("model");
    saved(path);
    fs::remove_file(path.join("tokenizer.json")).unwrap();
    let error = load(path).unwrap_err();
    assert!(matches!(error, TextError::NoTokenizer { .. }), "{error}");
}
