//! Texts against the tokens they are made of.

use fusedkv::GenerateError;
use fusedkv::text::{
    ChatError, ChatMessage, ChatTemplate, Completion, Prompt, TextConfig, TextError, TextFinish,
};
use fusedkv::tokenizer::END_OF_TEXT;
use proptest::prelude::*;

use super::{generator, tokenizer};
use crate::models::F64;

/// Twelve tokens of each row, drawn so that bytes of characters are among them.
fn drawn(seed: u64) -> TextConfig {
    let mut config = generator::<F64>(0).defaults().clone();
    config.generation = config
        .generation
        .with_max_new_tokens(12)
        .with_temperature(2.0)
        .with_seed(seed);
    config
}

fn write(seed: u64, prompts: &[Prompt], config: &TextConfig) -> Vec<Completion> {
    let generator = generator::<F64>(seed);
    generator
        .generate(prompts, config)
        .unwrap()
        .completions()
        .unwrap()
}

fn ids(completion: &Completion) -> Vec<u32> {
    completion.tokens.iter().map(|token| token.id).collect()
}

/// The text of tokens, to which special ones add nothing.
fn spelled(tokens: &[u32]) -> String {
    let tokenizer = tokenizer();
    let tokens = tokens.iter().copied();
    let tokens: Vec<u32> = tokens.filter(|&id| !tokenizer.is_special(id)).collect();
    tokenizer.decode(&tokens).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A batch of any lengths is written as each alone, and its pieces are the text of its tokens.
    #[test]
    fn texts_of_a_batch_are_those_of_each_alone(
        seed in 0u64..1000,
        texts in prop::collection::vec("[a-z 漢é]{1,12}", 1..4),
    ) {
        let mut config = drawn(seed);
        config.generation.temperature = 0.0;
        let prompts: Vec<Prompt> = texts.into_iter().map(Prompt::from).collect();
        let all = write(seed, &prompts, &config);
        prop_assert_eq!(all.len(), prompts.len());
        for (prompt, found) in prompts.iter().zip(all) {
            let alone = write(seed, std::slice::from_ref(prompt), &config).remove(0);
            prop_assert_eq!((&found.text, &found.finish), (&alone.text, &alone.finish));
            prop_assert_eq!(ids(&found), ids(&alone));
            prop_assert_eq!(&found.text, &spelled(&ids(&found)));
        }
    }

    /// A text ends before the first of any part of it, whichever tokens that is spread over; other
    /// rows go on.
    #[test]
    fn a_text_ends_before_a_stop_string(seed in 0u64..1000, start in 0usize..20, len in 1usize..4) {
        let prompts = ["to be".into(), "or".into()];
        let mut config = drawn(seed);
        let free = write(seed, &prompts, &config);
        let stop: String = free[0].text.chars().skip(start).take(len).collect();
        prop_assume!(!stop.is_empty());
        config.stop_strings = vec![stop.clone()];
        let found = write(seed, &prompts, &config);
        for (found, free) in found.iter().zip(&free) {
            match free.text.split_once(&stop) {
                Some((before, _)) => {
                    prop_assert_eq!(&found.text, before);
                    prop_assert_eq!(&found.finish, &TextFinish::StopString(stop.clone()));
                    // No token is drawn beyond the one that completes it.
                    prop_assert_eq!(&ids(free)[..found.tokens.len()], ids(found));
                    let kept = spelled(&ids(found)[..found.tokens.len() - 1]);
                    let kept = kept.trim_end_matches(char::REPLACEMENT_CHARACTER);
                    prop_assert!(!kept.contains(&stop));
                }
                None => prop_assert_eq!(found, free),
            }
        }
    }

    /// What is certain of a text is never taken back, and never part of a character.
    #[test]
    fn pieces_are_whole_characters(seed in 0u64..1000) {
        let config = drawn(seed);
        let generator = generator::<F64>(seed);
        let whole = write(seed, &["漢".into()], &config).remove(0).text;
        let mut text = String::new();
        for piece in generator.generate(&["漢".into()], &config).unwrap() {
            text.push_str(&piece.unwrap().text);
            prop_assert!(whole.starts_with(&text));
        }
        prop_assert_eq!(text, whole);
    }
}

#[test]
fn several_samples_are_several_texts() {
    let mut config = drawn(1);
    config.generation.samples = 3;
    let all = write(5, &["to be".into(), "or".into()], &config);
    assert_eq!(all.len(), 6);
    assert_ne!(all[0].text, all[1].text);
    config.generation.samples = 1;
    let again: Vec<Prompt> = ["to be", "to be", "to be", "or", "or", "or"]
        .map(Prompt::from)
        .into();
    assert_eq!(all, write(5, &again, &config));
}

/// A special token is no text, so that it ends one as a token.
#[test]
fn special_tokens_stop_by_their_names() {
    let end = tokenizer().end_of_text().unwrap();
    let mut config = drawn(1);
    config.generation = config.generation.with_max_new_tokens(100);
    config.generation.temperature = 50.0;
    config.stop_strings = vec![END_OF_TEXT.to_owned()];
    let stopped = (0..40).map(|seed| {
        config.generation.seed = seed;
        write(3, &["to".into()], &config).remove(0)
    });
    let stopped = stopped
        .into_iter()
        .find(|c| c.finish != TextFinish::Length)
        .unwrap();
    assert_eq!(stopped.finish, TextFinish::StopToken(end));
    assert_eq!(ids(&stopped).last(), Some(&end));
    assert!(!stopped.text.contains(END_OF_TEXT));
}

#[test]
fn chats_are_prompts() {
    let template =
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    let template = ChatTemplate::new(template).with_token("bos_token", END_OF_TEXT);
    let generator = generator::<F64>(1).with_template(template);
    let chat = vec![ChatMessage::user("to be?")];
    let text = generator.render(&chat).unwrap();
    assert_eq!(text, format!("{END_OF_TEXT}user: to be?\n"));
    let tokens = generator.tokens(&chat.into()).unwrap();
    assert_eq!(tokens[0], tokenizer().end_of_text().unwrap());
    assert_eq!(tokens, tokenizer().encode(&text).unwrap());
}

#[test]
fn what_cannot_be_written_is_said() {
    let generator = generator::<F64>(1);
    let refused = |prompts: &[Prompt], config: &TextConfig| {
        generator.generate(prompts, config).map(|_| ()).unwrap_err()
    };
    let config = drawn(0);
    let error = refused(&["a".into(), "".into()], &config);
    assert!(
        matches!(error, TextError::EmptyPrompt { row: 1 }),
        "{error}"
    );
    let long = "漢".repeat(200);
    let error = refused(&["a".into(), long.into()], &config);
    let expected = tokenizer().encode(&"漢".repeat(200)).unwrap().len();
    assert!(
        matches!(error, TextError::PromptTooLong { row: 1, tokens, max_new_tokens: 12, max_positions: 128 }
            if tokens == expected),
        "{error}"
    );
    let error = refused(&[vec![ChatMessage::user("a")].into()], &config);
    assert!(
        matches!(error, TextError::Chat(ChatError::NoTemplate)),
        "{error}"
    );
    let error = refused(
        &["a".into()],
        &config.clone().with_stop_strings(vec![String::new()]),
    );
    assert!(
        matches!(error, TextError::EmptyStopString { index: 0 }),
        "{error}"
    );
    let error = refused(&[vec![999].into()], &config);
    assert!(
        matches!(error, TextError::Generate(GenerateError::Forward(_))),
        "{error}"
    );
    let mut cold = config;
    cold.generation.temperature = -1.0;
    let error = refused(&["a".into()], &cold);
    assert!(
        matches!(
            error,
            TextError::Generate(GenerateError::Setting {
                field: "temperature",
                ..
            })
        ),
        "{error}"
    );
}
