//! The answers of a chat, to learn them.

use super::chat_error::ChatError;
use super::message::ChatMessage;
use super::template::{ChatOptions, ChatTemplate};

/// Who answers.
const ASSISTANT: &str = "assistant";

/// What a model is to write, and what it reads when it is asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatAnswer {
    /// The messages before, and the beginning of an answer.
    pub prompt: String,
    /// What is behind that, up to the end of the message.
    pub answer: String,
}

impl ChatTemplate {
    /// The answers of a chat, messages of the role `assistant`, each behind what a model reads when it
    /// is asked for it: the messages before, rendered with the beginning of an answer. What is behind
    /// in a rendering of the messages up to it, is the answer: its content, the mark of its end, and
    /// whatever else the template writes of it there.
    ///
    /// ```
    /// use fusedkv::text::{ChatMessage, ChatOptions, ChatTemplate};
    ///
    /// let template = ChatTemplate::new(
    ///     "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}\
    ///      {% if add_generation_prompt %}<assistant>{% endif %}",
    /// );
    /// let chat = [ChatMessage::user("1 + 1?"), ChatMessage::assistant("2.")];
    /// let answers = template.answers(&chat, &ChatOptions::new())?;
    /// assert_eq!(answers[0].prompt, "<user>1 + 1?</s><assistant>");
    /// assert_eq!(answers[0].answer, "2.</s>");
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
    ) -> Result<Vec<ChatAnswer>, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        let options = options.clone().at_one_time();
        let asking = options.clone().with_generation_prompt(true);
        let answered = options.with_generation_prompt(false);
        let mut answers = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            if message.role().as_deref() != Some(ASSISTANT) {
                continue;
            }
            if index == 0 {
                return Err(ChatError::Opening);
            }
            let prompt = self.render(&messages[..index], &asking)?;
            let text = self.render(&messages[..=index], &answered)?;
            let answer = text.strip_prefix(&prompt);
            let answer = answer.ok_or(ChatError::Beginning { index })?.to_owned();
            answers.push(ChatAnswer { prompt, answer });
        }
        match answers.is_empty() {
            true => Err(ChatError::NoAnswer),
            false => Ok(answers),
        }
    }
}
