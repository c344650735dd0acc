//! `mlx-engine tokenize`.

use mlx_engine::{ChatMessage, EngineError, Prompt, PromptEncoder};
use serde_json::json;

use crate::args::Tokenize;
use crate::failure::Failure;
use crate::input;
use crate::output::outln;

pub(crate) fn run(args: &Tokenize) -> Result<(), Failure> {
    let text = input::stdin()?;
    let prompt = if args.chat {
        let messages: Vec<ChatMessage> = serde_json::from_str(&text)
            .map_err(|error| Failure::other(format!("stdin is no JSON list of messages: {error}")))?;
        Prompt::chat(messages)
    } else {
        Prompt::text(text)
    };
    let encoder = encoder(&args.model)?;
    let rendered = encoder.text(&prompt)?.unwrap_or_default();
    let ids = encoder.encode(&prompt)?;
    if args.json {
        outln!("{}", json!({"ids": ids, "text": rendered}));
    } else {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        outln!("{}", ids.join(" "));
    }
    Ok(())
}

#[cfg(feature = "mlx")]
fn encoder(model: &str) -> Result<PromptEncoder, EngineError> {
    mlx_engine::InferenceEngine::new().load_encoder(model)
}

#[cfg(not(feature = "mlx"))]
fn encoder(model: &str) -> Result<PromptEncoder, EngineError> {
    let reason = format!("this build reads no model files, and `{model}` has the tokenizer in one");
    Err(EngineError::MlxUnavailable { reason })
}
