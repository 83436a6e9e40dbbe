//! Answers through a cache that is kept.

use std::panic::{AssertUnwindSafe, catch_unwind};

use fusedkv::backend::Flex;
use fusedkv::text::{ChatMessage, ChatTemplate, Conversation, Prompt, TextConfig, TextError};
use fusedkv::{CacheDtype, FusedKvCache, GenerateError};
use proptest::prelude::*;

use super::generator;
use crate::models::F64;

fn drawn(seed: u64, tokens: usize) -> TextConfig {
    let mut config = generator::<F64>(0).defaults().clone();
    config.generation = config
        .generation
        .with_max_new_tokens(tokens)
        .with_temperature(1.0)
        .with_seed(seed);
    config
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the cache has in common with a prompt, the text is that of a prompt read from its
    /// beginning.
    #[test]
    fn what_is_kept_changes_no_text(
        seed in 0u64..1000,
        prompts in prop::collection::vec("(to|be| |or){1,8}", 1..6),
        stop in "(to|be|[a-z])",
    ) {
        let generator = generator::<F64>(seed);
        let config = drawn(seed, 8).with_stop_strings(vec![stop]);
        let mut conversation = generator.conversation(64, CacheDtype::Model).unwrap();
        for prompt in prompts {
            let before = conversation.tokens().to_vec();
            let prompt = Prompt::from(prompt);
            let tokens = generator.tokens(&prompt).unwrap();
            let found = conversation.write(prompt.clone(), &config).unwrap();
            let fresh = generator.generate(&[prompt], &config).unwrap().completions().unwrap();
            prop_assert_eq!(&[found][..], &fresh[..]);
            let common = before.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
            prop_assert_eq!(conversation.reused(), common.min(tokens.len() - 1));
            prop_assert_eq!(conversation.tokens().len(), conversation.cache().unwrap().len());
        }
    }
}

/// Of a chat that goes on only what is new is read.
#[test]
fn a_chat_goes_on() {
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]";
    let generator = generator::<F64>(2).with_template(ChatTemplate::new(template));
    let mut config = drawn(1, 6);
    // Letters alone, so that the text is tokens again as it was.
    config.generation.temperature = 0.0;
    let mut conversation = generator.conversation(120, CacheDtype::Model).unwrap();
    let mut chat = vec![ChatMessage::user("to be")];
    let first = conversation.write(&chat[..], &config).unwrap();
    let read = generator.tokens(&chat.clone().into()).unwrap().len();
    chat.push(ChatMessage::assistant(&first.text));
    chat.push(ChatMessage::user("or not"));
    let fresh = generator
        .generate(&[chat.clone().into()], &config)
        .unwrap()
        .completions()
        .unwrap();
    let second = conversation.write(&chat[..], &config).unwrap();
    assert!(
        conversation.reused() >= read,
        "{} of {read}",
        conversation.reused()
    );
    assert_eq!([second], fresh[..]);
}

#[test]
fn a_conversation_goes_on_after_an_error() {
    let generator = generator::<F64>(2);
    let mut conversation = generator.conversation(24, CacheDtype::Model).unwrap();
    let config = drawn(3, 6);
    let expected = conversation.write("to be", &config).unwrap();

    let error = conversation.write("x".repeat(20), &config).unwrap_err();
    assert!(
        matches!(
            error,
            TextError::ConversationTooLong {
                tokens: 20,
                max_new_tokens: 6,
                capacity: 24
            }
        ),
        "{error}"
    );
    let mut several = config.clone();
    several.generation.samples = 2;
    let error = conversation.write("to be", &several).unwrap_err();
    assert!(
        matches!(
            error,
            TextError::Generate(GenerateError::Setting {
                field: "samples",
                ..
            })
        ),
        "{error}"
    );
    let mut pieces = 0;
    let error = conversation.write_with("to be", &config, |_| {
        pieces += 1;
        if pieces == 3 {
            Err(TextError::EmptyPrompt { row: 9 })
        } else {
            Ok(())
        }
    });
    assert!(matches!(error, Err(TextError::EmptyPrompt { row: 9 })));
    assert_eq!(pieces, 3);
    assert_eq!(conversation.write("to be", &config).unwrap(), expected);
    assert!(conversation.reused() > 0);
}

#[test]
fn a_conversation_keeps_its_numbers_after_a_panic() {
    let generator = generator::<Flex>(2);
    let config = drawn(3, 6);
    for dtype in [CacheDtype::F16, CacheDtype::Int8] {
        let mut conversation = generator.conversation(24, dtype).unwrap();
        let expected = conversation.write("to be", &config).unwrap();
        let bytes = |of: &Conversation<'_, _>| of.cache().map(FusedKvCache::bytes_allocated);
        let before = bytes(&conversation);
        let panic = AssertUnwindSafe(|| {
            conversation.write_with("to be", &config, |_| -> Result<(), TextError> {
                panic!("in the middle")
            })
        });
        catch_unwind(panic).unwrap_err();
        assert_eq!(bytes(&conversation), None);
        assert_eq!(conversation.write("to be", &config).unwrap(), expected);
        assert_eq!(bytes(&conversation), before);
    }
}
