//! Text, reasoning and tool calls of an answer as one ordered stream.

mod body;
mod format;

pub use format::ToolFormat;
use format::{Action, Mark};

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParsedEvent {
    /// Text for the reader.
    Text(String),
    /// What the model thinks before it answers.
    Reasoning(String),
    /// A tool call begins.
    ToolCallBegin {
        /// Its number in this answer, from 0.
        index: usize,
        /// The id that the model gave it.
        id: Option<String>,
        /// The tool's name.
        name: String,
    },
    /// More of the call's arguments, as JSON text.
    ToolCallArguments(String),
    /// The call is complete.
    ToolCallEnd,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Text,
    /// Until this mark.
    Reasoning(&'static str),
    /// Inside of this mark.
    Call(&'static Mark),
}

/// Takes the text of an answer, with special tokens written out, and gives its parts in order.
///
/// Marks never show as text. What looked like a call and is none becomes text as it was written.
#[derive(Clone, Debug)]
pub struct OutputParser {
    marks: &'static [Mark],
    state: State,
    held: String,
    /// Whether nothing but white space has come, so that a mark of the beginning counts.
    fresh: bool,
    calls: usize,
    reasoning_tokens: usize,
}

impl OutputParser {
    /// A parser at the beginning of an answer.
    pub fn new(format: ToolFormat) -> Self {
        Self {
            marks: format.marks(),
            state: State::Text,
            held: String::new(),
            fresh: true,
            calls: 0,
            reasoning_tokens: 0,
        }
    }

    /// A parser of an answer to a prompt that has opened the block of reasoning itself.
    pub fn reasoning_opened(mut self) -> Self {
        self.state = State::Reasoning("</think>");
        self
    }

    /// A parser of an answer to this prompt: one that ends with `<think>` has opened the block of reasoning.
    pub fn after_prompt(self, prompt: &str) -> Self {
        if prompt.trim_end().ends_with("<think>") {
            self.reasoning_opened()
        } else {
            self
        }
    }

    /// Takes the text of the next token or more.
    pub fn push(&mut self, text: &str) -> Vec<ParsedEvent> {
        if matches!(self.state, State::Reasoning(_)) {
            self.reasoning_tokens += 1;
        }
        self.held.push_str(text);
        let mut events = Vec::new();
        while self.step(&mut events) {}
        events
    }

    /// The rest of an answer that was cut off: an unfinished call is text.
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

    /// The text that ends the reasoning, once more than `budget` pieces of it were pushed (one a token). Feed its tokens to
    /// the model and push it here.
    pub fn end_of_budget(&self, budget: usize) -> Option<&'static str> {
        match self.state {
            State::Reasoning(close) if self.reasoning_tokens >= budget => Some(close),
            _ => None,
        }
    }

    /// Takes what is certain from the held text; false when more is needed.
    fn step(&mut self, events: &mut Vec<ParsedEvent>) -> bool {
        match self.state {
            State::Text => self.step_text(events),
            State::Reasoning(close) => {
                let found = self.held.find(close);
                let end =
                    found.unwrap_or_else(|| self.held.len() - open_tail(&self.held, &[close].into_iter()));
                let rest = self.held.split_off(end);
                let text = std::mem::replace(&mut self.held, rest);
                add(events, ParsedEvent::Reasoning(text));
                if found.is_some() {
                    self.held.drain(..close.len());
                    self.state = State::Text;
                }
                found.is_some()
            }
            State::Call(mark) => {
                let Some(end) = mark.close.and_then(|close| self.held.find(close)) else {
                    return false;
                };
                let close = mark.close.unwrap_or_default();
                let rest = self.held.split_off(end + close.len());
                let whole = std::mem::replace(&mut self.held, rest);
                self.call(mark, &whole[..end], close, events);
                true
            }
        }
    }

    fn step_text(&mut self, events: &mut Vec<ParsedEvent>) -> bool {
        if self.fresh {
            let start = self.held.trim_start();
            let starting = || self.marks.iter().filter(|mark| mark.only_first);
            let blank = self.held.len() - start.len();
            if start.is_empty() {
                return false;
            }
            if let Some(mark) = starting().find(|mark| start.starts_with(mark.open)) {
                let blank: String = self.held.drain(..blank + mark.open.len()).take(blank).collect();
                add(events, ParsedEvent::Text(blank));
                self.fresh = false;
                self.state = State::Call(mark);
                return true;
            }
            self.fresh = starting().any(|mark| mark.open.starts_with(start));
            if self.fresh {
                return false;
            }
        }
        let anywhere = || self.marks.iter().filter(|mark| !mark.only_first);
        let found = anywhere().filter_map(|mark| Some((self.held.find(mark.open)?, mark)));
        let found = found.min_by_key(|(at, mark)| (*at, std::cmp::Reverse(mark.open.len())));
        let open = open_tail(&self.held, &anywhere().map(|mark| mark.open));
        let Some((at, mark)) = found else {
            let rest = self.held.split_off(self.held.len() - open);
            let text = std::mem::replace(&mut self.held, rest);
            add(events, ParsedEvent::Text(text));
            return false;
        };
        let rest = self.held.split_off(at + mark.open.len());
        let mut text = std::mem::replace(&mut self.held, rest);
        text.truncate(at);
        add(events, ParsedEvent::Text(text));
        match mark.action {
            Action::Drop => {}
            Action::Reasoning => self.state = State::Reasoning(mark.close.unwrap_or_default()),
            Action::Call(_) => self.state = State::Call(mark),
        }
        true
    }

    fn end(&mut self, stopped: bool) -> Vec<ParsedEvent> {
        let mut events = Vec::new();
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Text => add(&mut events, ParsedEvent::Text(held)),
            State::Reasoning(_) => add(&mut events, ParsedEvent::Reasoning(held)),
            State::Call(mark) if stopped => self.call(mark, &held, "", &mut events),
            State::Call(mark) => add(&mut events, ParsedEvent::Text(format!("{}{held}", mark.shown()))),
        }
        self.state = State::Text;
        events
    }

    fn call(&mut self, mark: &'static Mark, body: &str, close: &str, events: &mut Vec<ParsedEvent>) {
        self.state = State::Text;
        self.fresh = false;
        let Action::Call(read) = mark.action else { return };
        let whole = if mark.only_first {
            format!("{}{body}", mark.open)
        } else {
            body.to_owned()
        };
        let Some(calls) = read(&whole) else {
            add(
                events,
                ParsedEvent::Text(format!("{}{body}{close}", mark.shown())),
            );
            return;
        };
        for call in calls {
            events.push(ParsedEvent::ToolCallBegin {
                index: self.calls,
                id: call.id,
                name: call.name,
            });
            events.push(ParsedEvent::ToolCallArguments(call.arguments));
            events.push(ParsedEvent::ToolCallEnd);
            self.calls += 1;
        }
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
fn open_tail<'a>(text: &str, marks: &(impl Iterator<Item = &'a str> + Clone)) -> usize {
    let at = text.char_indices().map(|(at, _)| at);
    at.into_iter()
        .find(|&at| {
            marks
                .clone()
                .any(|mark| mark.len() > text.len() - at && mark.starts_with(&text[at..]))
        })
        .map_or(0, |at| text.len() - at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(parser: &OutputParser, pieces: &[&str]) -> Vec<ParsedEvent> {
        let mut parser = parser.clone();
        let mut events = Vec::new();
        for piece in pieces {
            parser
                .push(piece)
                .into_iter()
                .for_each(|event| add(&mut events, event));
        }
        parser
            .finish_at_stop()
            .into_iter()
            .for_each(|event| add(&mut events, event));
        events
    }

    fn golden() -> Vec<(ToolFormat, &'static str, &'static str)> {
        use ToolFormat as F;
        vec![
            (
                F::Hermes,
                "<think>a</think>b<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1.0}}\n</tool_call>",
                "R:a T:b f{\"x\": 1.0}",
            ),
            (
                F::Hermes,
                "<tool_call>{no}</tool_call> < b",
                "T:<tool_call>{no}</tool_call> < b",
            ),
            (
                F::Llama3Json,
                "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"x\": 1}}",
                "f{\"x\": 1}",
            ),
            (
                F::Llama3Json,
                "{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {}}",
                "f{} g{}",
            ),
            (F::Llama3Json, "{\"a\": 1}", "T:{\"a\": 1}"),
            (
                F::Pythonic,
                "[f(x=1, y='a\\'b'), g(z=[True, None])]",
                "f{\"x\":1,\"y\":\"a'b\"} g{\"z\":[true,null]}",
            ),
            (
                F::Mistral,
                "a[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}, \"id\": \"abcdefghi\"}]",
                "T:a f{}",
            ),
            (
                F::Mistral,
                "[TOOL_CALLS]f[ARGS]{\"x\": 1}[TOOL_CALLS]g[ARGS]{}",
                "f{\"x\": 1} g{}",
            ),
            (
                F::DeepSeek,
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"x\": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "f{\"x\": 1}",
            ),
            (
                F::DeepSeek,
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "f{}",
            ),
            (
                F::Qwen3Coder,
                "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=y>\na b\n</parameter>\n</function>\n</tool_call>",
                "f{\"x\":1,\"y\":\"a b\"}",
            ),
            (
                F::Glm,
                "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>a</arg_value>\n</tool_call>",
                "f{\"x\":\"a\"}",
            ),
            (
                F::Gemma,
                "<start_function_call>call:f{x:<escape>a, b<escape>,y:2}<end_function_call>",
                "f{\"x\":\"a, b\",\"y\":2}",
            ),
            (
                F::Harmony,
                "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"x\": 1}<|call|>",
                "R:a f{\"x\": 1}",
            ),
            (F::Harmony, "<|channel|>final<|message|>b<|return|>", "T:b"),
        ]
    }

    fn show(events: &[ParsedEvent]) -> String {
        let mut out = Vec::new();
        for event in events {
            match event {
                ParsedEvent::Text(text) => out.push(format!("T:{text}")),
                ParsedEvent::Reasoning(text) => out.push(format!("R:{text}")),
                ParsedEvent::ToolCallBegin { name, .. } => out.push(name.clone()),
                ParsedEvent::ToolCallArguments(text) => out.last_mut().unwrap().push_str(text),
                ParsedEvent::ToolCallEnd => {}
            }
        }
        out.join(" ")
    }

    #[test]
    fn every_split_of_an_answer_gives_what_the_whole_gives() {
        for (format, text, expected) in golden() {
            let parser = OutputParser::new(format);
            let whole = run(&parser, &[text]);
            assert_eq!(show(&whole), expected, "{text}");
            let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            for &a in &ends {
                assert_eq!(run(&parser, &[&text[..a], &text[a..]]), whole);
                for &b in ends.iter().filter(|&&b| b > a) {
                    assert_eq!(run(&parser, &[&text[..a], &text[a..b], &text[b..]]), whole);
                }
            }
            let single: Vec<String> = text.chars().map(String::from).collect();
            let single: Vec<&str> = single.iter().map(String::as_str).collect();
            assert_eq!(run(&parser, &single), whole);
        }
    }

    #[test]
    fn a_cut_call_is_text_and_thinking_has_a_budget() {
        let mut parser = OutputParser::new(ToolFormat::Hermes);
        assert_eq!(parser.push("<tool_call>{\"name\""), []);
        assert_eq!(
            parser.finish(),
            [ParsedEvent::Text("<tool_call>{\"name\"".to_owned())]
        );
        let mut parser =
            OutputParser::new(ToolFormat::Hermes).after_prompt("<|im_start|>assistant\n<think>\n");
        assert_eq!(parser.push("a"), [ParsedEvent::Reasoning("a".to_owned())]);
        assert_eq!(parser.end_of_budget(2), None);
        assert_eq!(parser.end_of_budget(1), Some("</think>"));
        assert_eq!(parser.push("</think>b"), [ParsedEvent::Text("b".to_owned())]);
        assert_eq!(parser.end_of_budget(1), None);
    }

    proptest! {
        #[test]
        fn text_without_marks_is_kept(pieces in prop::collection::vec("[a<|\\[{ tß_>]{0,4}", 0..12)) {
            for format in [ToolFormat::Hermes, ToolFormat::Harmony, ToolFormat::Llama3Json, ToolFormat::Pythonic] {
                let parser = OutputParser::new(format);
                let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
                let whole = pieces.concat();
                let events = run(&parser, &pieces);
                let text = if whole.is_empty() { vec![] } else { vec![ParsedEvent::Text(whole)] };
                prop_assert_eq!(events, text);
            }
        }
    }
}
