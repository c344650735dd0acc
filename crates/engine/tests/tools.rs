//! Tools, thoughts and what answers are held to, on the mock.

use futures::StreamExt;
use mlx_engine_core::{
    EngineError, FinishReason, GenerateOutput, GenerateParams, GenerationEvent, LlmEngine, OutputConstraint,
    Prompt, ToolChoice, ToolDefinition,
};
use mlx_engine_engine::{Engine, EngineConfig, MockScript};
use serde_json::json;

const TEMPLATE: &str = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call>{% endif %}\
                        {% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>";

/// One that can open thoughts.
const THINKS: &str = "{% if enable_thinking %}<think>\n{% endif %}";

fn weather() -> ToolDefinition {
    let schema = json!({"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer"}},
                        "required": ["city", "days"], "additionalProperties": false});
    ToolDefinition::new("get_weather", "The weather.", schema).expect("it is well")
}

fn params() -> GenerateParams {
    GenerateParams::default().with_max_tokens(400)
}

async fn engine(reply: &str) -> Engine {
    let script = MockScript::reply(reply).with_chat_template(TEMPLATE);
    Engine::mock("tiny", script, EngineConfig::default())
        .await
        .expect("it is well")
}

async fn thinking(reply: &str) -> Engine {
    let script = MockScript::reply(reply).with_chat_template(format!("{TEMPLATE}{THINKS}"));
    Engine::mock("tiny", script, EngineConfig::default())
        .await
        .expect("it is well")
}

fn prompt() -> Prompt {
    Prompt::user("Hi").with_tools([weather()])
}

async fn ask(reply: &str, params: GenerateParams) -> Result<GenerateOutput, EngineError> {
    engine(reply).await.generate(prompt(), params).await
}

const CALL: &str = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Köln\", \"days\": 1.0}}\n</tool_call>";

#[tokio::test]
async fn the_parts_of_an_answer_come_in_order_and_every_token_once() {
    let reply = format!("<think>hm\n</think>\n\nWait.{CALL}\n{CALL}");
    let engine = engine(&reply).await;
    let events: Vec<_> = engine.stream(prompt(), params()).await.unwrap().collect().await;
    let mut kinds = Vec::new();
    let mut tokens = Vec::new();
    for event in events {
        let event = event.unwrap();
        tokens.extend(event.tokens().iter().map(|token| token.id as u8));
        let kind = match &event {
            GenerationEvent::Started { .. } => "started",
            GenerationEvent::Text { text, .. } if text.is_empty() => continue,
            GenerationEvent::Text { text, .. } => {
                assert!(!text.contains(['<', '>']), "{text}");
                "text"
            }
            GenerationEvent::Reasoning { .. } => "reasoning",
            GenerationEvent::ToolCall { call, .. } => {
                // As it was written, and parsed.
                assert_eq!(
                    call.raw_arguments.as_deref(),
                    Some("{\"city\": \"Köln\", \"days\": 1.0}")
                );
                assert_eq!(call.arguments["city"], "Köln");
                "call"
            }
            GenerationEvent::Finished(summary) => {
                assert_eq!(summary.finish_reason, FinishReason::ToolCalls);
                assert_eq!(summary.usage.completion_tokens as usize, reply.len() + 1);
                "finished"
            }
            other => panic!("{other:?}"),
        };
        if kinds.last() != Some(&kind) || kind == "call" {
            kinds.push(kind);
        }
    }
    assert_eq!(
        kinds,
        ["started", "reasoning", "text", "call", "call", "finished"]
    );
    assert_eq!(&tokens[..reply.len()], reply.as_bytes());
    assert_eq!(tokens.len(), reply.len() + 1);
}

#[tokio::test]
async fn a_call_that_is_cut_off_is_no_text_and_no_call() {
    let output = ask(CALL, params().with_max_tokens(40)).await.unwrap();
    assert_eq!((output.text.as_str(), output.tool_calls.len()), ("", 0));
    assert_eq!(output.malformed_tool_calls, [&CALL[..40]]);
    assert_eq!(
        (output.finish_reason, output.tokens.len()),
        (FinishReason::Length, 40)
    );
}

#[tokio::test]
async fn stop_strings_end_text_and_not_arguments() {
    let stop = params().with_stop(["Köln", "END"]);
    let output = ask(CALL, stop.clone()).await.unwrap();
    assert_eq!(
        (output.tool_calls.len(), output.finish_reason),
        (1, FinishReason::ToolCalls)
    );
    let output = ask(&format!("a END {CALL}"), stop.clone()).await.unwrap();
    assert_eq!((output.text.as_str(), output.tool_calls.len()), ("a ", 0));
    assert_eq!(output.finish_reason, FinishReason::Stop);
    // Held back as the beginning of a stop string, and none.
    let output = ask(&format!("a EN{CALL}"), stop).await.unwrap();
    assert_eq!((output.text.as_str(), output.tool_calls.len()), ("a EN", 1));
}

#[tokio::test]
async fn one_call_is_all_where_several_are_not_wanted() {
    let reply = format!("{CALL}{CALL}");
    assert_eq!(ask(&reply, params()).await.unwrap().tool_calls.len(), 2);
    let output = ask(&reply, params().with_parallel_tool_calls(false))
        .await
        .unwrap();
    assert_eq!((output.tool_calls.len(), output.tokens.len()), (1, CALL.len()));
    assert_eq!(output.finish_reason, FinishReason::ToolCalls);
}

#[tokio::test]
async fn tools_that_are_not_to_be_called_are_not_shown() {
    let output = ask(CALL, params().with_tool_choice(ToolChoice::None))
        .await
        .unwrap();
    assert_eq!(
        (output.text.as_str(), output.finish_reason),
        (CALL, FinishReason::Stop)
    );
    assert_eq!(output.usage.prompt_tokens as usize, "<user>Hi<assistant>".len());
}

#[tokio::test]
async fn a_template_that_shows_no_tools_refuses_them_unless_a_format_is_named() {
    let engine = Engine::mock("tiny", MockScript::default(), EngineConfig::default())
        .await
        .unwrap();
    let refused = engine.generate(prompt(), params()).await.unwrap_err().to_string();
    assert!(
        refused.contains("shows no tools") || refused.contains("`tool_format`"),
        "{refused}"
    );
    let named = params().with_tool_format("llama3-json");
    let refused = engine.generate(prompt(), named).await.unwrap_err().to_string();
    assert!(refused.contains("shows no tools to the model"), "{refused}");
    let output = engine
        .generate(prompt(), params().with_tool_format("hermes"))
        .await
        .unwrap();
    assert!(output.usage.prompt_tokens > 300, "{}", output.usage.prompt_tokens);
    let refused = engine
        .generate(prompt(), params().with_tool_format("xml"))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("`tool_format` is \"xml\"") && refused.contains("qwen3-coder"),
        "{refused}"
    );
}

#[tokio::test]
async fn what_contradicts_itself_is_refused() {
    let check = async |prompt: Prompt, params: GenerateParams, expect: &str| {
        let refused = engine("x")
            .await
            .generate(prompt, params)
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains(expect), "{refused}");
    };
    let required = params().with_tool_choice(ToolChoice::Required);
    check(
        Prompt::user("Hi"),
        required,
        "`tool_choice` is required, allowed: `auto` or `none`",
    )
    .await;
    let unknown = params().with_tool_choice(ToolChoice::Function("f".to_owned()));
    check(prompt(), unknown, "(get_weather)").await;
    let budget = params().with_thinking_budget(3);
    check(Prompt::text("Hi"), budget, "`thinking_budget` is 3").await;
    let both = params().with_constraint(OutputConstraint::Regex("a".to_owned()));
    check(prompt(), both, "`constraint` is set").await;
}

#[tokio::test]
async fn thoughts_that_the_prompt_has_opened_are_told_from_text_and_have_a_budget() {
    let opened = prompt().with_template_argument("enable_thinking", true);
    let engine = thinking("0123456789</think>\n\nYes.").await;
    let output = engine.generate(opened.clone(), params()).await.unwrap();
    assert_eq!(
        (output.reasoning.as_deref(), output.text.as_str()),
        (Some("0123456789"), "Yes.")
    );
    let together = params().with_separate_reasoning(false);
    let output = engine.generate(opened.clone(), together).await.unwrap();
    assert_eq!(output.text, "0123456789</think>\n\nYes.");
    // The mock goes on with its script at the number of the token.
    let output = engine
        .generate(opened, params().with_thinking_budget(4))
        .await
        .unwrap();
    assert_eq!(output.reasoning.as_deref(), Some("0123"));
    let forced = "\n</think>\n\n".len();
    assert_eq!(output.text, &"0123456789</think>\n\nYes."[4 + forced..]);
    let bytes: Vec<u8> = output.tokens.iter().map(|&token| token as u8).collect();
    assert_eq!(&bytes[..4 + forced], b"0123\n</think>\n\n");
}

#[tokio::test]
async fn a_dropped_answer_in_the_middle_of_a_call_leaves_the_engine_well() {
    let script = MockScript::reply(CALL).with_chat_template(TEMPLATE);
    let script = script.with_step_delay(std::time::Duration::from_millis(1));
    let engine = Engine::mock("tiny", script, EngineConfig::default())
        .await
        .unwrap();
    let mut stream = engine.stream(prompt(), params()).await.unwrap();
    assert!(matches!(
        stream.next().await,
        Some(Ok(GenerationEvent::Started { .. }))
    ));
    drop(stream);
    let output = engine.generate(prompt(), params()).await.unwrap();
    assert_eq!(output.tool_calls.len(), 1);
}

#[cfg(feature = "grammar")]
mod held {
    use super::*;

    #[tokio::test]
    async fn a_required_call_is_made_whatever_the_model_wants() {
        for choice in [
            ToolChoice::Required,
            ToolChoice::Function("get_weather".to_owned()),
        ] {
            let params = params().with_tool_choice(choice).with_parallel_tool_calls(false);
            let output = ask("No, I will not.", params).await.unwrap();
            assert_eq!(output.tool_calls.len(), 1, "{output:?}");
            let arguments = &output.tool_calls[0].arguments;
            assert!(
                arguments["city"].is_string()
                    && arguments["days"].as_f64().is_some_and(|days| days.fract() == 0.0),
                "{arguments}"
            );
            assert_eq!(output.finish_reason, FinishReason::ToolCalls);
        }
    }

    #[tokio::test]
    async fn a_strict_tool_is_held_to_its_schema_and_text_is_free() {
        let prompt = || Prompt::user("Hi").with_tools([weather().strict()]);
        let output = engine("Just text <b.")
            .await
            .generate(prompt(), params())
            .await
            .unwrap();
        assert_eq!(output.text, "Just text <b.");
        // `1.0` is an integer to JSON schema; a string is none.
        let reply = CALL.replace("1.0", "\"1\"");
        let output = engine(&format!("Wait. {reply}"))
            .await
            .generate(prompt(), params())
            .await
            .unwrap();
        assert_eq!(output.text, "Wait.");
        let call = &output.tool_calls[0];
        assert!(call.arguments["days"].is_number(), "{call:?}");
    }

    #[tokio::test]
    async fn what_is_held_and_what_is_free_run_together() {
        let engine = engine("yes and no").await;
        let regex = params().with_constraint(OutputConstraint::Regex("(no|yes)".to_owned()));
        let required = params().with_tool_choice(ToolChoice::Required);
        let (held, free, called) = tokio::join!(
            engine.generate(Prompt::text("a"), regex),
            engine.generate(Prompt::text("b"), params()),
            engine.generate(prompt(), required),
        );
        assert_eq!(held.unwrap().text, "yes");
        assert_eq!(free.unwrap().text, "yes and no");
        assert!(!called.unwrap().tool_calls.is_empty());
    }

    #[tokio::test]
    async fn what_is_behind_thoughts_is_held() {
        let opened = Prompt::user("Hi").with_template_argument("enable_thinking", true);
        let schema = OutputConstraint::JsonSchema(json!({"enum": ["a", "b"]}));
        for constraint in [
            schema,
            OutputConstraint::Regex("\"[ab]\"".to_owned()),
            OutputConstraint::Lark("start: \"\\\"b\\\"\"".to_owned()),
        ] {
            let output = super::thinking("Hm.</think>\n\n\"b\" or not").await;
            let output = output
                .generate(opened.clone(), params().with_constraint(constraint))
                .await
                .unwrap();
            assert_eq!(
                (output.reasoning.as_deref(), output.text.as_str()),
                (Some("Hm."), "\"b\"")
            );
        }
    }

    /// An expression holds an answer to the same behind thoughts as without any.
    #[tokio::test]
    async fn slashes_mean_the_same_behind_thoughts() {
        let opened = Prompt::user("Hi").with_template_argument("enable_thinking", true);
        for (pattern, text) in [
            ("a/b", "a/b"),
            (r"a\/b", "a/b"),
            (r"a\/i", "a/i"),
            (r"a\\/i", r"a\/i"),
            (r"[/]\d", "/7"),
        ] {
            let held = params().with_constraint(OutputConstraint::Regex(pattern.to_owned()));
            let said = format!("{text} or not");
            let plain = super::thinking(&said).await;
            let plain = plain.generate(Prompt::user("Hi"), held.clone()).await.unwrap();
            let behind = super::thinking(&format!("Hm.</think>\n\n{said}")).await;
            let behind = behind.generate(opened.clone(), held).await.unwrap();
            assert_eq!(
                (plain.text.as_str(), behind.text.as_str()),
                (text, text),
                "{pattern}"
            );
        }
    }

    #[tokio::test]
    async fn a_schema_that_cannot_be_held_is_refused_with_the_tool() {
        let schema =
            json!({"type": "object", "properties": {"a": {"not": {"type": "string"}}}, "required": ["a"]});
        let prompt = Prompt::user("Hi").with_tools([ToolDefinition::new("f", "", schema).unwrap()]);
        let required = params().with_tool_choice(ToolChoice::Required);
        let error = engine("x").await.generate(prompt, required).await.unwrap_err();
        assert!(matches!(error, EngineError::Constraint { .. }), "{error}");
    }
}
