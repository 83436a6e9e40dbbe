//! Chats to fine-tune on: which tokens count, and lines that are none.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fusedkv::text::{ChatError, ChatMessage, ChatOptions, ChatTemplate};
use fusedkv::tokenizer::Tokenizer;
use fusedkv::train::{ChatDataError, ChatWindows, TokenWindow, Windows, train_from_on};
use serde::Deserialize;
use serde_json::json;

use super::*;

const CONTEXT: usize = 1200;

/// Templates as transformers has them (`tests/reference/chats.py`), what ends an answer in each, and
/// what may stand between the beginning of an answer and its content.
const TEMPLATES: [(&str, &str, &[&str]); 7] = [
    ("gemma_3", "<end_of_turn>", &[""]),
    ("llama_3", "<|eot_id|>", &[""]),
    ("llama_3_2", "<|eot_id|>", &[""]),
    ("mistral_1", "</s>", &[""]),
    ("mistral_3", "</s>", &[" "]),
    ("qwen_3", "<|im_end|>", &["", "<think>\n\n</think>\n\n"]),
    ("smollm2", "<|im_end|>", &[""]),
];

/// Special tokens of all of them.
const SPECIAL: [&str; 16] = [
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|im_start|>",
    "<|im_end|>",
    "<pad>",
    "<|unused|>",
];

#[derive(Deserialize)]
struct Model {
    template: String,
    tokens: BTreeMap<String, String>,
}

fn template(name: &str) -> ChatTemplate {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chats");
    let json = fs::read(directory.join(format!("{name}.json"))).unwrap();
    let model: Model = serde_json::from_slice(&json).unwrap();
    let template = ChatTemplate::new(&model.template);
    let with = |template: ChatTemplate, (name, token): (&String, &String)| {
        template.with_token(name, token)
    };
    model.tokens.iter().fold(template, with)
}

/// A byte-level BPE that merges what is common, with the special tokens.
fn tokenizer() -> Tokenizer {
    let directory = tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    let text = "assistant user system the answer \n\n<think>\n\n</think>\n\n is of the ".repeat(20);
    let tokenizer = Tokenizer::train_bpe(&text, 300).unwrap();
    tokenizer.save(&path).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    for (id, content) in (tokenizer.vocab_size()..).zip(SPECIAL) {
        added.push(json!({
            "id": id, "content": content, "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false,
        }));
    }
    fs::write(&path, json.to_string()).unwrap();
    Tokenizer::load(&path).unwrap()
}

fn read(
    lines: &[String],
    template: &ChatTemplate,
    context: usize,
) -> Result<ChatWindows, TrainError> {
    let directory = tempdir().unwrap();
    let path = directory.path().join("chats.jsonl");
    fs::write(&path, lines.join("\n")).unwrap();
    ChatWindows::read(&path, &tokenizer(), template, &ChatOptions::new(), context)
}

fn line(messages: &[ChatMessage]) -> String {
    json!({ "messages": messages }).to_string()
}

/// Words without white space around them, which some templates leave out, and without anything that a
/// template writes.
fn words() -> impl Strategy<Value = String> {
    let word = "[a-zé世🙂.?!'0-9]{1,8}";
    let between = prop::sample::select(vec![" ", "\n", "\n\n", "  ", "\t"]);
    (word, prop::collection::vec((between, word), 0..4)).prop_map(|(first, more)| {
        let more = more.into_iter();
        more.fold(first, |text, (between, word)| text + between + &word)
    })
}

/// Questions and answers in turn, perhaps with a system's message before and a question at the end.
fn chat() -> impl Strategy<Value = Vec<ChatMessage>> {
    let turns = prop::collection::vec((words(), words()), 1..5);
    (prop::option::of(words()), turns, prop::option::of(words())).prop_map(
        |(system, turns, last)| {
            let system = system.iter().map(|text| ChatMessage::system(text));
            let turns = turns.iter().flat_map(|(question, answer)| {
                [ChatMessage::user(question), ChatMessage::assistant(answer)]
            });
            let last = last.iter().map(|text| ChatMessage::user(text));
            system.chain(turns).chain(last).collect()
        },
    )
}

/// The tokens up to where each run of targets that count begins, and the run's.
fn learned(window: &TokenWindow) -> Vec<(Vec<u32>, Vec<u32>)> {
    let counts = window.counts();
    let mut runs: Vec<(Vec<u32>, Vec<u32>)> = Vec::new();
    for (position, &target) in window.targets.iter().enumerate() {
        if !counts[position] {
            continue;
        }
        match runs.last_mut() {
            Some((before, run)) if before.len() + run.len() == position + 1 => run.push(target),
            _ => runs.push((window.inputs[..=position].to_vec(), vec![target])),
        }
    }
    runs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Every answer is learned once: its words and the mark of its end, behind the tokens that the
    /// model is given to ask for it.
    #[test]
    fn exactly_the_answers_count(
        (name, end, thoughts) in prop::sample::select(TEMPLATES.to_vec()),
        chat in chat(),
    ) {
        let template = template(name);
        let with_system = chat[0].role().as_deref() == Some("system");
        if with_system && name == "mistral_3" {
            // It writes the system's message before the last question, unless an answer is behind.
            match read(&[line(&chat)], &template, CONTEXT).unwrap_err() {
                TrainError::Chat { source: ChatDataError::Chat(error), .. } => {
                    prop_assert_eq!(error, ChatError::Beginning { index: 2 });
                }
                error => panic!("{error}"),
            }
        }
        let chat = match with_system && name.starts_with("mistral") {
            true => chat[1..].to_vec(),
            false => chat,
        };
        let tokenizer = tokenizer();
        let windows = read(&[line(&chat)], &template, CONTEXT).unwrap();
        windows.check_vocabulary(tokenizer.vocab_size()).unwrap();
        let learned: Vec<_> = (0..windows.len())
            .flat_map(|index| learned(&windows.get(index).unwrap()))
            .collect();
        let answers = chat.iter().enumerate();
        let answers: Vec<_> = answers
            .filter(|(_, message)| message.role().as_deref() == Some("assistant"))
            .collect();
        prop_assert_eq!(learned.len(), answers.len());
        prop_assert_eq!(learned.iter().map(|(_, run)| run.len()).sum::<usize>(), windows.counted());
        for ((before, run), (index, message)) in learned.into_iter().zip(answers) {
            let asked = template.render(&chat[..index], &ChatOptions::new()).unwrap();
            prop_assert_eq!(before, tokenizer.encode(&asked).unwrap());
            let found = tokenizer.decode(&run).unwrap();
            let content = message.content().unwrap();
            let expected = |thought: &&str| format!("{thought}{content}{end}");
            let mut expected = thoughts.iter().map(expected);
            prop_assert!(expected.any(|text| text == found), "{name}: {found:?} of {content:?}");
        }
        // A window is enough where a chat is written the same way however it goes on, and tokens do not
        // depend on what is behind them: two new lines are one before nothing, and two before a word.
        let one = ["gemma_3", "mistral_1", "mistral_3", "smollm2"].contains(&name);
        prop_assert!(windows.len() == 1 || !one, "{name}: {}", windows.len());
    }
}

#[test]
fn chats_are_held_out_whole() {
    let chat = |i: usize| {
        let question = ChatMessage::user(&format!("question {i}"));
        [
            question.clone(),
            ChatMessage::assistant("one"),
            question,
            ChatMessage::assistant("two"),
        ]
    };
    let lines: Vec<_> = (0..10).map(|i| line(&chat(i))).collect();
    // Two windows each: the thoughts of the first answer are gone in the second.
    let windows = read(&lines, &template("qwen_3"), CONTEXT).unwrap();
    assert_eq!((windows.len(), windows.context()), (20, CONTEXT));
    let all = windows.fingerprint();
    for (fraction, expected) in [(0.01, 1), (0.3, 3), (0.99, 9)] {
        let (train, valid) = windows.clone().split(fraction).unwrap();
        assert_eq!(
            (train.len(), valid.len()),
            (20 - 2 * expected, 2 * expected)
        );
        let of = |windows: &ChatWindows, index| windows.get(index).unwrap();
        assert_eq!(of(&valid, 0), of(&windows, train.len()));
        assert_ne!(train.fingerprint(), all);
        assert!(valid.get(valid.len()).is_none());
    }
    let one = read(&lines[..1], &template("qwen_3"), CONTEXT).unwrap();
    for (windows, fraction, field) in [(one, 0.5, "chats"), (windows, 1.0, "valid_fraction")] {
        let error = windows.split(fraction).unwrap_err();
        assert!(
            matches!(&error, TrainError::Setting { field: found, .. } if *found == field),
            "{error}"
        );
    }
}

#[test]
fn lines_that_are_no_chats_are_named() {
    let good = line(&[ChatMessage::user("Hi"), ChatMessage::assistant("Ho")]);
    let fails = |bad: &str, name: &str, context: usize| {
        let lines = [good.clone(), " ".to_owned(), bad.to_owned()];
        match read(&lines, &template(name), context).unwrap_err() {
            TrainError::Chat { line, source, path } => {
                assert_eq!(
                    (line, path.file_name().unwrap()),
                    (3, "chats.jsonl".as_ref())
                );
                source
            }
            error => panic!("{error}"),
        }
    };
    for bad in ["{", "[]", "{\"chat\": []}", "{\"messages\": {}}"] {
        let error = fails(bad, "smollm2", CONTEXT);
        assert!(matches!(error, ChatDataError::Json(_)), "{error}");
        assert!(error.to_string().contains("messages"), "{error}");
    }
    let messages = |json: serde_json::Value| json!({ "messages": json }).to_string();
    let user = json!({ "role": "user", "content": "Hi" });
    let answer = json!({ "role": "assistant", "content": "Ho" });
    for (bad, name, expected) in [
        (json!([]), "smollm2", ChatError::NoMessages),
        (json!([user]), "smollm2", ChatError::NoAnswer),
        (json!([answer]), "smollm2", ChatError::Opening),
        (
            json!([user, { "role": "critic", "content": "Hm" }, answer]),
            "qwen_3",
            ChatError::UnknownRole {
                index: 1,
                role: "critic".to_owned(),
            },
        ),
        (
            json!([{ "content": "Hi" }, answer]),
            "smollm2",
            ChatError::Message {
                index: 0,
                reason: "has no role, expected a text",
            },
        ),
    ] {
        match fails(&messages(bad), name, CONTEXT) {
            ChatDataError::Chat(error) => assert_eq!(error, expected),
            error => panic!("{error}"),
        }
    }
    let refused = messages(json!([user, user, answer]));
    let error = fails(&refused, "gemma_3", CONTEXT);
    assert!(
        matches!(error, ChatDataError::Chat(ChatError::Refused(_))),
        "{error}"
    );

    // As long as fits, and one longer.
    let windows = read(std::slice::from_ref(&good), &template("smollm2"), CONTEXT).unwrap();
    let longest = windows.longest();
    let windows = read(
        std::slice::from_ref(&good),
        &template("smollm2"),
        longest - 1,
    )
    .unwrap();
    assert!(windows.get(0).unwrap().counts().last().unwrap());
    let longer = line(&[ChatMessage::user("Hi!"), ChatMessage::assistant("Ho")]);
    let error = fails(&longer, "smollm2", longest - 1);
    assert!(
        matches!(error, ChatDataError::TooLong { tokens, context }
            if tokens == longest + 1 && context == longest - 1),
        "{error}"
    );
}

#[test]
fn a_template_that_asks_otherwise_than_it_writes_is_an_error() {
    let messages = [ChatMessage::user("Hi"), ChatMessage::assistant("Ho")];
    let thinking = ChatTemplate::new(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
         {% if add_generation_prompt %}<assistant><think>{% endif %}",
    );
    let error = thinking.answers(&messages, &ChatOptions::new());
    assert_eq!(error.unwrap_err(), ChatError::Beginning { index: 1 });
    let error = ChatTemplate::new("").answers(&[], &ChatOptions::new());
    assert_eq!(error.unwrap_err(), ChatError::NoMessages);
}

#[test]
fn files_without_chats_are_refused() {
    let template = template("smollm2");
    let error = read(&["\n".to_owned()], &template, CONTEXT).unwrap_err();
    assert!(matches!(error, TrainError::NoText(_)), "{error}");
    let error = read(&["\n".to_owned()], &template, 0).unwrap_err();
    assert!(
        matches!(
            error,
            TrainError::Setting {
                field: "context",
                ..
            }
        ),
        "{error}"
    );
    let missing = PathBuf::from("missing.jsonl");
    let options = ChatOptions::new();
    let error = ChatWindows::read(&missing, &tokenizer(), &template, &options, 8).unwrap_err();
    assert!(matches!(error, TrainError::Unreadable { .. }), "{error}");
}

/// A model learns what is answered, and to end there.
#[test]
fn answers_are_learned() {
    let chats = (0..24).map(|i| {
        let question = ChatMessage::user(&format!("What is {i}?"));
        line(&[question, ChatMessage::assistant("A number.")])
    });
    let template = ChatTemplate::new(
        "{% for m in messages %}<s>{{ m.role[0] }} {{ m.content }}</s>{% endfor %}\
         {% if add_generation_prompt %}<s>a {% endif %}",
    );
    let windows = read(&chats.collect::<Vec<_>>(), &template, 40).unwrap();
    let (train, valid) = windows.split(0.2).unwrap();
    let mut config = TrainingConfig {
        context: 40,
        ..config()
    };
    config.model.vocab_size = tokenizer().vocab_size();
    let directory = tempdir().unwrap();
    let run = Run::new(directory.path()).with_progress(Progress::Quiet);
    let trained = in_turn(|| {
        let model = config.model.init::<Autodiff<Flex>>(&FlexDevice).unwrap();
        train_from_on(&config, model, train, valid, &run, &[FlexDevice]).unwrap()
    });
    assert!(trained.valid_loss < 0.5, "{:?}", trained.epochs);
}
