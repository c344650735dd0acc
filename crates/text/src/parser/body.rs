//! What stands between the marks of a call.

use std::collections::BTreeMap;

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::python;

/// A call that was read.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) id: Option<String>,
    pub(super) name: String,
    pub(super) arguments: String,
}

impl Call {
    pub(super) fn new(name: &str, arguments: String) -> Self {
        Self {
            id: None,
            name: name.trim().to_owned(),
            arguments,
        }
    }
}

/// Why a body is no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unread {
    /// More may make it one: the end mark that was found stands inside of a string.
    Open,
    /// Nothing makes it one.
    Bad,
}

/// The tools on offer, with their schemas.
pub(super) type Tools<'a> = &'a [super::Tool];

/// Reads the calls of a body.
pub(super) type Read = fn(&str, Tools<'_>) -> Result<Vec<Call>, Unread>;

#[derive(serde::Deserialize)]
struct Json {
    #[serde(default, alias = "tool_call_id")]
    id: Option<String>,
    #[serde(alias = "tool_name")]
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

fn unread(error: &serde_json::Error) -> Unread {
    if error.is_eof() { Unread::Open } else { Unread::Bad }
}

fn json_call(text: &str) -> Result<Call, Unread> {
    let call: Json = serde_json::from_str(text).map_err(|_| Unread::Bad)?;
    let raw: Raw<'_> = serde_json::from_str(text).map_err(|_| Unread::Bad)?;
    let arguments = match (call.arguments, raw.arguments) {
        // Arguments as a text that is JSON, as OpenAI writes them.
        (Some(Value::String(text)), _) => object(&text)?,
        (Some(Value::Object(_)), Some(raw)) => raw.get().to_owned(),
        (Some(Value::Null) | None, _) => "{}".to_owned(),
        _ => return Err(Unread::Bad),
    };
    if call.name.trim().is_empty() {
        return Err(Unread::Bad);
    }
    Ok(Call {
        id: call.id,
        ..Call::new(&call.name, arguments)
    })
}

/// Objects with `name` and `arguments` or `parameters`, one or a list or several with `;` or white space between.
pub(super) fn json(body: &str, _tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let mut calls = Vec::new();
    let mut rest = body.trim();
    if rest.starts_with('[') {
        let list: Vec<&RawValue> = serde_json::from_str(rest).map_err(|error| unread(&error))?;
        return list.into_iter().map(|item| json_call(item.get())).collect();
    }
    while !rest.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<&RawValue>();
        let item = stream
            .next()
            .ok_or(Unread::Bad)?
            .map_err(|error| unread(&error))?;
        calls.push(json_call(item.get())?);
        rest = rest[stream.byte_offset()..].trim_start_matches(|c: char| c == ';' || c.is_whitespace());
    }
    if calls.is_empty() {
        Err(Unread::Bad)
    } else {
        Ok(calls)
    }
}

/// A list of objects that each have one member: the name of a tool with its arguments.
pub(super) fn named(body: &str, _tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let list: Vec<BTreeMap<String, &RawValue>> =
        serde_json::from_str(body.trim()).map_err(|error| unread(&error))?;
    let calls = list.into_iter().map(|item| {
        let mut members = item.into_iter();
        match (members.next(), members.next()) {
            (Some((name, arguments)), None) => Ok(Call::new(&name, object(arguments.get())?)),
            _ => Err(Unread::Bad),
        }
    });
    calls.collect()
}

/// A list of objects, or a name with `[ARGS]` and an object.
pub(super) fn mistral(body: &str, tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let Some((name, arguments)) = body.split_once("[ARGS]") else {
        return json(body, tools);
    };
    let (name, id) = name
        .split_once("[CALL_ID]")
        .map_or((name, None), |(name, id)| (name, Some(id.to_owned())));
    Ok(vec![Call {
        id,
        ..Call::new(name, object(arguments)?)
    }])
}

/// The text of a JSON object.
pub(super) fn object(text: &str) -> Result<String, Unread> {
    let text = text.trim();
    serde_json::from_str::<Map<String, Value>>(text)
        .map(|_| text.to_owned())
        .map_err(|error| unread(&error))
}

/// Calls between marks of their own: a name and a block of code, or a name and an object.
pub(super) fn deepseek(body: &str, _tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let parts = body
        .split("<｜tool▁call▁end｜>")
        .map(str::trim)
        .filter(|part| !part.is_empty());
    let call = |part: &str| {
        let (head, tail) = part
            .trim_start_matches("<｜tool▁call▁begin｜>")
            .split_once("<｜tool▁sep｜>")
            .ok_or(Unread::Bad)?;
        match tail.split_once("```json") {
            Some((name, arguments)) => {
                let arguments = arguments.trim().strip_suffix("```").ok_or(Unread::Open)?;
                Ok(Call::new(name, object(arguments)?))
            }
            None => Ok(Call::new(head, object(tail)?)),
        }
    };
    let calls: Vec<Call> = parts.map(call).collect::<Result<_, _>>()?;
    if calls.is_empty() {
        Err(Unread::Bad)
    } else {
        Ok(calls)
    }
}

/// `functions.name:0`, a mark and an object.
pub(super) fn kimi(body: &str, _tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let (id, arguments) = body
        .split_once("<|tool_call_argument_begin|>")
        .ok_or(Unread::Bad)?;
    let id = id.trim();
    let name = id.strip_prefix("functions.").unwrap_or(id);
    let name = name.rsplit_once(':').map_or(name, |(name, _)| name);
    Ok(vec![Call {
        id: Some(id.to_owned()),
        ..Call::new(name, object(arguments)?)
    }])
}

/// The value of a parameter whose text says nothing of its type: a string where the schema wants one, JSON where it is
/// some, a string elsewhere.
fn value(text: &str, tools: Tools<'_>, name: &str, key: &str) -> Value {
    let wants_text = tools
        .iter()
        .find(|tool| tool.name == name)
        .is_some_and(|tool| tool.is_text(key));
    if wants_text {
        return Value::String(text.to_owned());
    }
    literal(text)
}

/// JSON or Python where the text is some, a string elsewhere: templates of Python print both.
fn literal(text: &str) -> Value {
    let text_is = || Value::String(text.to_owned());
    serde_json::from_str(text.trim()).unwrap_or_else(|_| python::value(text).unwrap_or_else(text_is))
}

/// How the value of a pair stands between its marks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stands {
    /// On the line of the marks.
    Inline,
    /// On lines of its own, if it begins one.
    Lines,
    /// In a section of character data, if it begins one.
    Data,
}

/// Pairs of names and values between four marks, up to the end of the text.
fn pairs(
    rest: &str,
    marks: [&str; 4],
    stands: Stands,
    value: impl Fn(&str, &str) -> Value,
) -> Result<String, Unread> {
    Ok(pairs_until(rest, "", marks, stands, value)?.0)
}

/// Pairs up to a mark, or to the end of the text where it is empty, and what follows.
fn pairs_until<'a>(
    mut rest: &'a str,
    end: &str,
    marks: [&str; 4],
    stands: Stands,
    value: impl Fn(&str, &str) -> Value,
) -> Result<(String, &'a str), Unread> {
    let mut object = Map::new();
    loop {
        rest = rest.trim_start();
        match rest.strip_prefix(end) {
            Some(after) if !end.is_empty() || rest.is_empty() => {
                return Ok((Value::Object(object).to_string(), after));
            }
            _ => {}
        }
        rest = rest.strip_prefix(marks[0]).ok_or(Unread::Bad)?;
        let (name, after) = rest.split_once(marks[1]).ok_or(Unread::Bad)?;
        let after = if marks[2].is_empty() {
            after
        } else {
            after.trim_start()
        };
        let after = after.strip_prefix(marks[2]).ok_or(Unread::Bad)?;
        // Without its end mark a value holds the one that the call was ended by.
        let (text, after) = split_value(after, marks, stands).ok_or(Unread::Open)?;
        let name = name.trim();
        object.insert(name.to_owned(), value(name, text));
        rest = after;
    }
}

/// The text of a value, and what follows the mark that ends it.
fn split_value<'a>(after: &'a str, marks: [&str; 4], stands: Stands) -> Option<(&'a str, &'a str)> {
    let [open, _, _, close] = marks;
    if let Some(data) = after.strip_prefix("<![CDATA[").filter(|_| stands == Stands::Data) {
        return data.split_once(&format!("]]>{close}"));
    }
    let first = after.find(close)?;
    let Some(inner) = after.strip_prefix('\n').filter(|_| stands == Stands::Lines) else {
        return Some((&after[..first], &after[first + close.len()..]));
    };
    // On lines of its own a value may hold the mark: the one that counts begins a line.
    let (first, line) = (first - 1, format!("\n{close}"));
    let next = |end: usize| inner[first..end].contains(&format!("\n{open}"));
    match inner.find(&line).filter(|at| !next(at + 1)) {
        Some(at) => Some((&inner[..at], &inner[at + line.len()..])),
        None => Some((&inner[..first], &inner[first + close.len()..])),
    }
}

/// Several calls, each with a name between two marks, pairs and a mark at its end.
fn invocations(
    body: &str,
    [open, named, close]: [&str; 3],
    marks: [&str; 4],
    value: impl Fn(&str, &str, &str) -> Value,
) -> Result<Vec<Call>, Unread> {
    let mut calls = Vec::new();
    let mut rest = body.trim_start();
    while !rest.is_empty() {
        let (name, after) = rest
            .strip_prefix(open)
            .and_then(|after| after.split_once(named))
            .ok_or(Unread::Bad)?;
        let (arguments, after) = pairs_until(after, close, marks, Stands::Inline, |key, text| {
            value(name, key, text)
        })?;
        calls.push(Call::new(name, arguments));
        rest = after.trim_start();
    }
    if calls.is_empty() {
        Err(Unread::Bad)
    } else {
        Ok(calls)
    }
}

pub(super) fn minimax(body: &str, tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let call = ["<invoke name=\"", "\">", "</invoke>"];
    let marks = ["<parameter name=\"", "\">", "", "</parameter>"];
    invocations(body, call, marks, |name, key, text| value(text, tools, name, key))
}

/// Each parameter says whether it is a string; what is none is JSON.
pub(super) fn dsml(body: &str, _tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let call = ["<｜DSML｜invoke name=\"", "\">", "</｜DSML｜invoke>"];
    let marks = [
        "<｜DSML｜parameter name=\"",
        "\" string=\"",
        "",
        "</｜DSML｜parameter>",
    ];
    invocations(body, call, marks, |_, _, text| {
        match text.strip_prefix("false\">") {
            Some(text) => literal(text),
            None => Value::String(text.strip_prefix("true\">").unwrap_or(text).to_owned()),
        }
    })
}

pub(super) fn minicpm(body: &str, tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let (name, parameters) = body.split_once("\">").ok_or(Unread::Bad)?;
    let marks = ["<param name=\"", "\">", "", "</param>"];
    let arguments = pairs(parameters, marks, Stands::Data, |key, text| {
        value(text, tools, name.trim(), key)
    })?;
    Ok(vec![Call::new(name, arguments)])
}

pub(super) fn qwen3_coder(body: &str, tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let (name, parameters) = body.split_once('>').ok_or(Unread::Bad)?;
    let marks = ["<parameter=", ">", "", "</parameter>"];
    let arguments = pairs(parameters, marks, Stands::Lines, |key, text| {
        value(text, tools, name.trim(), key)
    })?;
    Ok(vec![Call::new(name, arguments)])
}

/// A name and an object.
pub(super) fn function_json(body: &str, _tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let (name, arguments) = body.split_once('>').ok_or(Unread::Bad)?;
    Ok(vec![Call::new(name, object(arguments)?)])
}

pub(super) fn glm(body: &str, tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let body = body.trim();
    let (name, rest) = body.split_at(body.find("<arg_key>").unwrap_or(body.len()));
    let name = name.trim();
    let marks = ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"];
    if name.is_empty() || name.contains(['<', '{', '\n']) {
        return Err(Unread::Bad);
    }
    let arguments = pairs(rest, marks, Stands::Inline, |key, text| {
        value(text, tools, name, key)
    })?;
    Ok(vec![Call::new(name, arguments)])
}

/// `call:name{key:value,…}` with strings between marks of their own.
pub(super) fn gemma(body: &str, _tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let rest = body.trim().strip_prefix("call:").ok_or(Unread::Bad)?;
    let at = rest.find('{').ok_or(Unread::Bad)?;
    let (name, rest) = rest.split_at(at);
    let mut reader = Gemma { rest, depth: 0 };
    let arguments = reader.value()?;
    if !reader.rest.trim().is_empty() || name.trim().is_empty() {
        return Err(Unread::Bad);
    }
    Ok(vec![Call::new(name, arguments.to_string())])
}

/// The marks around strings: FunctionGemma's and Gemma 4's.
const QUOTES: [&str; 2] = ["<escape>", "<|\"|>"];

struct Gemma<'a> {
    rest: &'a str,
    depth: usize,
}

impl Gemma<'_> {
    fn eat(&mut self, text: &str) -> bool {
        self.rest = self.rest.trim_start();
        let after = self.rest.strip_prefix(text);
        self.rest = after.unwrap_or(self.rest);
        after.is_some()
    }

    /// A string between marks, or JSON's.
    fn quoted(&mut self) -> Option<Result<String, Unread>> {
        self.rest = self.rest.trim_start();
        if self.rest.starts_with('"') {
            let mut stream = serde_json::Deserializer::from_str(self.rest).into_iter::<String>();
            let text = stream.next()?.map_err(|error| unread(&error));
            self.rest = &self.rest[stream.byte_offset()..];
            return Some(text);
        }
        let quote = QUOTES.into_iter().find(|quote| self.eat(quote))?;
        let Some((text, after)) = self.rest.split_once(quote) else {
            return Some(Err(Unread::Open));
        };
        self.rest = after;
        Some(Ok(text.to_owned()))
    }

    fn value(&mut self) -> Result<Value, Unread> {
        self.depth += 1;
        if self.depth > python::DEEPEST {
            return Err(Unread::Bad);
        }
        let value = if let Some(text) = self.quoted() {
            Value::String(text?)
        } else if self.eat("{") {
            let mut object = Map::new();
            while !self.eat("}") {
                let key = match self.quoted() {
                    Some(key) => key?,
                    None => self.until(&[':'])?,
                };
                if !self.eat(":") {
                    return Err(Unread::Bad);
                }
                object.insert(key, self.value()?);
                if !self.eat(",") && !self.rest.trim_start().starts_with('}') {
                    return Err(Unread::Bad);
                }
            }
            Value::Object(object)
        } else if self.eat("[") {
            let mut items = Vec::new();
            while !self.eat("]") {
                items.push(self.value()?);
                if !self.eat(",") && !self.rest.trim_start().starts_with(']') {
                    return Err(Unread::Bad);
                }
            }
            Value::Array(items)
        } else {
            literal(&self.until(&[',', '}', ']'])?)
        };
        self.depth -= 1;
        Ok(value)
    }

    fn until(&mut self, ends: &[char]) -> Result<String, Unread> {
        let end = self.rest.find(ends).ok_or(Unread::Open)?;
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        Ok(text.trim().to_owned())
    }
}

/// A list of Python calls with literals as named arguments.
pub(super) fn python(body: &str, _tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let calls = python::calls(body).ok_or(Unread::Open)?;
    Ok(calls
        .into_iter()
        .map(|(name, arguments)| Call::new(&name, arguments))
        .collect())
}
