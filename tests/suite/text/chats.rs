//! Chats as transformers' `apply_chat_template` renders them (`tests/reference/chats.py`), and chats
//! that cannot be rendered.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fusedkv::text::{ChatError, ChatMessage, ChatOptions, ChatTemplate};
use jiff::civil::DateTime;
use minijinja::Value;
use serde::Deserialize;
use serde::de::DeserializeOwned;

#[derive(Deserialize)]
struct Chats {
    chats: BTreeMap<String, Vec<ChatMessage>>,
    tools: Value,
    now: String,
}

#[derive(Deserialize)]
struct Model {
    template: String,
    tokens: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    chat: String,
    tools: bool,
    variables: BTreeMap<String, Value>,
    add_generation_prompt: bool,
    expected: Option<String>,
    error: Option<String>,
    /// Whether the error is one the template raised.
    raised: Option<bool>,
}

fn read<T: DeserializeOwned>(name: &str) -> T {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chats");
    let json = fs::read_to_string(directory.join(format!("{name}.json"))).unwrap();
    serde_json::from_str(&json).unwrap()
}

fn template(name: &str) -> ChatTemplate {
    let model: Model = read(name);
    let tokens = model.tokens.iter();
    tokens.fold(
        ChatTemplate::new(&model.template),
        |template, (name, token)| template.with_token(name, token),
    )
}

fn renders_like_transformers(name: &str) {
    let chats: Chats = read("chats");
    let now: DateTime = chats.now.parse().unwrap();
    let template = template(name);
    let model: Model = read(name);
    assert!(model.cases.len() > 4);
    for case in model.cases {
        let mut options = ChatOptions::new()
            .with_generation_prompt(case.add_generation_prompt)
            .with_now(now);
        if case.tools {
            options = options.with_tools(&chats.tools);
        }
        for (name, value) in &case.variables {
            options = options.with_variable(name, value);
        }
        let found = template.render(&chats.chats[&case.chat], &options);
        match (&found, &case.expected) {
            (Ok(text), Some(expected)) => assert_eq!(text, expected, "{name}: {}", case.chat),
            (Err(error), None) => {
                let message = case.error.clone().unwrap();
                let raised = *error == ChatError::Refused(message);
                assert_eq!(Some(raised), case.raised, "{name}: {}: {error}", case.chat);
            }
            _ => panic!(
                "{name}: {}: {found:?}, expected {:?}",
                case.chat, case.expected
            ),
        }
    }
}

#[test]
fn llama_3_is_rendered_like_transformers() {
    renders_like_transformers("llama_3");
    renders_like_transformers("llama_3_2");
}

#[test]
fn qwen_3_is_rendered_like_transformers() {
    renders_like_transformers("qwen_3");
}

#[test]
fn gemma_3_is_rendered_like_transformers() {
    renders_like_transformers("gemma_3");
}

#[test]
fn smollm2_is_rendered_like_transformers() {
    renders_like_transformers("smollm2");
}

#[test]
fn mistral_is_rendered_like_transformers() {
    renders_like_transformers("mistral_1");
    renders_like_transformers("mistral_3");
}

#[test]
fn python_in_templates_is_what_python_writes() {
    renders_like_transformers("python");
}

fn fails(template: &str, messages: &[ChatMessage]) -> ChatError {
    let template = ChatTemplate::new(template);
    template.render(messages, &ChatOptions::new()).unwrap_err()
}

/// Templates come with models: one that would not end is stopped.
#[test]
fn a_template_that_takes_too_long_is_an_error() {
    let forever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    let error = fails(forever, &[ChatMessage::user("Hello")]);
    assert!(matches!(error, ChatError::Render { .. }), "{error}");
    assert!(error.to_string().contains("fuel"), "{error}");
    // In one step, of which there is no fuel to run out.
    let wide = "{{ messages|tojson(indent=9223372036854775807) }}";
    let error = fails(wide, &[ChatMessage::user("Hello")]);
    assert!(error.to_string().contains("indent"), "{error}");
}

/// Python counts and slices characters.
#[test]
fn places_in_strings_are_those_of_characters() {
    let template = "{% set c = messages[0].content %}\
        {{ c.count('') }} {{ c[c.find('|'):] }} {{ c[:c.rfind('|')] }} {{ c.find('x') }}";
    let chat = [ChatMessage::user("é|ü|")];
    let text = ChatTemplate::new(template).render(&chat, &ChatOptions::new());
    assert_eq!(text.unwrap(), "5 |ü| é|ü -1");
}

#[test]
fn a_message_that_the_template_leaves_out_is_an_error() {
    let chat = [ChatMessage::user("Hi"), ChatMessage::new("critic", "Hm")];
    let options = ChatOptions::new();
    let unknown = ChatError::UnknownRole {
        index: 1,
        role: "critic".to_owned(),
    };
    assert_eq!(template("qwen_3").render(&chat, &options), Err(unknown));
    // Others write any role.
    let text = template("smollm2").render(&chat, &options).unwrap();
    assert!(text.contains("<|im_start|>critic\nHm<|im_end|>"), "{text}");
    // What a template knows it may leave out.
    let chat = [ChatMessage::system("Be brief."), ChatMessage::user("Hi")];
    let users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
    let text = ChatTemplate::new(users).render(&chat, &options).unwrap();
    assert_eq!(text, "Hi");
}

#[test]
fn what_cannot_be_rendered_is_said() {
    let hi = [ChatMessage::user("Hi")];
    assert_eq!(fails("{{ messages }}", &[]), ChatError::NoMessages);
    let error = fails("\n{% if %}", &hi);
    assert!(
        matches!(error, ChatError::Syntax { line: 2, .. }),
        "{error}"
    );
    let error = fails("\n\n{{ messages[0].name.first }}", &hi);
    assert!(
        matches!(error, ChatError::Render { line: 3, .. }),
        "{error}"
    );
    let error = fails("{{ messages[0].content.fold() }}", &hi);
    assert!(matches!(error, ChatError::Render { .. }), "{error}");
    let raised =
        "{% macro no(m) %}{{ raise_exception('no ' ~ m.role) }}{% endmacro %}{{ no(messages[0]) }}";
    assert_eq!(fails(raised, &hi), ChatError::Refused("no user".to_owned()));

    let named = ChatOptions::new().with_template("rag");
    let error = ChatTemplate::new("").render(&hi, &named).unwrap_err();
    let unknown = ChatError::UnknownTemplate {
        name: "rag".to_owned(),
        known: vec!["default".to_owned()],
    };
    assert_eq!(error, unknown);

    for (json, reason) in [
        ("[{\"role\": \"user\"}, \"Hi\"]", "is no object"),
        (
            "[{\"role\": \"user\"}, {\"content\": \"Hi\"}]",
            "has no role, expected a text",
        ),
        (
            "[{\"role\": \"user\"}, {\"role\": 1}]",
            "has no role, expected a text",
        ),
    ] {
        let messages: Vec<ChatMessage> = serde_json::from_str(json).unwrap();
        let error = fails("", &messages);
        assert_eq!(error, ChatError::Message { index: 1, reason });
    }
}

#[test]
fn messages_are_json_and_keep_the_order_of_their_keys() {
    let json = r#"{"content":"Hi","role":"user","zebra":[1.5,null],"ape":{"b":1,"a":2}}"#;
    let message: ChatMessage = serde_json::from_str(json).unwrap();
    assert_eq!(serde_json::to_string(&message).unwrap(), json);
    assert_eq!(message.role().as_deref(), Some("user"));
    assert_eq!(message.content().as_deref(), Some("Hi"));
    let other = ChatMessage::user("Hi")
        .with("zebra", 1)
        .with("content", "Ho");
    let json = serde_json::to_string(&other).unwrap();
    assert_eq!(json, r#"{"role":"user","content":"Ho","zebra":1}"#);
}
