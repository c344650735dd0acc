//! Grammars of tool calls: the format of a model around the schemas of the tools.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::lark::Lark;
use super::layout::{Arguments, Layout, Quote, first_mark, layout};
use super::table;
use crate::parser::{Tool, ToolFormat};
use crate::{TextError, Tokenizer};

/// Whether an answer begins with thoughts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Thoughts {
    /// It does not.
    #[default]
    None,
    /// It may.
    Possible,
    /// The prompt has opened them.
    Opened,
}

/// What calls an answer may have.
#[derive(Clone, Copy, Debug)]
pub struct CallGrammar<'a> {
    /// How the model writes them.
    pub format: ToolFormat,
    /// The tools that may be called, with the schemas of their arguments.
    pub tools: &'a [Tool],
    /// Whether the answer is calls and nothing else.
    pub required: bool,
    /// Whether it may have several.
    pub parallel: bool,
    /// Whether thoughts may come first.
    pub thoughts: Thoughts,
}

impl CallGrammar<'_> {
    /// The grammar in llguidance's form of Lark: text until a call begins, where calls are not required, and then the format
    /// around arguments that are valid under the schema of their tool.
    ///
    /// # Errors
    ///
    /// [`TextError::Grammar`] where the format has no grammar, there is no tool, or the format cannot hold arguments to a
    /// schema; what is wrong with the schemas themselves is said when the grammar is compiled.
    pub fn lark(&self, tokenizer: &Tokenizer) -> Result<String, TextError> {
        let layout = layout(self.format).filter(|_| !self.tools.is_empty());
        let layout = layout
            .ok_or_else(|| refused(format!("calls in the format `{}` have no grammar", self.format)))?;
        Lark::new(tokenizer).write(self, &layout)
    }
}

/// A grammar, in llguidance's form of Lark as a rule's body (`%json …`, `%lark …`), behind thoughts that the prompt has
/// opened.
pub fn after_thoughts(format: ToolFormat, body: &str, tokenizer: &Tokenizer) -> String {
    let mut lark = Lark::new(tokenizer);
    let thoughts = lark.thoughts(format, Thoughts::Opened);
    let body = lark.rule(body);
    format!("start: {thoughts} {body}\n{}", lark.rules)
}

fn refused(reason: String) -> TextError {
    TextError::Grammar {
        kind: "grammar of tool calls",
        reason,
    }
}

impl Lark<'_> {
    fn write(&mut self, calls: &CallGrammar<'_>, layout: &Layout) -> Result<String, TextError> {
        // What the first call begins with stands apart, for it ends free text.
        let first = if layout.open.is_empty() {
            layout.begin
        } else {
            layout.open
        };
        let mark = first_mark(calls.format);
        let after_mark = first.strip_prefix(mark).unwrap_or(first);
        let mut one = String::new();
        for tool in calls.tools {
            let rule = self.call(tool, layout)?;
            let _ = write!(one, "{}{rule}", if one.is_empty() { "" } else { " | " });
        }
        let call = self.rule(&one);
        let begin = if layout.open.is_empty() {
            String::new()
        } else {
            self.numbered(layout.begin)
        };
        let more = match layout.between.filter(|_| calls.parallel) {
            Some(between) => {
                let separator = self.literal(between);
                let begin = self.numbered(layout.begin);
                format!("({separator} {begin} {call})*")
            }
            None => String::new(),
        };
        let (after, close) = (self.literal(after_mark), self.literal(layout.close));
        let rest = self.rule(&format!("{after} {begin} {call} {more} {close}"));
        let thoughts = self.thoughts(calls.format, calls.thoughts);
        let body = if calls.required {
            format!("{} {rest}", self.literal(mark))
        } else if calls.format == ToolFormat::Harmony {
            let last = self.literal("<|channel|>final<|message|>");
            format!(
                "({} {rest} | {last} {})",
                self.literal(mark),
                self.token("/(.|\\n)*/")
            )
        } else if mark.is_empty() {
            // The first character tells a call.
            let open = after_mark.chars().next().unwrap_or('{');
            let free = self.token(&format!("/([ \\n\\t]*[^ \\n\\t\\{open}](.|\\n)*)?/"));
            format!("({rest} | {free})")
        } else {
            let (free, until) = self.until(mark);
            format!("({until} {rest} | {free})")
        };
        Ok(format!("start: {thoughts} {body}\n{}", self.rules))
    }

    /// One call, from its name to its end.
    fn call(&mut self, tool: &Tool, layout: &Layout) -> Result<String, TextError> {
        let name = self.literal(&tool.name);
        let end = self.literal(layout.end);
        let arguments = match &layout.arguments {
            Arguments::Json(middle) => {
                let schema = table::compact(&tool.parameters)
                    .map_err(|reason| refused(format!("tool `{}`: {reason}", tool.name)))?;
                format!("{} {}", self.numbered(middle), self.json(&schema))
            }
            pairs @ Arguments::Pairs { .. } => self.pairs(tool, pairs)?,
        };
        Ok(self.rule(&format!("{name} {arguments} {end}")))
    }

    fn pairs(&mut self, tool: &Tool, pairs: &Arguments) -> Result<String, TextError> {
        let Arguments::Pairs { head, between, .. } = pairs else {
            return Ok(String::new());
        };
        let schema = tool.parameters.as_object().cloned().unwrap_or_default();
        if let Some(keyword) = schema.keys().find(|key| !HELD.contains(&key.as_str())) {
            return Err(refused(format!(
                "tool `{}`: this format cannot hold arguments to `{keyword}`",
                tool.name
            )));
        }
        let none = Map::new();
        let properties = schema
            .get("properties")
            .and_then(Value::as_object)
            .unwrap_or(&none);
        let wanted: Vec<&str> = schema
            .get("required")
            .and_then(Value::as_array)
            .map(|names| names.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        if let Some(name) = wanted.iter().find(|name| !properties.contains_key(**name)) {
            return Err(refused(format!(
                "tool `{}`: `{name}` is required and has no schema",
                tool.name
            )));
        }
        let (mut required, mut optional) = (Vec::new(), Vec::new());
        for (key, property) in properties {
            let pair = self.pair(tool, key, property, pairs)?;
            if wanted.contains(&key.as_str()) {
                required.push(pair);
            } else {
                optional.push(pair);
            }
        }
        let (head, separator) = (self.literal(head), self.literal(between));
        let separated = required.join(&format!(" {separator} "));
        // Optional ones follow, each with its separator unless it is the first of all.
        let mut follow = String::new();
        let mut first = Vec::new();
        for pair in optional.iter().rev() {
            first.push(format!("{pair} {follow}"));
            follow = format!("({separator} {pair})? {follow}");
        }
        if required.is_empty() && !first.is_empty() {
            return Ok(format!("{head} ({})?", first.join(" | ")));
        }
        Ok(format!("{head} {separated} {follow}"))
    }

    fn pair(
        &mut self,
        tool: &Tool,
        key: &str,
        property: &Value,
        pairs: &Arguments,
    ) -> Result<String, TextError> {
        let Arguments::Pairs {
            key: open,
            value,
            end,
            quote,
            ..
        } = pairs
        else {
            return Ok(String::new());
        };
        let is_text = tool.is_text(key);
        let told = match quote {
            Quote::Told if is_text => "true\">",
            Quote::Told => "false\">",
            _ => "",
        };
        let head = self.literal(&format!("{open}{key}{value}{told}"));
        let fails = |keyword: &str| {
            refused(format!(
                "tool `{}`: this format cannot hold the string `{key}` to `{keyword}`",
                tool.name
            ))
        };
        let body = match quote {
            Quote::None | Quote::Told | Quote::Marks(..) if is_text => {
                let (before, after) = match quote {
                    Quote::Marks(before, after) => (*before, *after),
                    _ => ("", ""),
                };
                let close = format!("{after}{end}");
                let text = if let Some(values) = property["enum"].as_array() {
                    let values: Vec<String> = values
                        .iter()
                        .filter_map(Value::as_str)
                        .map(|value| self.literal(value))
                        .collect();
                    format!("({}) {}", values.join(" | "), self.literal(&close))
                } else {
                    let known = ["type", "description", "title", "default", "examples"];
                    let other = property
                        .as_object()
                        .and_then(|all| all.keys().find(|key| !known.contains(&key.as_str())));
                    if let Some(keyword) = other {
                        return Err(fails(keyword));
                    }
                    self.until(&close).1
                };
                format!("{} {text}", self.literal(before))
            }
            _ => {
                let mut schema = match property {
                    Value::Object(schema) => schema.clone(),
                    _ => Map::new(),
                };
                for shared in ["$defs", "definitions"] {
                    if let Some(definitions) = tool.parameters.get(shared) {
                        schema.insert(shared.to_owned(), definitions.clone());
                    }
                }
                let schema = table::compact(&Value::Object(schema))
                    .map_err(|reason| refused(format!("tool `{}`: {reason}", tool.name)))?;
                format!("{} {}", self.json(&schema), self.literal(end))
            }
        };
        Ok(self.rule(&format!("{head} {body}")))
    }

    fn thoughts(&mut self, format: ToolFormat, thoughts: Thoughts) -> String {
        let (open, close) = match format {
            ToolFormat::Mistral | ToolFormat::MistralArgs => ("[THINK]", "[/THINK]"),
            ToolFormat::Seed => ("<seed:think>", "</seed:think>"),
            ToolFormat::Cohere => ("<|START_THINKING|>", "<|END_THINKING|>"),
            ToolFormat::Apertus => ("<|inner_prefix|>", "<|inner_suffix|>"),
            ToolFormat::Gemma4 => ("<|channel>thought", "<channel|>"),
            ToolFormat::Harmony => ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
            _ => ("<think>", "</think>"),
        };
        if thoughts == Thoughts::None {
            return String::new();
        }
        let text = self.until(close).1;
        let blank = self.token("/[ \\n]*/");
        if thoughts == Thoughts::Opened {
            format!("{text} {blank}")
        } else {
            format!("({} {text} {blank})?", self.literal(open))
        }
    }
}

/// Keywords of a schema of arguments that pairs of names and values are held to; what says nothing of validity with them.
const HELD: [&str; 12] = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "description",
    "title",
    "$schema",
    "$id",
    "$defs",
    "definitions",
    "examples",
    "$comment",
];
