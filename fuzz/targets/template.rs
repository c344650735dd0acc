//! Chat templates: hostile ones end by an error, and soon.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_engine_text::{ChatTemplate, TemplateContext};
use serde_json::json;

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::new(source) else {
        return;
    };
    let context = TemplateContext::new(json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]},
        {"role": "tool", "tool_call_id": "1", "content": "21"},
    ]))
    .with_generation_prompt(true)
    .with_special_tokens("<s>", "</s>");
    let _ = template.render(&context);
});
