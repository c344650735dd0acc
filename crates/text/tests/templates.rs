//! Chat templates, against Python's jinja2 in transformers' settings.

mod conversation;

use conversation::context;
use mlx_engine_text::{ChatTemplate, TemplateContext, TextError};
use serde_json::{Value, json};

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
            Err(_) => case["failed"].is_string(),
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
    // Lists that are nested deeper with every round: they are freed, and refused where they are written.
    let grows = |step: &str, end: &str| {
        format!(
            "{{% set ns = namespace(x=[]) %}}{{% for i in range(800) %}}{{% for j in range(1000) %}}{step}{{% endfor %}}{{% endfor %}}{end}"
        )
    };
    for step in [
        "{% set ns.x = [ns.x] %}",
        "{% set ns.x = {'a': ns.x} %}",
        "{% set ns.x = (ns.x,) %}",
    ] {
        let found = error(&grows(step, ""));
        assert!(found.contains("fuel"), "{step}: {found}");
        for end in ["{{ ns.x }}", "{{ ns.x | tojson }}"] {
            let source = grows(step, end).replace("800", "300");
            assert!(
                error(&source).contains("nested more than 160 deep"),
                "{step} {end}"
            );
        }
    }
    // Small lists that stand in one another twice are large when they are written.
    for end in [
        "{{ ns.x }}",
        "{{ ns.x | tojson }}",
        "{{ ns.x | string | length }}",
    ] {
        let source = format!(
            "{{% set ns = namespace(x=[]) %}}{{% for i in range(60) %}}{{% set ns.x = [ns.x, ns.x] %}}{{% endfor %}}{end}"
        );
        let found = error(&source);
        assert!(found.contains("fuel"), "{found}");
    }
    let found = error("{{ 'a'.rjust(99999999999) }}");
    assert!(found.contains("fuel"), "{found}");
}

#[test]
fn tags_that_are_cut_off_do_not_compile() {
    for source in [
        "{%}",
        "{%",
        "{%-",
        "{{",
        "{%- set",
        "{% set x =",
        "{%%}",
        "{% raw %}{%",
        "{%🦀",
    ] {
        assert!(
            error(source).contains("chat template is invalid at line 1"),
            "{source}"
        );
    }
}
