//! An answer as a value of a type: `cargo run --example structured -- MODEL`.

use mlx_engine::TypedError;
use mlx_engine::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the model is asked for. The schema is that of the type, and the answer is held to it token by token.
#[derive(Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
struct City {
    #[schemars(length(max = 30))]
    name: String,
    country: Country,
    coastal: bool,
    #[schemars(length(max = 3), inner(length(max = 30)))]
    sights: Vec<String>,
}

#[derive(Debug, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
enum Country {
    France,
    Germany,
    Italy,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(model) = std::env::args().nth(1) else {
        eprintln!("usage: structured MODEL");
        std::process::exit(2);
    };
    let engine = InferenceEngine::new();
    engine.load_model(&model).await?;

    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(256);
    match engine
        .generate_as::<City>("Describe Paris as JSON.", params)
        .await
    {
        Ok(city) => println!("{}", serde_json::to_string(&city)?),
        // Most often `max_tokens` cut the answer off; what there is of it is here.
        Err(TypedError::Unreadable {
            text, finish_reason, ..
        }) => eprintln!("ended by {finish_reason}: {text}"),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
