//! Lists of Python calls: `[f(x=1, y='a')]`.

use serde_json::{Map, Value};

/// Values nested deeper are refused.
pub(super) const DEEPEST: usize = 64;

/// The calls of a list, with their named arguments as a JSON object; none where it is no such list.
pub(super) fn calls(body: &str) -> Option<Vec<(String, String)>> {
    let mut reader = Reader {
        rest: body.trim(),
        depth: 0,
    };
    reader.eat("[")?;
    let mut calls = Vec::new();
    while reader.eat("]").is_none() {
        let name = reader.name()?.to_owned();
        reader.eat("(")?;
        let mut object = Map::new();
        while reader.eat(")").is_none() {
            let key = reader.name()?.to_owned();
            reader.eat("=")?;
            object.insert(key, reader.value()?);
            reader.next_or(')')?;
        }
        calls.push((name, Value::Object(object).to_string()));
        reader.next_or(']')?;
    }
    (reader.rest.is_empty() && !calls.is_empty()).then_some(calls)
}

/// A literal; none where the text is no such, or a lone word.
pub(super) fn value(text: &str) -> Option<Value> {
    let mut reader = Reader {
        rest: text.trim(),
        depth: 0,
    };
    let value = reader.value()?;
    (reader.rest.is_empty() && !value.is_string()).then_some(value)
}

struct Reader<'a> {
    rest: &'a str,
    depth: usize,
}

impl<'a> Reader<'a> {
    fn eat(&mut self, text: &str) -> Option<()> {
        self.rest = self.rest.strip_prefix(text)?.trim_start();
        Some(())
    }

    /// A comma, or the end that follows without one.
    fn next_or(&mut self, end: char) -> Option<()> {
        self.eat(",").or_else(|| self.rest.starts_with(end).then_some(()))
    }

    fn name(&mut self) -> Option<&'a str> {
        let end = self
            .rest
            .find(|c: char| !(c.is_alphanumeric() || "_.-+".contains(c)));
        let (name, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest.trim_start();
        (!name.is_empty()).then_some(name)
    }

    fn value(&mut self) -> Option<Value> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return None;
        }
        let value = match self.rest.chars().next()? {
            quote @ ('\'' | '"') => Value::String(self.string(quote)?),
            '[' => {
                self.eat("[")?;
                let mut items = Vec::new();
                while self.eat("]").is_none() {
                    items.push(self.value()?);
                    self.next_or(']')?;
                }
                Value::Array(items)
            }
            '{' => {
                self.eat("{")?;
                let mut object = Map::new();
                while self.eat("}").is_none() {
                    let Value::String(key) = self.value()? else {
                        return None;
                    };
                    self.eat(":")?;
                    object.insert(key, self.value()?);
                    self.next_or('}')?;
                }
                Value::Object(object)
            }
            _ => match self.name()? {
                // JSON's words stand beside Python's: models mix them.
                "True" | "true" => Value::Bool(true),
                "False" | "false" => Value::Bool(false),
                "None" | "null" => Value::Null,
                number => serde_json::from_str::<serde_json::Number>(number).ok()?.into(),
            },
        };
        self.depth -= 1;
        Some(value)
    }

    /// A literal of one line with Python's escapes; an unknown one stands for itself, as in Python.
    fn string(&mut self, quote: char) -> Option<String> {
        let mut out = String::new();
        let rest = self.rest;
        let mut characters = rest.char_indices().skip(1);
        while let Some((at, character)) = characters.next() {
            if character == quote {
                self.rest = rest[at + 1..].trim_start();
                return Some(out);
            }
            if character != '\\' {
                out.push(character);
                continue;
            }
            let (_, escape) = characters.next()?;
            let digits = match escape {
                'x' => 2,
                'u' => 4,
                'U' => 8,
                'n' => plain(&mut out, "\n"),
                't' => plain(&mut out, "\t"),
                'r' => plain(&mut out, "\r"),
                'b' => plain(&mut out, "\u{8}"),
                'f' => plain(&mut out, "\u{c}"),
                // The last is JSON's.
                '\\' | '\'' | '"' | '/' => plain(&mut out, escape.encode_utf8(&mut [0; 4])),
                other => plain(&mut out, &format!("\\{other}")),
            };
            if digits > 0 {
                let hex: String = characters.by_ref().take(digits).map(|(_, digit)| digit).collect();
                let code = u32::from_str_radix(&hex, 16).ok()?;
                out.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
        }
        None
    }
}

/// Writes an escape out that has no digits.
fn plain(out: &mut String, text: &str) -> usize {
    out.push_str(text);
    0
}
