//! Text, reasoning and tool calls of an answer as one ordered stream.

mod body;
mod format;
mod harmony;
mod python;

use serde_json::Value;

pub use format::ToolFormat;
use format::{Action, Mark, Place};

/// A tool that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// The JSON schema of its arguments.
    pub parameters: Value,
}

impl Tool {
    /// Whether a parameter can be nothing but a string.
    pub(crate) fn is_text(&self, key: &str) -> bool {
        let schema = &self.parameters["properties"][key];
        let of_type = |schema: &Value| match &schema["type"] {
            Value::String(kind) => kind == "string",
            Value::Array(kinds) => !kinds.is_empty() && kinds.iter().all(|kind| kind == "string"),
            _ => schema["enum"]
                .as_array()
                .is_some_and(|all| all.iter().all(Value::is_string)),
        };
        match schema["anyOf"].as_array() {
            Some(schemas) => !schemas.is_empty() && schemas.iter().all(of_type),
            None => of_type(schema),
        }
    }
}

/// A call that a model wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedCall {
    /// The id that the model gave it, in the formats that have one.
    pub id: Option<String>,
    /// The tool's name.
    pub name: String,
    /// The arguments as the text of a JSON object: as the model wrote it where the format has JSON, made of its parameters
    /// elsewhere.
    pub arguments: String,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParsedEvent {
    /// Text for the reader.
    Text(String),
    /// What the model thinks before it answers.
    Reasoning(String),
    /// A call of a tool, whole.
    ToolCall(ParsedCall),
    /// What began as a call and is none, or was cut off, as it was written.
    Malformed(String),
}

#[derive(Clone, Copy, Debug)]
enum State {
    Text,
    /// Until this mark.
    Reasoning(&'static str),
    /// Inside of this mark.
    Call(&'static Mark),
    /// In the head of a message, which this mark began.
    Head(&'static Mark),
}

/// Takes the text of an answer, with the special tokens of its format written out, and gives its parts in order.
///
/// Marks never show as text, nor does the white space between them. A call is given when it is whole.
///
/// ```
/// use mlx_engine_text::{OutputParser, ParsedEvent, Tool, ToolFormat};
///
/// let tools = [Tool { name: "now".to_owned(), parameters: serde_json::json!({"type": "object"}) }];
/// let mut parser = OutputParser::new(ToolFormat::Hermes, &tools);
/// assert_eq!(parser.push("Wait.\n<tool_c"), [ParsedEvent::Text("Wait.".to_owned())]);
/// let events = parser.push("all>{\"name\": \"now\", \"arguments\": {}}</tool_call>");
/// assert!(matches!(&events[..], [ParsedEvent::ToolCall(call)] if call.name == "now"));
/// ```
#[derive(Clone, Debug)]
pub struct OutputParser {
    format: ToolFormat,
    tools: Vec<Tool>,
    state: State,
    held: String,
    /// Whether nothing but white space has come, so that a mark of the beginning counts.
    fresh: bool,
    /// Whether white space that comes next follows a mark and is no text.
    trim: bool,
    /// Whether reasoning is told apart from text.
    separate: bool,
    /// Whether nothing follows.
    ending: bool,
    reasoning_tokens: usize,
}

impl OutputParser {
    /// A parser at the beginning of an answer. Without tools nothing is a call.
    pub fn new(format: ToolFormat, tools: &[Tool]) -> Self {
        Self {
            format,
            tools: tools.to_vec(),
            state: State::Text,
            held: String::new(),
            fresh: true,
            trim: false,
            separate: true,
            ending: false,
            reasoning_tokens: 0,
        }
    }

    /// A parser that leaves reasoning in the text.
    pub fn without_reasoning(mut self) -> Self {
        self.separate = false;
        self
    }

    /// The format.
    pub fn format(&self) -> ToolFormat {
        self.format
    }

    /// A parser of an answer to this prompt: one that ends with `<think>` has opened the block of reasoning itself.
    pub fn after_prompt(mut self, prompt: &str) -> Self {
        let prompt = prompt.trim_end();
        let opened = |mark: &&Mark| matches!(mark.action, Action::Reasoning) && prompt.ends_with(mark.open);
        if let Some(mark) = self.format.marks().iter().find(opened).filter(|_| self.separate) {
            self.state = State::Reasoning(mark.close.unwrap_or_default());
            self.trim = true;
        }
        self
    }

    /// Takes the text of the next token.
    pub fn push(&mut self, text: &str) -> Vec<ParsedEvent> {
        if self.is_reasoning() {
            self.reasoning_tokens += 1;
        }
        self.held.push_str(text);
        let mut events = Vec::new();
        while self.step(&mut events) {}
        events
    }

    /// The rest of an answer that was cut off: an unfinished call is malformed.
    pub fn finish(&mut self) -> Vec<ParsedEvent> {
        self.end(false)
    }

    /// The rest of an answer that the model ended: the end closes a call.
    pub fn finish_at_stop(&mut self) -> Vec<ParsedEvent> {
        self.end(true)
    }

    /// Whether the model is thinking now.
    pub fn is_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning(_))
    }

    /// Tokens that were taken while the model was thinking.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    /// The text that ends the reasoning that the model is in. Feed its tokens to the model and push it here.
    pub fn end_of_reasoning(&self) -> Option<&'static str> {
        match self.state {
            State::Reasoning("</think>") => Some("\n</think>\n\n"),
            State::Reasoning(harmony::END) => Some("<|end|><|start|>assistant"),
            State::Reasoning(close) => Some(close),
            _ => None,
        }
    }

    /// The marks that count.
    fn marks(&self, place: Place) -> impl Iterator<Item = &'static Mark> + Clone + use<> {
        let (calls, separate) = (
            !self.tools.is_empty(),
            self.separate || self.format == ToolFormat::Harmony,
        );
        self.format.marks().iter().filter(move |mark| {
            let of_thoughts = !mark.of_calls && matches!(mark.action, Action::Reasoning | Action::Drop);
            mark.place == place && (calls || !mark.of_calls) && (separate || !of_thoughts)
        })
    }

    /// Takes what is certain from the held text; false when more is needed.
    fn step(&mut self, events: &mut Vec<ParsedEvent>) -> bool {
        match self.state {
            State::Text => self.step_text(events),
            State::Reasoning(close) => {
                let found = self.held.find(close);
                let end = found.unwrap_or_else(|| {
                    // A call among thoughts is one where the thoughts have no end.
                    let calls = self
                        .marks(Place::Anywhere)
                        .filter(|mark| mark.of_calls)
                        .map(|mark| mark.open);
                    let begun = calls.clone().filter_map(|open| self.held.find(open)).min();
                    begun.unwrap_or_else(|| self.held.len() - open_tail(&self.held, calls.chain([close])))
                });
                // White space before the mark is no thought.
                let end = self.held[..end].trim_end().len();
                self.give(end, ParsedEvent::Reasoning, events);
                if let Some(found) = found {
                    self.held.drain(..found - end + close.len());
                    self.state = State::Text;
                    (self.fresh, self.trim) = (true, true);
                }
                found.is_some()
            }
            State::Head(mark) => {
                let close = mark.close.unwrap_or_default();
                let Some(end) = self.held.find(close) else {
                    return false;
                };
                let kind = harmony::kind(&self.held[..end]);
                self.state = match kind {
                    harmony::Kind::Call => State::Call(&harmony::CALL),
                    harmony::Kind::Reasoning if self.separate => State::Reasoning(harmony::END),
                    harmony::Kind::Reasoning | harmony::Kind::Text => State::Text,
                };
                if kind != harmony::Kind::Call {
                    self.held.drain(..end + close.len());
                }
                (self.fresh, self.trim) = (false, false);
                true
            }
            State::Call(mark) => self.step_call(mark, events),
        }
    }

    /// Gives out the first bytes of the held text, without the white space that follows a mark.
    fn give(&mut self, end: usize, event: fn(String) -> ParsedEvent, events: &mut Vec<ParsedEvent>) {
        let rest = self.held.split_off(end);
        let mut text = std::mem::replace(&mut self.held, rest);
        if self.trim {
            let start = text.trim_start();
            if start.is_empty() {
                return;
            }
            text = text.split_off(text.len() - start.len());
        }
        if !text.is_empty() {
            self.trim = false;
            add(events, event(text));
        }
    }

    fn step_text(&mut self, events: &mut Vec<ParsedEvent>) -> bool {
        let blank = self.held.len() - self.held.trim_start().len();
        let start = &self.held[blank..];
        let anywhere = self.marks(Place::Anywhere);
        let first = self.marks(Place::First).filter(|_| self.fresh);
        let found = anywhere
            .clone()
            .filter_map(|mark| Some((self.held.find(mark.open)?, mark)));
        let leading = first
            .clone()
            .filter(|mark| start.starts_with(mark.open))
            .map(|mark| (blank, mark));
        let found = found
            .chain(leading)
            .min_by_key(|(at, mark)| (*at, std::cmp::Reverse(mark.open.len())));
        if let Some((at, mark)) = found {
            let rest = &self.held[at..];
            let longer = |other: &Mark| other.open.len() > rest.len() && other.open.starts_with(rest);
            if !self.ending && anywhere.clone().any(longer) {
                return false;
            }
            self.open(at, mark, events);
            return true;
        }
        // A mark that may have begun.
        if self.fresh && (start.is_empty() || first.clone().any(|mark| mark.open.starts_with(start))) {
            return false;
        }
        let mut end = self.held.len() - open_tail(&self.held, anywhere.clone().map(|mark| mark.open));
        if anywhere.clone().next().is_some() {
            end = self.held[..end].trim_end().len();
        }
        if end > 0 {
            self.fresh = false;
            self.give(end, ParsedEvent::Text, events);
        }
        false
    }

    /// Takes the mark that stands at this place of the held text.
    fn open(&mut self, at: usize, mark: &'static Mark, events: &mut Vec<ParsedEvent>) {
        let end = self.held[..at].trim_end().len();
        let blank = if mark.place == Place::First && mark.kept {
            0
        } else {
            at
        };
        if end > 0 {
            self.fresh = false;
            self.give(end, ParsedEvent::Text, events);
            self.held.drain(..at - end);
        } else {
            self.held.drain(..blank);
        }
        if !mark.kept {
            self.held.drain(..mark.open.len());
            self.trim = true;
        }
        self.state = match mark.action {
            Action::Drop | Action::Frame => State::Text,
            Action::Reasoning => State::Reasoning(mark.close.unwrap_or_default()),
            Action::Call(_) => State::Call(mark),
            Action::Head => State::Head(mark),
        };
    }

    fn step_call(&mut self, mark: &'static Mark, events: &mut Vec<ParsedEvent>) -> bool {
        // A mark without an end is ended by the next one.
        let (close, again) = match mark.close {
            Some(close) => (close, false),
            None if mark.kept => return false,
            None => (mark.open, true),
        };
        let mut from = 0;
        while let Some(at) = self.held[from..].find(close).map(|at| from + at) {
            match self.read(mark, &self.held[..at]) {
                Err(body::Unread::Open) => from = at + close.len(),
                read => {
                    let rest = self.held.split_off(at + close.len());
                    let whole = std::mem::replace(&mut self.held, rest);
                    let written = if again { &whole[..at] } else { &whole };
                    self.called(mark, written, read.ok(), events);
                    if again {
                        self.state = State::Call(mark);
                    }
                    return true;
                }
            }
        }
        false
    }

    /// Reads the calls of a body. An answer that only looks like a call has to name a tool that there is.
    fn read(&self, mark: &Mark, body: &str) -> Result<Vec<body::Call>, body::Unread> {
        let Action::Call(read) = mark.action else {
            return Err(body::Unread::Bad);
        };
        let calls = read(body, &self.tools)?;
        let known = |call: &body::Call| self.tools.iter().any(|tool| tool.name == call.name);
        let named = calls.iter().all(|call| !call.name.is_empty());
        if named && (mark.place == Place::Anywhere || calls.iter().all(known)) {
            Ok(calls)
        } else {
            Err(body::Unread::Bad)
        }
    }

    /// Gives the calls of a body out, or the body where it has none.
    fn called(
        &mut self,
        mark: &Mark,
        written: &str,
        calls: Option<Vec<body::Call>>,
        events: &mut Vec<ParsedEvent>,
    ) {
        self.state = State::Text;
        self.fresh = false;
        match calls {
            Some(calls) => {
                self.trim = true;
                events.extend(calls.into_iter().map(|call| {
                    ParsedEvent::ToolCall(ParsedCall {
                        id: call.id,
                        name: call.name,
                        arguments: call.arguments,
                    })
                }));
            }
            None if mark.place == Place::First => add(events, ParsedEvent::Text(written.to_owned())),
            None => {
                self.trim = true;
                let open = if mark.kept { "" } else { mark.open };
                events.push(ParsedEvent::Malformed(format!("{open}{written}")));
            }
        }
    }

    fn end(&mut self, stopped: bool) -> Vec<ParsedEvent> {
        let mut events = Vec::new();
        self.ending = true;
        if matches!(self.state, State::Reasoning(_)) {
            let mut calls = self.marks(Place::Anywhere).filter(|mark| mark.of_calls);
            if calls.any(|mark| self.held.trim_start().starts_with(mark.open)) {
                self.state = State::Text;
            }
        }
        while self.step(&mut events) {}
        match self.state {
            State::Text => self.give(self.held.len(), ParsedEvent::Text, &mut events),
            State::Reasoning(_) => {
                self.held.truncate(self.held.trim_end().len());
                self.give(self.held.len(), ParsedEvent::Reasoning, &mut events);
            }
            State::Head(mark) => {
                let head = std::mem::take(&mut self.held);
                self.called(mark, &head, None, &mut events);
            }
            State::Call(mark) => {
                let body = std::mem::take(&mut self.held);
                // What has no end mark ends with its own last brace.
                let whole = stopped || mark.close.is_none();
                let calls = if whole { self.read(mark, &body).ok() } else { None };
                self.called(mark, &body, calls, &mut events);
            }
        }
        self.held.clear();
        self.state = State::Text;
        events
    }
}

/// Adds text to the last event of its kind.
fn add(events: &mut Vec<ParsedEvent>, event: ParsedEvent) {
    match (events.last_mut(), event) {
        (_, ParsedEvent::Text(text) | ParsedEvent::Reasoning(text)) if text.is_empty() => {}
        (Some(ParsedEvent::Text(last)), ParsedEvent::Text(text))
        | (Some(ParsedEvent::Reasoning(last)), ParsedEvent::Reasoning(text)) => last.push_str(&text),
        (_, event) => events.push(event),
    }
}

/// Length of the longest end of a text that begins one of the marks.
fn open_tail<'a>(text: &str, marks: impl Iterator<Item = &'a str>) -> usize {
    let marks: Vec<&str> = marks.collect();
    let longest = marks.iter().map(|mark| mark.len()).max().unwrap_or(0);
    let from = text.len().saturating_sub(longest.saturating_sub(1));
    (from..text.len())
        .filter(|&at| text.is_char_boundary(at))
        .find(|&at| marks.iter().any(|mark| mark.starts_with(&text[at..])))
        .map_or(0, |at| text.len() - at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn tools() -> [Tool; 1] {
        [Tool {
            name: "f".to_owned(),
            parameters: json!({"properties": {"x": {"type": "string"}}}),
        }]
    }

    fn run(parser: &OutputParser, pieces: &[&str]) -> Vec<ParsedEvent> {
        let mut parser = parser.clone();
        let mut events = Vec::new();
        let given = pieces
            .iter()
            .flat_map(|piece| parser.push(piece))
            .collect::<Vec<_>>();
        for event in given.into_iter().chain(parser.finish_at_stop()) {
            add(&mut events, event);
        }
        events
    }

    #[test]
    fn what_looks_like_a_call_and_is_none_is_not_shown_as_text() {
        let parser = OutputParser::new(ToolFormat::Hermes, &tools());
        let events = run(&parser, &["a <tool_call>{no}</tool_call> < b"]);
        let expect = [
            ParsedEvent::Text("a".to_owned()),
            ParsedEvent::Malformed("<tool_call>{no}</tool_call>".to_owned()),
            ParsedEvent::Text("< b".to_owned()),
        ];
        assert_eq!(events, expect);
        // Where nothing marks it, it is text.
        for text in ["{\"a\": 1}", "{\"name\": \"g\", \"parameters\": {}}", " {"] {
            let parser = OutputParser::new(ToolFormat::Llama3Json, &tools());
            assert_eq!(run(&parser, &[text]), [ParsedEvent::Text(text.to_owned())]);
        }
    }

    #[test]
    fn a_mark_inside_of_an_argument_does_not_end_the_call() {
        let parser = OutputParser::new(ToolFormat::Hermes, &tools());
        let text = "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"</tool_call>\"}}</tool_call>";
        for at in 0..text.len() {
            let events = run(&parser, &[&text[..at], &text[at..]]);
            assert!(
                matches!(&events[..], [ParsedEvent::ToolCall(call)] if call.arguments == "{\"x\": \"</tool_call>\"}"),
                "{events:?}"
            );
        }
    }

    #[test]
    fn without_tools_nothing_is_a_call() {
        for (format, text) in [
            (
                ToolFormat::Hermes,
                "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
            ),
            (
                ToolFormat::Qwen3Coder,
                "Write <tool_call> <function=f></function> </tool_call>.",
            ),
            (ToolFormat::Mistral, "[TOOL_CALLS]"),
        ] {
            let parser = OutputParser::new(format, &[]);
            assert_eq!(run(&parser, &[text]), [ParsedEvent::Text(text.to_owned())]);
        }
    }

    #[test]
    fn a_call_that_is_cut_off_is_malformed() {
        for (format, text) in [
            (ToolFormat::Hermes, "<tool_call>{\"name\""),
            (ToolFormat::Glm, "<tool_call>f"),
            (
                ToolFormat::Harmony,
                "<|channel|>commentary to=functions.f<|message|>{",
            ),
            (ToolFormat::MistralArgs, "[TOOL_CALLS]f[ARGS]{\"x\""),
        ] {
            let mut parser = OutputParser::new(format, &tools());
            assert_eq!(parser.push(text), []);
            assert_eq!(parser.finish(), [ParsedEvent::Malformed(text.to_owned())]);
        }
    }

    #[test]
    fn thinking_has_a_length_and_an_end() {
        let parser = OutputParser::new(ToolFormat::Hermes, &[]);
        let mut parser = parser.after_prompt("<|im_start|>assistant\n<think>\n");
        assert_eq!(parser.push("a"), [ParsedEvent::Reasoning("a".to_owned())]);
        assert_eq!(parser.reasoning_tokens(), 1);
        let end = parser.end_of_reasoning().unwrap();
        assert_eq!(
            parser.push(&format!("{end}b")),
            [ParsedEvent::Text("b".to_owned())]
        );
        assert_eq!((parser.end_of_reasoning(), parser.is_reasoning()), (None, false));
    }

    #[test]
    fn formats_have_names() {
        for (index, format) in ToolFormat::ALL.into_iter().enumerate() {
            assert_eq!(format.to_string().parse::<ToolFormat>().unwrap(), format);
            assert_eq!(format as usize, index, "none is left out");
        }
        let error = "xml".parse::<ToolFormat>().unwrap_err().to_string();
        assert!(
            error.contains("`xml`") && error.contains("qwen3-coder"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn text_without_marks_is_kept(pieces in prop::collection::vec("[a<|\\[{ tß_>\n]{0,4}", 0..12)) {
            for format in [ToolFormat::Hermes, ToolFormat::Harmony, ToolFormat::Llama3Json, ToolFormat::Pythonic] {
                let parser = OutputParser::new(format, &tools());
                let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
                let whole = pieces.concat();
                let events = run(&parser, &pieces);
                let text = if whole.is_empty() { vec![] } else { vec![ParsedEvent::Text(whole)] };
                prop_assert_eq!(events, text);
            }
        }
    }
}
