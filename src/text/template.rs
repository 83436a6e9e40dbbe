//! A model's own chat template: messages to a prompt, as transformers' `apply_chat_template` renders
//! them.

use std::collections::BTreeMap;

use jiff::Zoned;
use jiff::civil::DateTime;
use minijinja::Value;
use serde::Serialize;

use super::chat_error::ChatError;
use super::environment::{environment, failed, invalid};
use super::message::ChatMessage;

/// The name of the template that is taken where none is named.
pub(super) const DEFAULT: &str = "default";
/// The template that is taken for chats with tools, where there is one.
const TOOL_USE: &str = "tool_use";

/// The chat templates of a model: Jinja programs that write messages as the model was trained to
/// read them.
///
/// ```
/// use fusedkv::text::{ChatMessage, ChatOptions, ChatTemplate};
///
/// let template = ChatTemplate::new(
///     "{% for message in messages %}\n\
///      <{{ message.role }}> {{ message['content'].strip() }}\n\
///      {% endfor %}\n",
/// );
/// let text = template.render(&[ChatMessage::user("Hello ")], &ChatOptions::new())?;
/// assert_eq!(text, "<user> Hello\n");
/// # Ok::<(), fusedkv::text::ChatError>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    /// By name.
    sources: BTreeMap<String, String>,
    /// What special tokens are called, as in "bos_token".
    tokens: BTreeMap<String, String>,
}

/// What a template is told besides the messages.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    template: Option<String>,
    without_generation_prompt: bool,
    tools: Option<Value>,
    variables: Vec<(String, Value)>,
    now: Option<DateTime>,
}

impl ChatOptions {
    /// The template called `default`, ending with the beginning of an answer, no tools.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the template of this name.
    #[must_use]
    pub fn with_template(mut self, name: &str) -> Self {
        self.template = Some(name.to_owned());
        self
    }

    /// Whether the text ends with the beginning of an answer, `add_generation_prompt`.
    #[must_use]
    pub fn with_generation_prompt(mut self, wanted: bool) -> Self {
        self.without_generation_prompt = !wanted;
        self
    }

    /// Functions the model may call, a list of JSON schemas.
    #[must_use]
    pub fn with_tools(mut self, tools: impl Serialize) -> Self {
        self.tools = Some(Value::from_serialize(tools));
        self
    }

    /// A variable of the template, e.g. `enable_thinking`.
    #[must_use]
    pub fn with_variable(mut self, name: &str, value: impl Serialize) -> Self {
        self.variables
            .push((name.to_owned(), Value::from_serialize(value)));
        self
    }

    /// What time templates that write the date (`strftime_now`) take it to be; the system's local
    /// time otherwise.
    #[must_use]
    pub fn with_now(mut self, now: DateTime) -> Self {
        self.now = Some(now);
        self
    }

    /// The same, with the time that it is now where it was not set: for texts that must agree.
    pub(crate) fn at_one_time(mut self) -> Self {
        self.now.get_or_insert_with(|| Zoned::now().datetime());
        self
    }
}

impl ChatTemplate {
    /// A single template.
    pub fn new(source: &str) -> Self {
        Self::named([(DEFAULT.to_owned(), source.to_owned())].into())
    }

    pub(super) fn named(sources: BTreeMap<String, String>) -> Self {
        Self {
            sources,
            tokens: BTreeMap::new(),
        }
    }

    /// The template with a special token that it may write, called e.g. `bos_token`.
    #[must_use]
    pub fn with_token(mut self, name: &str, token: &str) -> Self {
        self.tokens.insert(name.to_owned(), token.to_owned());
        self
    }

    /// Renders a chat.
    ///
    /// # Errors
    /// [`ChatError`] if there are no messages, one is none, or has a role that the template leaves
    /// out, or the template is missing, is wrong, fails, or refuses the messages.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        options: &ChatOptions,
    ) -> Result<String, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        let values = messages.iter().enumerate();
        let values = values.map(|(index, message)| message.for_template(index));
        let values = values.collect::<Result<Vec<_>, _>>()?;
        let source = with_generation_blocks(self.source(options)?);
        let env = environment(options.now);
        let template = env.template_from_named_str("chat", &source);
        let template = template.map_err(|error| invalid(&error))?;
        let render = |messages: &[Value]| {
            let variables = self.variables(messages, options);
            template.render(variables).map_err(|error| failed(&error))
        };
        let text = render(&values)?;
        // Templates are lists of cases, and many say nothing of a role that is none of them.
        let named = messages.iter().enumerate();
        for (index, message) in named.filter(|(_, message)| !message.has_known_role()) {
            let mut others = values.clone();
            others.remove(index);
            if render(&others).as_ref() == Ok(&text) {
                return Err(ChatError::UnknownRole {
                    index,
                    role: message.role().unwrap_or_default(),
                });
            }
        }
        Ok(text)
    }

    fn source(&self, options: &ChatOptions) -> Result<&str, ChatError> {
        let wanted = match &options.template {
            Some(name) => name,
            None if options.tools.is_some() && self.sources.contains_key(TOOL_USE) => TOOL_USE,
            None => DEFAULT,
        };
        let source = self.sources.get(wanted).map(String::as_str);
        source.ok_or_else(|| ChatError::UnknownTemplate {
            name: wanted.to_owned(),
            known: self.sources.keys().cloned().collect(),
        })
    }

    fn variables(&self, messages: &[Value], options: &ChatOptions) -> Value {
        let tokens = self.tokens.iter();
        let tokens = tokens.map(|(name, token)| (name.clone(), Value::from(token.clone())));
        let mut variables: BTreeMap<String, Value> = tokens.collect();
        variables.extend(options.variables.iter().cloned());
        for (name, value) in [
            ("messages", Value::from(messages.to_vec())),
            ("tools", options.tools.clone().unwrap_or(Value::from(()))),
            (
                "add_generation_prompt",
                Value::from(!options.without_generation_prompt),
            ),
        ] {
            variables.insert(name.to_owned(), value);
        }
        variables
            .entry("documents".to_owned())
            .or_insert(Value::from(()));
        Value::from(variables)
    }
}

/// `{% generation %}` marks what the model has said, for training. It is a scope of its own, as
/// `with` is.
fn with_generation_blocks(source: &str) -> String {
    let source = source.replace("\r\n", "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = &source[..];
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let end = tag.find("%}").unwrap_or(tag.len());
        let (tag, after) = tag.split_at(end);
        out.push_str(before);
        let name = tag[2..].trim_matches(|c: char| c.is_whitespace() || "+-".contains(c));
        match name {
            "generation" => out.push_str(&tag.replacen(name, "with", 1)),
            "endgeneration" => out.push_str(&tag.replacen(name, "endwith", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}
