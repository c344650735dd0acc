//! Answers of models: whatever they write, and however it comes in pieces, the events are the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_engine_text::{OutputParser, ParsedEvent, Tool, ToolFormat};
use serde_json::json;

/// The events of an answer in these pieces, with neighbours that say the same kind of thing as one.
fn events<'a>(format: ToolFormat, pieces: impl Iterator<Item = &'a str>) -> Vec<ParsedEvent> {
    let tool = Tool {
        name: "get_weather".to_owned(),
        parameters: json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),
    };
    let mut parser = OutputParser::new(format, &[tool]);
    let mut found: Vec<ParsedEvent> = pieces.flat_map(|piece| parser.push(piece)).collect();
    found.extend(parser.finish_at_stop());
    let mut joined: Vec<ParsedEvent> = Vec::new();
    for event in found {
        match (joined.last_mut(), event) {
            (Some(ParsedEvent::Text(text)), ParsedEvent::Text(more))
            | (Some(ParsedEvent::Reasoning(text)), ParsedEvent::Reasoning(more)) => text.push_str(&more),
            (_, event) => joined.push(event),
        }
    }
    joined
}

fuzz_target!(|input: (u8, u8, &str)| {
    let (format, width, answer) = input;
    let format = ToolFormat::ALL[usize::from(format) % ToolFormat::ALL.len()];
    let whole = events(format, std::iter::once(answer));
    let width = usize::from(width % 7) + 1;
    let borders: Vec<usize> = answer
        .char_indices()
        .map(|(at, _)| at)
        .step_by(width)
        .chain([answer.len()])
        .collect();
    let pieces = borders.windows(2).map(|pair| &answer[pair[0]..pair[1]]);
    assert_eq!(events(format, pieces), whole, "{format:?} in pieces of {width}");
});
