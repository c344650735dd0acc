//! Values as Python writes them, and the methods of Python's strings that templates call.

use std::fmt::Write;

use minijinja::value::{DynObject, Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Lists and dictionaries in one another: more than `serde_json` reads, so that no conversation reaches it.
const DEEPEST: usize = 160;
/// The depth that is left inside a list or a dictionary.
fn deeper(depth: usize) -> Result<usize, Error> {
    depth.checked_sub(1).ok_or_else(|| {
        let message = format!("lists and dictionaries are nested more than {DEEPEST} deep");
        Error::new(ErrorKind::InvalidOperation, message)
    })
}

/// Python's `str`.
pub(crate) fn str(state: &State, value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None if value.is_undefined() => Ok(String::new()),
        None => {
            let mut out = String::new();
            repr(state, value, &mut out, DEEPEST)?;
            Ok(out)
        }
    }
}

/// Python's `repr`.
fn repr(state: &State, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value, "inf", "nan")),
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            // A list can stand in another many times over.
            state.consume_fuel(1)?;
            let depth = deeper(depth)?;
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut items = 0;
            for item in value.try_iter()? {
                out.push_str(if items > 0 { ", " } else { "" });
                repr(state, &item, out, depth)?;
                items += 1;
            }
            if items == 1 && value.is_tuple() {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            state.consume_fuel(1)?;
            let depth = deeper(depth)?;
            out.push('{');
            let mut first = true;
            let pairs = value.as_object().and_then(DynObject::try_iter_pairs);
            for (key, entry) in pairs.into_iter().flatten() {
                out.push_str(if first { "" } else { ", " });
                first = false;
                repr(state, &key, out, depth)?;
                out.push_str(": ");
                repr(state, &entry, out, depth)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// A string as Python's `repr` writes it.
fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            character if character == quote => out.extend(['\\', character]),
            character if is_printable(character) => out.push(character),
            character => {
                // Writing to a string does not fail.
                let _ = match u32::from(character) {
                    code @ ..0x100 => write!(out, "\\x{code:02x}"),
                    code @ ..0x1_0000 => write!(out, "\\u{code:04x}"),
                    code => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable`, whose table Rust has for its own escapes. Behind another character a combining one is not
/// escaped for being one.
fn is_printable(character: char) -> bool {
    let text: String = ['a', character].iter().collect();
    matches!(character, '\'' | '"' | '\\') || text.escape_debug().nth(1) != Some('\\')
}

/// A number as Python writes it.
fn number(value: &Value, infinite: &str, no_number: &str) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => {
            if float.is_nan() {
                no_number.to_owned()
            } else if float.is_infinite() {
                let sign = if float < 0.0 { "-" } else { "" };
                format!("{sign}{infinite}")
            } else {
                finite(float)
            }
        }
        _ => value.to_string(),
    }
}

/// Python's `repr` of a float: the fewest digits that make it, with an exponent where it is below -4 or from 16 on.
fn finite(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(-4..16) | Err(_) => format!("{float:?}"),
        Ok(exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
    }
}

/// How `json.dumps` writes.
struct Json {
    ensure_ascii: bool,
    /// What a level is indented by; without it all stands on one line.
    indent: Option<String>,
    between_items: String,
    after_key: String,
    sort_keys: bool,
}

/// transformers' `tojson`: `json.dumps` with its arguments, and no escapes for HTML.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands arguments over by value"
)]
pub(crate) fn tojson(
    state: &State,
    value: &Value,
    positional: Rest<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let argument = |at: usize, name: &str| -> Result<Value, Error> {
        match positional.get(at) {
            Some(value) => Ok(value.clone()),
            None => Ok(named.get::<Option<Value>>(name)?.unwrap_or_default()),
        }
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_true();
    let indent = argument(1, "indent")?;
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?.is_true();
    named.assert_all_used()?;
    let invalid = |message: &str| Error::new(ErrorKind::InvalidOperation, message.to_owned());
    let indent = match indent.as_str() {
        _ if indent.is_none() || indent.is_undefined() => None,
        Some(text) => Some(text.to_owned()),
        None => {
            let width = indent.as_i64().ok_or_else(|| invalid("indent is no integer"))?;
            Some(" ".repeat(width.clamp(0, 64) as usize))
        }
    };
    let item = if indent.is_some() { "," } else { ", " };
    let (between_items, after_key) = if separators.is_none() || separators.is_undefined() {
        (item.to_owned(), ": ".to_owned())
    } else {
        let both: Vec<Value> = separators.try_iter()?.collect();
        match &both[..] {
            [item, key] => (str(state, item)?, str(state, key)?),
            _ => return Err(invalid("separators are not two")),
        }
    };
    let json = Json {
        ensure_ascii,
        indent,
        between_items,
        after_key,
        sort_keys,
    };
    let mut out = String::new();
    json.write(state, value, &mut out, DEEPEST)?;
    Ok(Value::from(out))
}

impl Json {
    fn write(&self, state: &State, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value, "Infinity", "NaN")),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let inner = deeper(depth)?;
                state.consume_fuel(1)?;
                out.push('[');
                let mut first = true;
                for item in value.try_iter()? {
                    self.begin(first, inner, out);
                    first = false;
                    self.write(state, &item, out, inner)?;
                }
                self.end(first, depth, out);
                out.push(']');
            }
            ValueKind::Map => {
                let inner = deeper(depth)?;
                state.consume_fuel(1)?;
                let pairs = value.as_object().and_then(DynObject::try_iter_pairs);
                let mut pairs: Vec<_> = pairs.into_iter().flatten().collect();
                if self.sort_keys {
                    pairs.sort_by(|(left, _), (right, _)| left.cmp(right));
                }
                out.push('{');
                let mut first = true;
                for (key, entry) in pairs {
                    self.begin(first, inner, out);
                    first = false;
                    self.key(state, &key, out)?;
                    out.push_str(&self.after_key);
                    self.write(state, &entry, out, inner)?;
                }
                self.end(first, depth, out);
                out.push('}');
            }
            kind => return Err(no_json(kind)),
        }
        Ok(())
    }

    fn key(&self, state: &State, key: &Value, out: &mut String) -> Result<(), Error> {
        match key.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                out.push('"');
                self.write(state, key, out, 0)?;
                out.push('"');
            }
            ValueKind::String => self.string(key.as_str().unwrap_or_default(), out),
            kind => return Err(no_json(kind)),
        }
        Ok(())
    }

    fn begin(&self, first: bool, depth: usize, out: &mut String) {
        if !first {
            out.push_str(&self.between_items);
        }
        self.line(depth, out);
    }

    fn end(&self, empty: bool, depth: usize, out: &mut String) {
        if !empty {
            self.line(depth, out);
        }
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), DEEPEST - depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                ' '..='~' => out.push(character),
                character if character >= ' ' && !self.ensure_ascii => out.push(character),
                character => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        // Writing to a string does not fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
            }
        }
        out.push('"');
    }
}

fn no_json(kind: ValueKind) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("a {kind} cannot be JSON"))
}

/// Python's methods: those of minijinja-contrib, and others of strings.
pub(crate) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(state, text, name, args)?
    {
        return Ok(result);
    }
    unknown_method_callback(state, value, name, args)
}

fn string_method(state: &State, text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let three = |a: &str, b: &str, c: &str| Value::from(Tuple::from([a, b, c].map(Value::from)));
    let result = match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            text.split_once(separator)
                .map_or_else(|| three(text, "", ""), |(a, b)| three(a, separator, b))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            text.rsplit_once(separator)
                .map_or_else(|| three("", "", text), |(a, b)| three(a, separator, b))
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let missing = width.saturating_sub(text.chars().count());
            state.consume_fuel(missing as u64 / 16)?;
            let fill = if name == "zfill" { "0" } else { fill.unwrap_or(" ") };
            if fill.chars().count() != 1 {
                let message = "the fill character must be exactly one character long";
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
            let left = match name {
                "ljust" => 0,
                // CPython's rule for the odd one.
                "center" => missing / 2 + (missing & width & 1),
                _ => missing,
            };
            let sign = text.len() - text.strip_prefix(['+', '-']).unwrap_or(text).len();
            let (before, after) = text.split_at(if name == "zfill" { sign } else { 0 });
            let (left, right) = (fill.repeat(left), fill.repeat(missing - left));
            Value::from(format!("{before}{left}{after}{right}"))
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}
