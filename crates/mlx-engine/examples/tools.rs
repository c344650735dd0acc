//! A model that calls a tool: `cargo run --example tools -- MODEL`.

use mlx_engine::prelude::*;
use serde_json::{Value, json};

/// What the tool does. A program would look at its arguments, which the schema has been held to.
fn weather(arguments: &Value) -> Value {
    json!({"city": arguments["city"], "celsius": 21, "sky": "clear"})
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(model) = std::env::args().nth(1) else {
        eprintln!("usage: tools MODEL");
        std::process::exit(2);
    };
    let engine = InferenceEngine::new();
    engine.load_model(&model).await?;

    let schema = json!({
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 30}},
        "required": ["city"],
        "additionalProperties": false
    });
    let tool = ToolDefinition::new("get_weather", "The weather in a city.", schema)?;
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(96)
        // A model whose template shows tools needs no format, and `Auto` leaves the choice to it.
        .with_tool_format("hermes")
        .with_tool_choice(ToolChoice::Required)
        .with_parallel_tool_calls(false);
    let mut chat = engine.chat().with_tools([tool]).with_params(params);

    chat.send("What is the weather in Paris?").await?;
    let mut results = Vec::new();
    for call in chat.pending_calls() {
        let result = weather(&call.arguments);
        println!("{}({}) = {result}", call.name, call.arguments);
        results.push((call.id.clone(), result.to_string()));
    }
    let output = chat.send_results(results).await?;
    println!("{}", output.text.trim());
    Ok(())
}
