//! What Python would write: chat templates are Jinja's, and show Python's values.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Spaces that JSON is indented by at most.
const MOST_INDENT: usize = 64;

/// `str(value)`.
pub(super) fn str_of(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => repr(value),
    }
}

/// `repr(value)`; what is undefined is empty.
fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => (if value.is_true() { "True" } else { "False" }).to_owned(),
        ValueKind::Number => number(value),
        ValueKind::String => repr_str(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<_> = items(value).iter().map(repr).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let entry = |(key, value): &(Value, Value)| format!("{}: {}", repr(key), repr(value));
            let entries: Vec<_> = entries(value).iter().map(entry).collect();
            format!("{{{}}}", entries.join(", "))
        }
        _ => value.to_string(),
    }
}

fn repr_str(text: &str) -> String {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || ('\x7f'..='\u{a0}').contains(&c) => {
                out.push_str(&format!("\\x{:02x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

fn number(value: &Value) -> String {
    match value.is_integer() {
        true => value.to_string(),
        false => f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float),
    }
}

/// The shortest digits that are this number, as Python writes them.
fn float(x: f64) -> String {
    if !x.is_finite() {
        return x.to_string().to_lowercase();
    }
    let scientific = format!("{x:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    match exponent.parse::<i32>() {
        Ok(exponent @ (..-4 | 16..)) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ if x.fract() == 0.0 => format!("{x:.1}"),
        _ => x.to_string(),
    }
}

fn items(value: &Value) -> Vec<Value> {
    value.try_iter().map(Iterator::collect).unwrap_or_default()
}

fn entries(map: &Value) -> Vec<(Value, Value)> {
    let value = |key: Value| {
        let value = map.get_item(&key).unwrap_or_default();
        (key, value)
    };
    items(map).into_iter().map(value).collect()
}

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, which is
/// Python's `json.dumps`.
pub(super) fn to_json(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let named = |index: usize, name: &str| -> Result<Value, Error> {
        match args.get(index) {
            Some(value) => Ok(value.clone()),
            None => Ok(kwargs.get::<Option<Value>>(name)?.unwrap_or_default()),
        }
    };
    let [ascii, indent, separators, sort_keys] = [
        named(0, "ensure_ascii")?,
        named(1, "indent")?,
        named(2, "separators")?,
        named(3, "sort_keys")?,
    ];
    kwargs.assert_all_used()?;
    let indent = match indent.kind() {
        ValueKind::None | ValueKind::Undefined => None,
        ValueKind::String => Some(str_of(&indent)),
        _ => {
            let spaces = usize::try_from(indent)?;
            if spaces > MOST_INDENT {
                let message =
                    format!("an indent of {spaces} spaces, expected at most {MOST_INDENT}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
            Some(" ".repeat(spaces))
        }
    };
    let (item, key) = match separators.kind() {
        ValueKind::None | ValueKind::Undefined => {
            let item = if indent.is_some() { "," } else { ", " };
            (item.to_owned(), ": ".to_owned())
        }
        _ => {
            let part = |index| {
                separators
                    .get_item(&Value::from(index))
                    .map(|part| str_of(&part))
            };
            (part(0)?, part(1)?)
        }
    };
    let json = Json {
        ascii: ascii.is_true(),
        sort_keys: sort_keys.is_true(),
        indent,
        item,
        key,
    };
    let mut out = String::new();
    json.write(value, 0, &mut out)?;
    Ok(out)
}

struct Json {
    ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    /// Between items, and between a key and its value.
    item: String,
    key: String,
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&match &*number(value) {
                "nan" => "NaN".to_owned(),
                "inf" => "Infinity".to_owned(),
                "-inf" => "-Infinity".to_owned(),
                number => number.to_owned(),
            }),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                self.all('[', ']', &items(value), depth, out, |value, out| {
                    self.write(value, depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut entries = entries(value);
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| str_of(key));
                }
                self.all('{', '}', &entries, depth, out, |(key, value), out| {
                    match key.kind() {
                        ValueKind::None => self.string("null", out),
                        ValueKind::Bool => self.string(&key.to_string(), out),
                        _ => self.string(&str_of(key), out),
                    }
                    out.push_str(&self.key);
                    self.write(value, depth + 1, out)
                })?;
            }
            kind => {
                let message = format!("a value of type {kind} has no JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn all<T>(
        &self,
        open: char,
        close: char,
        all: &[T],
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (i, one) in all.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item);
            }
            self.line(depth + 1, out);
            write(one, out)?;
        }
        if !all.is_empty() {
            self.line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\x08' => out.push_str("\\b"),
                '\x0c' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c >= '\x7f') => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// What `str.strip` takes away.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}
