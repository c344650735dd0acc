//! The conversations of the fixtures as contexts of a template.

use std::time::{Duration, UNIX_EPOCH};

use mlx_engine_text::TemplateContext;
use serde_json::{Map, Value};

pub(crate) fn context(conversation: &Value, now: u64) -> TemplateContext {
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
