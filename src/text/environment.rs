//! What templates find around them: transformers' environment of Jinja, with Python's spelling.

use std::error::Error as _;
use std::fmt;

use jiff::Zoned;
use jiff::civil::DateTime;
use jiff::fmt::strtime;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat;

use super::chat_error::ChatError;
use super::python;

/// Steps that a template may take: some hundred times those of a long chat, a second or so. Templates
/// come with models, and one must not be able to hold a program up.
const FUEL: u64 = 20_000_000;

/// What transformers' environment has: blocks take their line with them, and Python's methods,
/// spelling and JSON.
pub(super) fn environment(now: Option<DateTime>) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
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

/// A template that is no Jinja.
pub(super) fn invalid(error: &Error) -> ChatError {
    ChatError::Syntax {
        line: error.line().unwrap_or(1),
        message: described(error),
    }
}

/// A template that cannot be rendered, or that refuses.
pub(super) fn failed(error: &Error) -> ChatError {
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
            // Pycompat's goes on for ever.
            ("count", Some("")) => return Ok((text.chars().count() + 1).into()),
            // Pycompat's are places of bytes, where a slice is one of characters.
            ("find", Some(part)) if args.len() == 1 => return Ok(place(text, text.find(part))),
            ("rfind", Some(part)) if args.len() == 1 => return Ok(place(text, text.rfind(part))),
            _ => {}
        }
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

/// How many characters stand before byte `at`, −1 where there is none.
fn place(text: &str, at: Option<usize>) -> Value {
    at.map_or(-1, |at| text[..at].chars().count() as i64).into()
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
