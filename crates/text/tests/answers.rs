//! Answers as published chat templates write them and as llama.cpp's tests of its parsers expect them, whole and in every
//! split.

use mlx_engine_text::{OutputParser, ParsedEvent, Tool, ToolFormat};
use serde_json::Value;

#[derive(Debug, Default, PartialEq)]
struct Parts {
    text: String,
    reasoning: String,
    calls: Vec<(Option<String>, String, Value)>,
    malformed: Vec<String>,
}

impl Parts {
    fn take(&mut self, events: Vec<ParsedEvent>) {
        for event in events {
            match event {
                ParsedEvent::Text(text) => self.text.push_str(&text),
                ParsedEvent::Reasoning(text) => self.reasoning.push_str(&text),
                ParsedEvent::ToolCall(call) => {
                    let arguments = serde_json::from_str(&call.arguments).expect("it is well");
                    self.calls.push((call.id, call.name, arguments));
                }
                ParsedEvent::Malformed(text) => self.malformed.push(text),
            }
        }
    }
}

fn parse(parser: &OutputParser, pieces: &[&str]) -> Parts {
    let mut parser = parser.clone();
    let mut parts = Parts::default();
    for piece in pieces {
        parts.take(parser.push(piece));
    }
    parts.take(parser.finish_at_stop());
    parts
}

fn tools(tools: &Value) -> Vec<Tool> {
    let tool = |tool: &Value| Tool {
        name: tool["function"]["name"].as_str().expect("it is well").to_owned(),
        parameters: tool["function"]["parameters"].clone(),
    };
    tools.as_array().expect("it is well").iter().map(tool).collect()
}

/// Published templates whose calls are in formats that are not known here.
const UNKNOWN: [&str; 8] = [
    "CohereForAI-c4ai-command-r-plus-tool_use.jinja",
    "GigaChat3-10B-A1.8B.jinja",
    "Kimi-K3.jinja",
    "MiniMax-M3.jinja",
    "meetkai-functionary-medium-v3.2.jinja",
    "muse-glimmer.jinja",
    "tencent-Hy3.jinja",
    "upstage-Solar-Open-100B.jinja",
];

/// Cases in which this parser finds something else, by template and case or line, and why.
const KNOWN: [(&str, &str, &str); 13] = [
    (
        "LFM2.5-8B-A1B.jinja",
        "kinds of values",
        "the template writes quotes into strings as they are, which is no Python",
    ),
    (
        "openai-gpt-oss-120b.jinja",
        "text and call",
        "the template makes thoughts of text before a call",
    ),
    (
        "openai-gpt-oss-120b.jinja",
        "6547",
        "a call of a tool that nobody offered is malformed",
    ),
    (
        "openai-gpt-oss-120b.jinja",
        "6556",
        "a call of a tool that nobody offered is malformed",
    ),
    (
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja",
        "text and call",
        "the template writes text behind calls as a turn of its own",
    ),
    (
        "inclusionai-ling-3.0-flash.jinja",
        "4742",
        "the text of the token that ends the turn",
    ),
    ("Kimi-K2-Thinking.jinja", "5103", "calls without their marks"),
    (
        "Apriel-1.6-15b-Thinker-fixed.jinja",
        "text",
        "the template cuts the text",
    ),
    (
        "Apriel-1.6-15b-Thinker-fixed.jinja",
        "text and call",
        "the template cuts the text",
    ),
    (
        "Apriel-1.6-15b-Thinker-fixed.jinja",
        "reasoning",
        "thoughts before `[BEGIN FINAL RESPONSE]`",
    ),
    (
        "Apriel-1.6-15b-Thinker-fixed.jinja",
        "6211",
        "thoughts before `[BEGIN FINAL RESPONSE]`",
    ),
    (
        "Apriel-1.6-15b-Thinker-fixed.jinja",
        "6219",
        "thoughts before `[BEGIN FINAL RESPONSE]`",
    ),
    (
        "Apriel-1.6-15b-Thinker-fixed.jinja",
        "reasoning and call",
        "thoughts before `[BEGIN FINAL RESPONSE]`",
    ),
];

/// Whether the parts are those that a case has.
fn same(found: &Parts, case: &Value) -> bool {
    let calls = case["calls"].as_array().expect("it is well");
    let text = |name: &str| case[name].as_str().expect("it is well").trim();
    found.text.trim() == text("text")
        && found.reasoning.trim() == text("reasoning")
        && found.malformed.is_empty()
        && found.calls.len() == calls.len()
        && found
            .calls
            .iter()
            .zip(calls)
            .all(|((id, name, arguments), call)| {
                call["name"] == *name
                    && call["arguments"] == *arguments
                    && (call["id"].is_null() || call["id"].as_str() == id.as_deref())
            })
}

/// The format of each template, by its file.
fn formats() -> Value {
    serde_json::from_str(include_str!("fixtures/formats.json")).expect("it is well")
}

fn all(check: impl Fn(&OutputParser, &str, &Value) -> Result<(), String>) -> usize {
    let formats = formats();
    let made: Value = serde_json::from_str(include_str!("fixtures/answers.json")).expect("it is well");
    let (mut count, mut wrong) = (0, Vec::new());
    for case in made["cases"].as_array().expect("it is well") {
        let Some(answer) = case["answer"].as_str() else {
            continue;
        };
        let name = case["template"].as_str().expect("it is well");
        let format: ToolFormat = formats[name]
            .as_str()
            .expect("it is well")
            .parse()
            .expect("a format");
        if UNKNOWN.contains(&name) {
            assert_eq!(format, ToolFormat::Plain, "{name}");
            continue;
        }
        let offered = tools(case.get("tools").unwrap_or(&made["tools"]));
        let mut parser = OutputParser::new(format, &offered);
        if case["splits"] == false {
            parser = parser.without_reasoning();
        }
        let parser = parser.after_prompt(case["opened"].as_str().expect("it is well"));
        count += 1;
        if let Err(error) = check(&parser, answer, case) {
            wrong.push(format!("{format} {name}: {case}\n   {error}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {count} differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    count
}

#[cfg(feature = "oracle")]
#[test]
fn published_templates_are_known_by_their_marks() {
    let folder = std::env::var_os("MLX_ENGINE_TEST_DATA");
    let folder =
        folder.expect("MLX_ENGINE_TEST_DATA names the test data; run the tests by `cargo xtask test`");
    let folder = std::path::Path::new(&folder).join("templates");
    for (name, format) in formats().as_object().expect("it is well") {
        let source = std::fs::read_to_string(folder.join(name)).expect("it is well");
        assert_eq!(ToolFormat::detect(&source).name(), format, "{name}");
    }
}

#[test]
fn answers_have_the_parts_that_others_find_in_them() {
    let known = |case: &Value| {
        let title = case["case"]
            .as_str()
            .map_or_else(|| case["line"].to_string(), str::to_owned);
        KNOWN
            .iter()
            .any(|(template, which, _)| case["template"] == *template && *which == title)
    };
    let count = all(|parser, answer, case| {
        let found = parse(parser, &[answer]);
        if same(&found, case) == known(case) {
            Err(format!("{found:?}"))
        } else {
            Ok(())
        }
    });
    assert!(count > 500, "{count} cases");
}

// It takes a minute, which the runs without other programs' data are too many for.
#[cfg(feature = "oracle")]
#[test]
fn every_split_of_an_answer_gives_what_the_whole_gives() {
    all(|parser, answer, _| {
        let whole = parse(parser, &[answer]);
        let check = |pieces: &[&str]| {
            let found = parse(parser, pieces);
            if found == whole {
                Ok(())
            } else {
                Err(format!("{pieces:?}: {found:?}, whole: {whole:?}"))
            }
        };
        let single: Vec<String> = answer.chars().map(String::from).collect();
        check(&single.iter().map(String::as_str).collect::<Vec<_>>())?;
        let ends: Vec<usize> = answer.char_indices().map(|(at, _)| at).collect();
        for &a in &ends {
            check(&[&answer[..a], &answer[a..]])?;
            // All splits in three of what is short.
            for &b in ends.iter().filter(|&&b| b > a && answer.len() < 90) {
                check(&[&answer[..a], &answer[a..b], &answer[b..]])?;
            }
        }
        Ok(())
    });
}
