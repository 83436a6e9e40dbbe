//! Byte-level BPE: text to tokens and back, the disk, errors.

use std::fs;

use fusedkv::tokenizer::{END_OF_TEXT, Tokenizer, TokenizerError};
use proptest::prelude::*;
use tempfile::tempdir;

#[test]
fn tokenizers_say_what_they_cannot_do() {
    let error = Tokenizer::train_bpe("text", 256).unwrap_err();
    assert!(
        matches!(
            error,
            TokenizerError::VocabTooSmall {
                found: 256,
                min: 257
            }
        ),
        "{error}"
    );
    let directory = tempdir().unwrap();
    let error = Tokenizer::load(directory.path().join("none.json")).unwrap_err();
    assert!(
        matches!(error, TokenizerError::Unreadable { .. }),
        "{error}"
    );
    let tokenizer = Tokenizer::train_bpe("text", 257).unwrap();
    let error = tokenizer
        .save(directory.path().join("no/such/place.json"))
        .unwrap_err();
    assert!(matches!(error, TokenizerError::Write { .. }), "{error}");
}

#[test]
fn tokenizers_learn_merges_and_survive_the_disk() {
    let text = "the cat and the hat and the bat\n".repeat(20);
    let tokenizer = Tokenizer::train_bpe(&text, 270).unwrap();
    assert_eq!(tokenizer.vocab_size(), 270);
    let tokens = tokenizer.encode(&text).unwrap();
    assert!(tokens.len() < text.len() * 2 / 3);
    assert!(tokens.iter().all(|&token| token < 270));
    let end = tokenizer.end_of_text().unwrap();
    assert_eq!(tokenizer.encode(END_OF_TEXT).unwrap(), [end]);

    let directory = tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    tokenizer.save(&path).unwrap();
    let loaded = Tokenizer::load(&path).unwrap();
    assert_eq!(loaded.encode(&text).unwrap(), tokens);
    assert_eq!(loaded.decode(&tokens).unwrap(), text);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

proptest! {
    #[test]
    fn any_text_survives_the_tokenizer(text in any::<String>(), learned in any::<String>()) {
        let tokenizer = Tokenizer::train_bpe(&learned, 300).unwrap();
        let tokens = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
    }

    #[test]
    fn streamed_text_is_the_text(text in "(\\PC|[éß漢🙂\u{FFFD} \n]|<\\|endoftext\\|>)*") {
        let tokenizer = Tokenizer::train_bpe("漢漢 🙂🙂 the the", 270).unwrap();
        let mut stream = tokenizer.stream();
        let mut streamed = String::new();
        for token in tokenizer.encode(&text).unwrap() {
            streamed.push_str(&stream.push(token).unwrap());
        }
        streamed.push_str(&stream.finish().unwrap());
        prop_assert_eq!(streamed, text);
    }
}
