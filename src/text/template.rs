//! A model's own chat template: messages to a prompt, as transformers' `apply_chat_template` renders
//! them.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;

use jiff::Zoned;
use jiff::civil::DateTime;
use jiff::fmt::strtime;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat;
use serde::Serialize;

use super::chat_error::ChatError;
use super::message::ChatMessage;
use super::python;

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
        let template = template.map_err(|error| ChatError::Syntax {
            line: error.line().unwrap_or(1),
            message: described(&error),
        })?;
        let render = |messages: &[Value]| {
            let variables = self.variables(messages, options);
            template.render(variables).map_err(|error| failed(&error))
        };
        let text = render(&values)?;
        // Templates are lists of cases, and many say nothing of a role that is none of them.
        for (index, message) in messages.iter().enumerate() {
            let mut others = values.clone();
            others.remove(index);
            if !message.has_known_role() && render(&others).as_ref() == Ok(&text) {
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

/// What transformers' environment has: blocks take their line with them, and Python's methods,
/// spelling and JSON.
fn environment(now: Option<DateTime>) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_unknown_method_callback(method);
    env.set_formatter(write);
    env.add_filter("tojson", python::to_json);
    env.add_filter("string", |value: &Value| python::str_of(value));
    env.add_filter("trim", |value: &Value, chars: Option<String>| {
        strip(&python::str_of(value), chars.as_deref(), true, true)
    });
    for name in ["length", "count"] {
        env.add_filter(name, length);
    }
    // None has no items, which minijinja forgives.
    env.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    // Whatever has a length and items.
    env.add_test("sequence", |value: &Value| {
        let kind = value.kind();
        matches!(kind, ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    env.add_function(
        "raise_exception",
        |message: &Value| -> Result<Value, Error> {
            let raised = Raised(python::str_of(message));
            Err(Error::new(ErrorKind::InvalidOperation, raised.0.clone()).with_source(raised))
        },
    );
    env.add_function("strftime_now", move |format: &str| {
        let now = now.unwrap_or_else(|| Zoned::now().datetime());
        let wrong = |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, error.to_string());
        strtime::format(format, now).map_err(wrong)
    });
    env
}

/// Python's `len`; what is undefined has none of anything.
fn length(value: &Value) -> Result<usize, Error> {
    let len = if value.is_undefined() {
        Some(0)
    } else {
        value.len()
    };
    len.ok_or_else(|| {
        let message = format!("a value of type {} has no length", value.kind());
        Error::new(ErrorKind::InvalidOperation, message)
    })
}

/// What a template raised.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn failed(error: &Error) -> ChatError {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return ChatError::Refused(message.clone());
        }
        source = error.source();
    }
    ChatError::Render {
        line: error.line().unwrap_or(1),
        message: described(error),
    }
}

fn described(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// `{{ value }}`.
fn write(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python::str_of(value)),
    }
    .map_err(Error::from)
}

/// Python's methods.
fn method(
    state: &State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        let arg = args.first().and_then(Value::as_str);
        match (name, arg) {
            ("strip", chars) => return Ok(strip(text, chars, true, true)),
            ("lstrip", chars) => return Ok(strip(text, chars, true, false)),
            ("rstrip", chars) => return Ok(strip(text, chars, false, true)),
            ("removeprefix", Some(prefix)) => {
                return Ok(text.strip_prefix(prefix).unwrap_or(text).into());
            }
            ("removesuffix", Some(suffix)) => {
                return Ok(text.strip_suffix(suffix).unwrap_or(text).into());
            }
            _ => {}
        }
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

fn strip(text: &str, chars: Option<&str>, start: bool, end: bool) -> Value {
    let stripped = |c: char| chars.map_or(python::is_space(c), |chars| chars.contains(c));
    let text = if start {
        text.trim_start_matches(stripped)
    } else {
        text
    };
    let text = if end {
        text.trim_end_matches(stripped)
    } else {
        text
    };
    Value::from(text)
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
