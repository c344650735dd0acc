//! Grammars of tool calls: the format of a model around the schemas of the tools.

use std::fmt::Write;

use serde_json::{Map, Value, json};

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

/// How calls of a format are written around their names and arguments.
struct Layout {
    /// Before the first call.
    open: &'static str,
    /// Between two calls; none where there is one alone.
    between: Option<&'static str>,
    /// After the last call.
    close: &'static str,
    /// Before the name.
    begin: &'static str,
    arguments: Arguments,
    /// After the arguments.
    end: &'static str,
}

enum Arguments {
    /// JSON after this.
    Json(&'static str),
    /// Pairs: what stands before the first, before a name, before its value, after it, between two, and the quotes of strings.
    Pairs {
        head: &'static str,
        key: &'static str,
        value: &'static str,
        end: &'static str,
        between: &'static str,
        quote: Quote,
    },
}

#[derive(Clone, Copy)]
enum Quote {
    /// Strings stand as they are, up to the end of the value.
    None,
    /// Strings stand between these marks.
    Marks(&'static str),
    /// Strings are JSON.
    Json,
}

const fn json(begin: &'static str, middle: &'static str, end: &'static str) -> Layout {
    Layout {
        open: "",
        between: None,
        close: "",
        begin,
        arguments: Arguments::Json(middle),
        end,
    }
}

const XML: Arguments = Arguments::Pairs {
    head: ">\n",
    key: "<parameter=",
    value: ">\n",
    end: "\n</parameter>\n",
    between: "",
    quote: Quote::None,
};

const fn gemma(begin: &'static str, end: &'static str, quote: &'static str) -> Layout {
    Layout {
        open: "",
        between: Some(""),
        close: "",
        begin,
        arguments: Arguments::Pairs {
            head: "{",
            key: "",
            value: ":",
            end: "",
            between: ",",
            quote: Quote::Marks(quote),
        },
        end,
    }
}

/// The layout of a format; none for those whose calls have no one form.
fn layout(format: ToolFormat) -> Option<Layout> {
    let name_arguments = "\", \"arguments\": ";
    Some(match format {
        ToolFormat::Hermes => Layout {
            between: Some("\n"),
            ..json("<tool_call>\n{\"name\": \"", name_arguments, "}\n</tool_call>")
        },
        ToolFormat::Llama3Json => Layout {
            between: Some("; "),
            ..json("{\"name\": \"", "\", \"parameters\": ", "}")
        },
        ToolFormat::Mistral => Layout {
            open: "[TOOL_CALLS][",
            between: Some(", "),
            close: "]",
            ..json("{\"name\": \"", name_arguments, "}")
        },
        ToolFormat::MistralArgs => Layout {
            between: Some(""),
            ..json("[TOOL_CALLS]", "[ARGS]", "")
        },
        ToolFormat::DeepSeek => Layout {
            open: "<｜tool▁calls▁begin｜>",
            between: Some("\n"),
            close: "<｜tool▁calls▁end｜>",
            ..json(
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                "\n```json\n",
                "\n```<｜tool▁call▁end｜>",
            )
        },
        ToolFormat::DeepSeek31 => Layout {
            open: "<｜tool▁calls▁begin｜>",
            between: Some(""),
            close: "<｜tool▁calls▁end｜>",
            ..json("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
        },
        // Calls are numbered, so that there is one.
        ToolFormat::Kimi => Layout {
            open: "<|tool_calls_section_begin|>",
            close: "<|tool_calls_section_end|>",
            ..json(
                "<|tool_call_begin|>functions.",
                ":0<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
            )
        },
        // The mark that ends a call ends the answer, so that there is one.
        ToolFormat::Harmony => json(
            "<|channel|>commentary to=functions.",
            " <|constrain|>json<|message|>",
            "",
        ),
        ToolFormat::Qwen3Coder => Layout {
            between: Some("\n"),
            arguments: XML,
            ..json("<tool_call>\n<function=", "", "</function>\n</tool_call>")
        },
        ToolFormat::Seed => Layout {
            between: Some("\n"),
            arguments: XML,
            ..json(
                "<seed:tool_call>\n<function=",
                "",
                "</function>\n</seed:tool_call>",
            )
        },
        ToolFormat::FunctionJson => Layout {
            between: Some(""),
            ..json("<function=", ">", "</function>")
        },
        ToolFormat::Glm => Layout {
            between: Some("\n"),
            arguments: Arguments::Pairs {
                head: "\n",
                key: "<arg_key>",
                value: "</arg_key>\n<arg_value>",
                end: "</arg_value>\n",
                between: "",
                quote: Quote::None,
            },
            ..json("<tool_call>", "", "</tool_call>")
        },
        ToolFormat::Gemma => gemma("<start_function_call>call:", "}<end_function_call>", "<escape>"),
        ToolFormat::Gemma4 => gemma("<|tool_call>call:", "}<tool_call|>", "<|\"|>"),
        ToolFormat::Pythonic | ToolFormat::Lfm2 => {
            let (open, close) = if format == ToolFormat::Lfm2 {
                ("<|tool_call_start|>[", "]<|tool_call_end|>")
            } else {
                ("[", "]")
            };
            Layout {
                open,
                between: Some(", "),
                close,
                arguments: Arguments::Pairs {
                    head: "(",
                    key: "",
                    value: "=",
                    end: "",
                    between: ", ",
                    quote: Quote::Json,
                },
                ..json("", "", ")")
            }
        }
        ToolFormat::Plain | ToolFormat::JsonList => return None,
    })
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

/// Rules in llguidance's form of Lark.
struct Lark<'a> {
    tokenizer: &'a Tokenizer,
    rules: String,
    count: usize,
}

/// A piece of a mark.
enum Piece {
    Text(String),
    Token(u32),
}

impl<'a> Lark<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            rules: String::new(),
            count: 0,
        }
    }

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
            self.literal(layout.begin)
        };
        let more = match layout.between.filter(|_| calls.parallel) {
            Some(between) => {
                let separator = self.literal(between);
                let begin = self.literal(layout.begin);
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
                format!("{} {}", self.literal(middle), self.json(&schema))
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
        let head = self.literal(&format!("{open}{key}{value}"));
        let fails = |keyword: &str| {
            refused(format!(
                "tool `{}`: this format cannot hold the string `{key}` to `{keyword}`",
                tool.name
            ))
        };
        let is_text = tool.is_text(key);
        let body = match quote {
            Quote::None | Quote::Marks(_) if is_text => {
                let marks = if let Quote::Marks(quote) = quote {
                    quote
                } else {
                    ""
                };
                let close = format!("{marks}{end}");
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
                format!("{} {text}", self.literal(marks))
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

    /// Text without a mark, and text up to it with the mark itself.
    fn until(&mut self, mark: &str) -> (String, String) {
        let pieces = self.pieces(mark);
        match pieces.first() {
            // No text has a special token; spelled out it would read like one.
            Some(Piece::Token(id)) => {
                let spelled = escape(&self.tokenizer.decode(&[*id], false));
                let free = self.token(&format!("/(?s:.*)/ & ~/(?s:.*){spelled}(?s:.*)/"));
                let until = format!("{free} {}", self.literal(mark));
                (free, until)
            }
            Some(Piece::Text(text)) => {
                // A line that ends behind the mark is no part of what is looked for.
                let sought = text.trim_end_matches('\n');
                let escaped = escape(sought);
                let free = self.token(&format!("/(?s:.*)/ & ~/(?s:.*){escaped}(?s:.*)/"));
                // It ends with the first: nothing longer has one at its end alone.
                let name = self.token(&format!("/(?s:.*){escaped}/ & ~/(?s:.*){escaped}(?s:.+)/"));
                let mut rest = vec![name];
                if sought.len() < text.len() {
                    rest.push(quoted(&text[sought.len()..]));
                }
                rest.extend(pieces[1..].iter().map(spell));
                (free, rest.join(" "))
            }
            None => (String::new(), String::new()),
        }
    }

    fn json(&mut self, schema: &Value) -> String {
        self.rule(&format!("%json {schema}"))
    }

    fn rule(&mut self, body: &str) -> String {
        self.count += 1;
        let name = format!("rule_{}", self.count);
        let _ = writeln!(self.rules, "{name}: {body}");
        name
    }

    fn token(&mut self, body: &str) -> String {
        self.count += 1;
        let name = format!("TEXT_{}", letters(self.count));
        let _ = writeln!(self.rules, "{name}: {body}");
        name
    }

    /// A text as it stands, its special tokens as tokens.
    fn literal(&self, text: &str) -> String {
        let pieces = self.pieces(text);
        let spelled: Vec<String> = pieces.iter().map(spell).collect();
        spelled.join(" ")
    }

    fn pieces(&self, text: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut rest = text;
        for id in self.tokenizer.encode(text, false).unwrap_or_default() {
            if !self.tokenizer.is_special(id) {
                continue;
            }
            let special = self.tokenizer.decode(&[id], false);
            if let Some((before, after)) = rest.split_once(&special).filter(|_| !special.is_empty()) {
                if !before.is_empty() {
                    pieces.push(Piece::Text(before.to_owned()));
                }
                pieces.push(Piece::Token(id));
                rest = after;
            }
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        pieces
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

/// What a call begins with in any case, and free text does not have.
fn first_mark(format: ToolFormat) -> &'static str {
    match format {
        ToolFormat::Hermes | ToolFormat::Qwen3Coder | ToolFormat::Glm => "<tool_call>",
        ToolFormat::Seed => "<seed:tool_call>",
        ToolFormat::FunctionJson => "<function=",
        ToolFormat::Mistral | ToolFormat::MistralArgs => "[TOOL_CALLS]",
        ToolFormat::DeepSeek | ToolFormat::DeepSeek31 => "<｜tool▁calls▁begin｜>",
        ToolFormat::Kimi => "<|tool_calls_section_begin|>",
        ToolFormat::Gemma => "<start_function_call>",
        ToolFormat::Gemma4 => "<|tool_call>",
        ToolFormat::Lfm2 => "<|tool_call_start|>",
        ToolFormat::Harmony => "<|channel|>commentary to=",
        ToolFormat::Plain | ToolFormat::JsonList | ToolFormat::Llama3Json | ToolFormat::Pythonic => "",
    }
}

fn spell(piece: &Piece) -> String {
    match piece {
        Piece::Token(id) => format!("<[{id}]>"),
        Piece::Text(text) => quoted(text),
    }
}

/// A string as Lark writes it, which is JSON.
fn quoted(text: &str) -> String {
    json!(text).to_string()
}

/// A text as a regular expression between slashes.
fn escape(text: &str) -> String {
    let mut out = String::new();
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            // Not `<` and `>`: behind a backslash they are the borders of words.
            c if "\\.+*?()|[]{}^$/#&~-".contains(c) => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out
}

/// A number as letters, for names of tokens.
fn letters(number: usize) -> String {
    let digits = number.to_string();
    digits
        .bytes()
        .map(|digit| char::from(digit - b'0' + b'A'))
        .collect()
}
