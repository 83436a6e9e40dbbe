//! Where in a chat the answers are, to learn them.

use std::ops::Range;

use super::chat_error::ChatError;
use super::message::ChatMessage;
use super::template::{ChatOptions, ChatTemplate};

/// Who answers.
const ASSISTANT: &str = "assistant";

/// A chat as a model reads it, and where in it the answers are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnsweredText {
    /// The text, up to the end of the last answer.
    pub text: String,
    /// The bytes of each answer: from where a model that is asked for it begins to write, to where its
    /// message ends, the mark of its end included.
    pub answers: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// A chat as texts of which the answers can be learned, those of the role `assistant`: each once,
    /// behind the very text that a model reads when it is asked for it.
    ///
    /// Mostly that is one text. A template that writes an answer otherwise once the chat has gone on,
    /// as Qwen3's leaves out what was thought, gives several, of which each begins like the ones
    /// before. An answer is found by rendering the messages before it, with the beginning of an answer,
    /// and those up to it. Messages after the last answer are left out.
    ///
    /// ```
    /// use fusedkv::text::{ChatMessage, ChatOptions, ChatTemplate};
    ///
    /// let template = ChatTemplate::new(
    ///     "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}\
    ///      {% if add_generation_prompt %}<assistant>{% endif %}",
    /// );
    /// let chat = [ChatMessage::user("1 + 1?"), ChatMessage::assistant("2.")];
    /// let texts = template.answers(&chat, &ChatOptions::new())?;
    /// assert_eq!(texts.len(), 1);
    /// assert_eq!(&texts[0].text[texts[0].answers[0].clone()], "2.</s>");
    /// # Ok::<(), fusedkv::text::ChatError>(())
    /// ```
    ///
    /// # Errors
    /// As [`render`](Self::render) of the messages up to any answer; [`ChatError::NoAnswer`] if there
    /// is none; [`ChatError::Opening`] if the first message is one; [`ChatError::Beginning`] for a
    /// template that does not write an answer behind what it writes to ask for one.
    pub fn answers(
        &self,
        messages: &[ChatMessage],
        options: &ChatOptions,
    ) -> Result<Vec<AnsweredText>, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        let options = options.clone().at_one_time();
        let asking = options.clone().with_generation_prompt(true);
        let answered = options.with_generation_prompt(false);
        let mut texts: Vec<AnsweredText> = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            if message.role().as_deref() != Some(ASSISTANT) {
                continue;
            }
            if index == 0 {
                return Err(ChatError::Opening);
            }
            let before = self.render(&messages[..index], &asking)?;
            let text = self.render(&messages[..=index], &answered)?;
            if !text.starts_with(&before) {
                return Err(ChatError::Beginning { index });
            }
            let answer = before.len()..text.len();
            match texts.last_mut() {
                Some(last) if before.starts_with(&last.text) => {
                    last.text = text;
                    last.answers.push(answer);
                }
                _ => texts.push(AnsweredText {
                    text,
                    answers: vec![answer],
                }),
            }
        }
        match texts.is_empty() {
            true => Err(ChatError::NoAnswer),
            false => Ok(texts),
        }
    }
}
