//! Answers under the grammar of tool calls of every format, chosen at random among the allowed tokens: the parser finds
//! calls in them, whose arguments are valid for another library's validator. The vocabularies are those of a
//! `tokenizer.json`.
#![cfg(feature = "grammar")]

use mlx_engine_text::{
    CallGrammar, Grammar, OutputParser, ParsedEvent, TextError, Thoughts, TokenTable, Tokenizer, Tool,
    ToolFormat,
};
use serde_json::{Map, Value, json};

/// Those that have a grammar: `Plain` has no calls.
fn formats() -> impl Iterator<Item = ToolFormat> {
    ToolFormat::ALL
        .into_iter()
        .filter(|format| *format != ToolFormat::Plain)
}

/// Marks that are tokens of their own in the vocabularies of models.
const MARKS: [&str; 53] = [
    "｜DSML｜",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<|START_THINKING|>",
    "<|END_THINKING|>",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    "<|tools_prefix|>",
    "<|tools_suffix|>",
    "<|inner_prefix|>",
    "<|inner_suffix|>",
    "<|function_call|>",
    "<TOOLCALL>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[THINK]",
    "[/THINK]",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<start_function_call>",
    "<end_function_call>",
    "<escape>",
    "<|tool_call>",
    "<tool_call|>",
    "<|\"|>",
    "<|channel>",
    "<channel|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_start|>",
    "<seed:tool_call>",
    "</seed:tool_call>",
    "<seed:think>",
    "</seed:think>",
    "<|channel|>",
    "<|message|>",
    "<|constrain|>",
    "<|start|>",
    "<|end|>",
];

const END: &str = "<|eos|>";

/// The texts that end values and thoughts of a format.
fn closings(format: ToolFormat) -> &'static [&'static str] {
    match format {
        ToolFormat::Mistral | ToolFormat::MistralArgs => &["[/THINK]"],
        ToolFormat::Qwen3Coder => &["</think>", "\n</parameter>\n"],
        ToolFormat::Seed => &["</seed:think>", "\n</parameter>\n"],
        ToolFormat::DeepSeek32 | ToolFormat::DeepSeek4 => &["</think>", "</｜DSML｜parameter>\n"],
        ToolFormat::MiniMax => &["</think>", "</parameter>\n"],
        ToolFormat::MiniCpm => &["</think>", "]]></param>"],
        ToolFormat::Cohere => &["<|END_THINKING|>"],
        ToolFormat::Apertus => &["<|inner_suffix|>"],
        ToolFormat::Glm => &["</think>", "</arg_value>\n"],
        ToolFormat::Gemma => &["</think>", "<escape>"],
        ToolFormat::Gemma4 => &["<channel|>", "<|\"|>"],
        ToolFormat::Harmony => &["<|end|><|start|>assistant"],
        _ => &["</think>"],
    }
}

/// Bytes as tokens, and the marks as special tokens where they are `special`.
fn tokenizer(special: bool) -> Tokenizer {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let mut vocabulary = Map::new();
    for byte in 0..=255_u8 {
        let character = if printable(byte) {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).expect("it is well")
        };
        vocabulary.insert(character.to_string(), json!(byte));
    }
    let marks = if special { &MARKS[..] } else { &[] };
    let mut added = Vec::new();
    for (index, mark) in [END].iter().chain(marks).enumerate() {
        added.push(
            json!({"id": 256 + index, "content": mark, "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}),
        );
    }
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let file = json!({"version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level,
                      "model": {"type": "BPE", "vocab": vocabulary, "merges": []}});
    let folder = tempfile::tempdir().expect("it is well");
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).expect("it is well");
    std::fs::write(
        folder.path().join("tokenizer_config.json"),
        json!({"eos_token": END}).to_string(),
    )
    .expect("it is well");
    Tokenizer::from_folder(folder.path()).expect("it is well")
}

fn tools() -> Vec<Tool> {
    let tool = |name: &str, parameters: Value| Tool {
        name: name.to_owned(),
        parameters,
    };
    vec![
        tool(
            "get_weather",
            json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                   "required": ["city"], "additionalProperties": false}),
        ),
        tool(
            "note",
            json!({"type": "object", "required": ["kind", "tags"], "additionalProperties": false, "properties": {
                "kind": {"enum": ["short", "long"], "type": "string"},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
                "where": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": false},
                "share": {"type": "boolean"}},
                "$defs": {"tag": {"type": "string", "maxLength": 3}}}),
        ),
        tool(
            "now",
            json!({"type": "object", "properties": {}, "additionalProperties": false}),
        ),
    ]
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % end.max(1) as u64) as usize
    }
}

/// An answer as text with its special tokens written out.
fn answer(
    format: ToolFormat,
    table: &TokenTable,
    grammar: &Grammar,
    tokenizer: &Tokenizer,
    random: &mut Random,
) -> String {
    let mut walk = table
        .compile(grammar)
        .unwrap_or_else(|error| panic!("{error}: {grammar:?}"))
        .constraint();
    let mut text = Vec::new();
    for step in 0..3000 {
        if walk.is_stopped() {
            break;
        }
        let allowed: Vec<u32> = walk.mask().expect("it is well").tokens().collect();
        let ends = walk.is_accepting();
        if ends && (step > 60 || random.below(4) == 0) {
            break;
        }
        // What brings an end nearer: the next byte of what closes a value, a special token, a quote or a bracket.
        let begun: Vec<(usize, &str)> = closings(format)
            .iter()
            .filter_map(|closing| {
                let bytes = closing.as_bytes();
                let begun = (1..bytes.len())
                    .rev()
                    .find(|&len| text.ends_with(&bytes[..len]))?;
                Some((begun, *closing))
            })
            .collect();
        let (begun, closing) = if begun.is_empty() {
            let closings = closings(format);
            (0, closings[random.below(closings.len())])
        } else {
            begun[random.below(begun.len())]
        };
        // A mark inside of it is a token of its own where the vocabulary has one.
        let rest = &closing.as_bytes()[begun..];
        let mark = |id: &&u32| **id > 256 && rest.starts_with(tokenizer.decode(&[**id], false).as_bytes());
        let next = allowed.iter().find(mark).copied().unwrap_or(u32::from(rest[0]));
        let closing = Some((begun, next)).filter(|(_, id)| allowed.contains(id));
        let near = |id: &u32| {
            (*id > 255 && !(ends && tokenizer.eos_ids().contains(id)))
                || matches!(table.bytes(*id), [b'"' | b'}' | b']' | b')'])
        };
        let nearer: Vec<u32> = allowed.iter().copied().filter(near).collect();
        let free: Vec<u32> = allowed
            .iter()
            .copied()
            .filter(|id| !(ends && tokenizer.eos_ids().contains(id)))
            .collect();
        let hurried = step > 30 || random.below(3) == 0;
        let token = match closing {
            Some((begun, id)) if hurried && (begun > 0 || random.below(2) == 0) => id,
            _ if hurried && !nearer.is_empty() => nearer[random.below(nearer.len())],
            _ => free[random.below(free.len())],
        };
        let written = tokenizer.decode(&[token], false);
        match table.bytes(token) {
            [] => text.extend_from_slice(written.as_bytes()),
            bytes => text.extend_from_slice(bytes),
        }
        walk.commit(token).expect("it is well");
    }
    assert!(
        walk.is_stopped() || walk.is_accepting(),
        "no end: {}",
        String::from_utf8_lossy(&text)
    );
    String::from_utf8(text).expect("it is well")
}

#[test]
fn calls_under_a_grammar_are_read_and_valid() {
    let tools = tools();
    let validators: Vec<_> = tools
        .iter()
        .map(|tool| jsonschema::validator_for(&tool.parameters).unwrap())
        .collect();
    let mut calls = 0;
    for special in [true, false] {
        let tokenizer = tokenizer(special);
        let table = TokenTable::new(&tokenizer).unwrap();
        for format in formats() {
            for (thoughts, required) in [
                (Thoughts::None, true),
                (Thoughts::Possible, true),
                (Thoughts::Opened, true),
                (Thoughts::None, false),
            ] {
                let grammar = CallGrammar {
                    format,
                    tools: &tools,
                    required,
                    parallel: true,
                    thoughts,
                };
                let grammar = Grammar::lark(&grammar.lark(&tokenizer).unwrap());
                for seed in 0..6 {
                    let prompt = match (thoughts, format) {
                        (Thoughts::Opened, ToolFormat::Mistral | ToolFormat::MistralArgs) => "[THINK]",
                        (Thoughts::Opened, ToolFormat::Seed) => "<seed:think>",
                        (Thoughts::Opened, ToolFormat::Cohere) => "<|START_THINKING|>",
                        (Thoughts::Opened, ToolFormat::Apertus) => "<|inner_prefix|>",
                        (Thoughts::Opened, ToolFormat::Gemma4) => "<|channel>thought",
                        // Its template never opens them, and Functionary has none.
                        (Thoughts::Opened, ToolFormat::Harmony)
                        | (Thoughts::Opened | Thoughts::Possible, ToolFormat::FunctionJson) => continue,
                        (Thoughts::Opened, _) => "<think>",
                        _ => "",
                    };
                    let text = answer(format, &table, &grammar, &tokenizer, &mut Random(seed));
                    let mut parser = OutputParser::new(format, &tools).after_prompt(prompt);
                    let mut events = parser.push(&text);
                    events.extend(parser.finish_at_stop());
                    let mut found = 0;
                    for event in &events {
                        match event {
                            ParsedEvent::ToolCall(call) => {
                                let at = tools.iter().position(|tool| tool.name == call.name);
                                let at = at.unwrap_or_else(|| panic!("{format}: {call:?} in {text:?}"));
                                let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
                                assert!(
                                    validators[at].is_valid(&arguments),
                                    "{format}: {arguments} of {} in {text:?}",
                                    call.name
                                );
                                found += 1;
                            }
                            ParsedEvent::Malformed(what) => panic!("{format}: {what:?} in {text:?}"),
                            _ => {}
                        }
                    }
                    assert!(
                        found > 0 || !required,
                        "{format}: no call in {text:?}: {events:?}"
                    );
                    calls += found;
                }
            }
        }
    }
    assert!(calls > 500, "{calls} calls");
}

#[test]
fn what_a_format_cannot_hold_is_refused_with_the_tool() {
    let tokenizer = tokenizer(true);
    let refused = |format, parameters: Value| {
        let tools = [Tool {
            name: "f".to_owned(),
            parameters,
        }];
        let grammar = CallGrammar {
            format,
            tools: &tools,
            required: true,
            parallel: true,
            thoughts: Thoughts::None,
        };
        match grammar.lark(&tokenizer) {
            Err(TextError::Grammar { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let object =
        |property: Value| json!({"type": "object", "properties": {"a": property}, "required": ["a"]});
    let reason = refused(
        ToolFormat::Glm,
        object(json!({"type": "string", "pattern": "^a"})),
    );
    assert!(
        reason.contains("tool `f`") && reason.contains("`pattern`"),
        "{reason}"
    );
    let reason = refused(
        ToolFormat::Qwen3Coder,
        json!({"type": "object", "minProperties": 1}),
    );
    assert!(reason.contains("`minProperties`"), "{reason}");
    let reason = refused(
        ToolFormat::Qwen3Coder,
        json!({"type": "object", "required": ["b"]}),
    );
    assert!(reason.contains("`b` is required"), "{reason}");
    let reason = refused(ToolFormat::Plain, object(json!({})));
    assert!(reason.contains("`plain`"), "{reason}");
}
