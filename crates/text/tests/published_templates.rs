//! Chat templates of published models, as llama.cpp collects them, against Python's jinja2 in transformers' settings.

mod conversation;

use mlx_engine_text::{ChatTemplate, TextError};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Marks a text as safe, by which Python escapes what is added to it for HTML, although transformers escapes nothing.
const MARKUP: [&str; 1] = ["meetkai-functionary-medium-v3.1.jinja"];

#[test]
fn published_templates_print_what_jinja2_prints() {
    let folder = std::env::var_os("MLX_ENGINE_TEST_DATA");
    let folder =
        folder.expect("MLX_ENGINE_TEST_DATA names the test data; run the tests by `cargo xtask test`");
    let folder = std::path::Path::new(&folder).join("templates");
    let made: Value = serde_json::from_str(include_str!("fixtures/templates.json")).unwrap();
    let cases: Value = serde_json::from_str(include_str!("fixtures/published_templates.json")).unwrap();
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 600, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let (name, title) = (
            case["template"].as_str().unwrap(),
            case["conversation"].as_str().unwrap(),
        );
        let source = std::fs::read_to_string(folder.join(name)).unwrap();
        let context = conversation::context(&made["conversations"][title], made["now"].as_u64().unwrap());
        let rendered = ChatTemplate::new(&source).and_then(|template| template.render(&context));
        let agrees = match &rendered {
            Ok(text) => {
                let digest = Sha256::digest(text.as_bytes());
                let first = u64::from_be_bytes(digest[..8].try_into().unwrap());
                case["text"] == format!("{first:016x}")
            }
            Err(TextError::Refused { message }) => case["refused"] == *message,
            Err(_) => false,
        };
        // What Python stumbles over, as a list of tools that is None, may be printed.
        if !agrees && case["failed"].is_null() && !MARKUP.contains(&name) {
            wrong.push(format!("{name}, {title}:\n  {rendered:?}\n  {case}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} differ:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}
