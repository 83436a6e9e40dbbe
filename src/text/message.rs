//! What is said in a chat, and by whom.

use minijinja::Value;
use minijinja::value::ValueKind;
use serde::{Deserialize, Serialize};

use super::chat_error::ChatError;

/// Roles that templates know well enough to drop on purpose.
const KNOWN_ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];
/// Names of a message's reasoning; templates read the first, some the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message of a chat: an object with a `role` and mostly a `content`, and whatever else the model's
/// template reads. Reads and writes JSON as in other programs' lists of messages; the order of keys
/// is kept.
///
/// ```
/// use fusedkv::text::ChatMessage;
///
/// let message = ChatMessage::user("How far is the moon?");
/// let same: ChatMessage = serde_json::from_str(
///     r#"{"role": "user", "content": "How far is the moon?"}"#,
/// )?;
/// assert_eq!(message, same);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChatMessage {
    fields: Value,
}

impl ChatMessage {
    /// A message of any role the template knows.
    pub fn new(role: &str, content: &str) -> Self {
        let fields = [("role", role), ("content", content)];
        Self {
            fields: fields.into_iter().collect(),
        }
    }

    /// What the model is told to be.
    pub fn system(content: &str) -> Self {
        Self::new("system", content)
    }

    /// What the model is asked.
    pub fn user(content: &str) -> Self {
        Self::new("user", content)
    }

    /// What the model has said.
    pub fn assistant(content: &str) -> Self {
        Self::new("assistant", content)
    }

    /// The message with another field, e.g. `tool_calls`, or another value of one it has.
    #[must_use]
    pub fn with(self, key: &str, value: impl Serialize) -> Self {
        let mut entries = self.entries();
        let value = Value::from_serialize(value);
        match entries.iter_mut().find(|(known, _)| known == key) {
            Some(entry) => entry.1 = value,
            None => entries.push((key.to_owned(), value)),
        }
        Self {
            fields: entries.into_iter().collect(),
        }
    }

    /// Who says it; none if it is no message.
    pub fn role(&self) -> Option<String> {
        Some(self.fields.get_attr("role").ok()?.as_str()?.to_owned())
    }

    /// What is said, where that is text and not a list of parts.
    pub fn content(&self) -> Option<String> {
        Some(self.fields.get_attr("content").ok()?.as_str()?.to_owned())
    }

    fn entries(&self) -> Vec<(String, Value)> {
        let keys = self.fields.try_iter().into_iter().flatten();
        keys.filter_map(|key| {
            let value = self.fields.get_item(&key).ok()?;
            Some((key.as_str()?.to_owned(), value))
        })
        .collect()
    }

    /// What a template is given, as transformers gives it: without what is null, and reasoning by
    /// every name it is read under.
    pub(super) fn for_template(&self, index: usize) -> Result<Value, ChatError> {
        let wrong = |reason| ChatError::Message { index, reason };
        if self.fields.kind() != ValueKind::Map {
            return Err(wrong("is no object"));
        }
        if self.role().is_none() {
            return Err(wrong("has no role, expected a text"));
        }
        let mut entries = self.entries();
        entries.retain(|(_, value)| !value.is_none());
        let named = |name: &str| entries.iter().find(|(key, _)| key == name);
        if let Some((_, reasoning)) = REASONING.iter().find_map(|name| named(name)) {
            let reasoning = reasoning.clone();
            if named(REASONING[1]).is_none() {
                entries.insert(0, (REASONING[1].to_owned(), reasoning.clone()));
            }
            entries.retain(|(key, _)| key != REASONING[0]);
            entries.push((REASONING[0].to_owned(), reasoning));
        }
        Ok(entries.into_iter().collect())
    }

    pub(super) fn has_known_role(&self) -> bool {
        let role = self.role();
        role.is_some_and(|role| KNOWN_ROLES.contains(&&*role))
    }
}
