//! Chat templates, against Python's jinja2 in transformers' settings.

use std::time::{Duration, UNIX_EPOCH};

use mlx_engine_text::{ChatTemplate, TemplateContext, TextError};
use serde_json::{Map, Value, json};

fn context(conversation: &Value, now: u64) -> TemplateContext {
    let mut arguments: Map<String, Value> = conversation.as_object().expect("an object").clone();
    let messages = arguments.remove("messages").expect("messages");
    let tools = arguments.remove("tools");
    let prompt = arguments
        .remove("add_generation_prompt")
        .is_some_and(|add| add == true);
    TemplateContext::new(messages)
        .with_tools(tools)
        .with_generation_prompt(prompt)
        .with_special_tokens("<s>", "</s>")
        .with_arguments(arguments)
        .with_now(UNIX_EPOCH + Duration::from_secs(now))
}

#[test]
fn text_is_that_of_jinja2_byte_for_byte() {
    let fixture: Value = serde_json::from_str(include_str!("fixtures/templates.json")).unwrap();
    let now = fixture["now"].as_u64().unwrap();
    let mut wrong = Vec::new();
    for case in fixture["cases"].as_array().unwrap() {
        let (name, title) = (
            case["template"].as_str().unwrap(),
            case["conversation"].as_str().unwrap(),
        );
        let template = ChatTemplate::new(fixture["templates"][name].as_str().unwrap()).unwrap();
        let rendered = template.render(&context(&fixture["conversations"][title], now));
        let agrees = match &rendered {
            Ok(text) => case["text"] == *text,
            Err(TextError::Refused { message }) => case["refused"] == *message,
            Err(_) => false,
        };
        if !agrees {
            wrong.push(format!(
                "{name}, {title}:\n  {rendered:?}\n  {}{}",
                case["text"], case["refused"]
            ));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

fn error(source: &str) -> String {
    let result = ChatTemplate::new(source).and_then(|template| {
        template.render(&TemplateContext::new(json!([{"role": "user", "content": "x"}])))
    });
    result.expect_err("it fails").to_string()
}

#[test]
fn a_template_that_does_not_compile_names_the_line() {
    assert_eq!(
        error("{% for m in messages %}\n{{ m.content }}\n{% endfor"),
        "chat template is invalid at line 3: unexpected end of input, expected end of block"
    );
    assert!(error("{{ 'a' | no_such_filter }}").contains("no_such_filter"));
}

#[test]
fn a_refusal_is_told_in_the_templates_words() {
    assert_eq!(
        error("{% macro no() %}{{ raise_exception('only tools, please') }}{% endmacro %}{{ no() }}"),
        "chat template refuses the conversation: only tools, please"
    );
}

#[test]
fn a_hostile_template_ends() {
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}";
    let found = error(endless);
    assert!(found.contains("chat template is invalid"), "{found}");
    let found = error("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}");
    assert!(found.contains("chat template is invalid"), "{found}");
}
