//! What stands between the marks of a call.

use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// A call that was read.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) id: Option<String>,
    pub(super) name: String,
    pub(super) arguments: String,
}

/// Reads the calls of a body; none where it is no call.
pub(super) type Read = fn(&str) -> Option<Vec<Call>>;

fn named(name: &str, arguments: String) -> Option<Call> {
    let name = name.trim();
    (!name.is_empty()).then(|| Call {
        id: None,
        name: name.to_owned(),
        arguments,
    })
}

#[derive(serde::Deserialize)]
struct Json {
    #[serde(default)]
    id: Option<String>,
    name: String,
    #[serde(alias = "parameters")]
    arguments: Option<Value>,
}

/// The raw text of a member of an object.
#[derive(serde::Deserialize)]
struct Raw<'a> {
    #[serde(borrow, alias = "parameters")]
    arguments: Option<&'a RawValue>,
}

fn json_call(text: &str) -> Option<Call> {
    let call: Json = serde_json::from_str(text).ok()?;
    let raw: Raw<'_> = serde_json::from_str(text).ok()?;
    let arguments = match (call.arguments, raw.arguments) {
        (Some(Value::String(text)), _) => text,
        (_, Some(raw)) => raw.get().to_owned(),
        _ => "{}".to_owned(),
    };
    named(&call.name, arguments).map(|named| Call { id: call.id, ..named })
}

/// Objects with `name` and `arguments` or `parameters`, one or a list or several with `;` between.
pub(super) fn json(body: &str) -> Option<Vec<Call>> {
    if let Ok(list) = serde_json::from_str::<Vec<&RawValue>>(body) {
        return list.into_iter().map(|item| json_call(item.get())).collect();
    }
    let mut calls = Vec::new();
    let mut rest = body.trim();
    while !rest.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<&RawValue>();
        calls.push(json_call(stream.next()?.ok()?.get())?);
        rest = rest[stream.byte_offset()..]
            .trim_start()
            .trim_start_matches(';')
            .trim_start();
    }
    (!calls.is_empty()).then_some(calls)
}

/// A list of objects, or names with `[ARGS]` and an object each.
pub(super) fn mistral(body: &str) -> Option<Vec<Call>> {
    if !body.contains("[ARGS]") {
        return json(body);
    }
    let call = |part: &str| {
        let (name, arguments) = part.split_once("[ARGS]")?;
        let (name, id) = name
            .split_once("[CALL_ID]")
            .map_or((name, None), |(name, id)| (name, Some(id.to_owned())));
        named(name, object(arguments)?).map(|named| Call { id, ..named })
    };
    body.split("[TOOL_CALLS]").map(call).collect()
}

/// The text of a JSON object.
fn object(text: &str) -> Option<String> {
    let text = text.trim();
    serde_json::from_str::<Map<String, Value>>(text)
        .ok()
        .map(|_| text.to_owned())
}

pub(super) fn deepseek(body: &str) -> Option<Vec<Call>> {
    let parts = body
        .split("<｜tool▁call▁end｜>")
        .map(str::trim)
        .filter(|part| !part.is_empty());
    let call = |part: &str| {
        let (head, tail) = part
            .strip_prefix("<｜tool▁call▁begin｜>")?
            .split_once("<｜tool▁sep｜>")?;
        match tail.split_once("```json") {
            Some((name, arguments)) => named(name, object(arguments.trim().strip_suffix("```")?)?),
            None => named(head, object(tail)?),
        }
    };
    parts
        .map(call)
        .collect::<Option<Vec<_>>>()
        .filter(|calls| !calls.is_empty())
}

/// JSON where the text is some, a string elsewhere.
fn value(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

/// Pairs of names and values between four marks.
fn pairs(mut rest: &str, marks: [&str; 4]) -> Option<String> {
    let mut object = Map::new();
    while !rest.trim().is_empty() {
        rest = rest.trim_start().strip_prefix(marks[0])?;
        let (name, after) = rest.split_once(marks[1])?;
        let (text, after) = after
            .trim_start_matches('\n')
            .strip_prefix(marks[2])?
            .split_once(marks[3])?;
        let text = text.strip_prefix('\n').unwrap_or(text);
        object.insert(
            name.trim().to_owned(),
            value(text.strip_suffix('\n').unwrap_or(text)),
        );
        rest = after;
    }
    Some(Value::Object(object).to_string())
}

pub(super) fn qwen3_coder(body: &str) -> Option<Vec<Call>> {
    let call = body
        .trim()
        .strip_prefix("<function=")?
        .strip_suffix("</function>")?;
    let (name, parameters) = call.split_once('>')?;
    Some(vec![named(
        name,
        pairs(parameters, ["<parameter=", ">", "", "</parameter>"])?,
    )?])
}

pub(super) fn glm(body: &str) -> Option<Vec<Call>> {
    let body = body.trim();
    let (name, rest) = body.split_at(body.find("<arg_key>").unwrap_or(body.len()));
    let marks = ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"];
    if name.contains(['<', '{']) {
        return None;
    }
    Some(vec![named(name, pairs(rest, marks)?)?])
}

pub(super) fn harmony(body: &str) -> Option<Vec<Call>> {
    let (head, arguments) = body.split_once("<|message|>")?;
    let name = head.split([' ', '<']).next()?;
    Some(vec![named(name, object(arguments)?)?])
}

pub(super) fn gemma(body: &str) -> Option<Vec<Call>> {
    let (name, rest) = body.trim().strip_prefix("call:")?.split_once('{')?;
    let mut rest = rest.strip_suffix('}')?;
    let mut object = Map::new();
    while !rest.is_empty() {
        let (key, after) = rest.split_once(':')?;
        let (found, after) = if let Some(text) = after.strip_prefix("<escape>") {
            let (text, after) = text.split_once("<escape>")?;
            (Value::String(text.to_owned()), after)
        } else {
            let (text, after) = after.split_at(after.find(',').unwrap_or(after.len()));
            (value(text), after)
        };
        object.insert(key.trim().to_owned(), found);
        rest = after.strip_prefix(',').unwrap_or(after);
        if rest.len() == after.len() && !rest.is_empty() {
            return None;
        }
    }
    Some(vec![named(name, Value::Object(object).to_string())?])
}

/// A list of Python calls with literals as named arguments.
pub(super) fn python(body: &str) -> Option<Vec<Call>> {
    let mut reader = Python {
        rest: body.trim(),
        depth: 0,
    };
    reader.eat("[")?;
    let mut calls = Vec::new();
    while reader.eat("]").is_none() {
        let name = reader.name()?;
        reader.eat("(")?;
        let mut object = Map::new();
        while reader.eat(")").is_none() {
            let key = reader.name()?;
            reader.eat("=")?;
            object.insert(key.to_owned(), reader.value()?);
            reader
                .eat(",")
                .or_else(|| reader.rest.starts_with(')').then_some(()))?;
        }
        calls.push(named(name, Value::Object(object).to_string())?);
        reader
            .eat(",")
            .or_else(|| reader.rest.starts_with(']').then_some(()))?;
    }
    (reader.rest.is_empty() && !calls.is_empty()).then_some(calls)
}

struct Python<'a> {
    rest: &'a str,
    depth: usize,
}

impl<'a> Python<'a> {
    fn eat(&mut self, text: &str) -> Option<()> {
        self.rest = self.rest.strip_prefix(text)?.trim_start();
        Some(())
    }

    fn name(&mut self) -> Option<&'a str> {
        let end = self
            .rest
            .find(|c: char| !(c.is_alphanumeric() || "_.-".contains(c)));
        let (name, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest.trim_start();
        (!name.is_empty()).then_some(name)
    }

    fn value(&mut self) -> Option<Value> {
        self.depth += 1;
        if self.depth > 64 {
            return None;
        }
        let value = match self.rest.chars().next()? {
            quote @ ('\'' | '"') => Value::String(self.string(quote)?),
            '[' => {
                self.eat("[")?;
                let mut items = Vec::new();
                while self.eat("]").is_none() {
                    items.push(self.value()?);
                    self.eat(",")
                        .or_else(|| self.rest.starts_with(']').then_some(()))?;
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
                    self.eat(",")
                        .or_else(|| self.rest.starts_with('}').then_some(()))?;
                }
                Value::Object(object)
            }
            _ => match self.name()? {
                "True" => Value::Bool(true),
                "False" => Value::Bool(false),
                "None" => Value::Null,
                number => serde_json::from_str::<serde_json::Number>(number).ok()?.into(),
            },
        };
        self.depth -= 1;
        Some(value)
    }

    fn string(&mut self, quote: char) -> Option<String> {
        let mut out = String::new();
        let mut characters = self.rest.char_indices().skip(1);
        while let Some((at, character)) = characters.next() {
            match character {
                '\\' => out.push(match characters.next()?.1 {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    other => other,
                }),
                end if end == quote => {
                    self.rest = self.rest[at + 1..].trim_start();
                    return Some(out);
                }
                other => out.push(other),
            }
        }
        None
    }
}
