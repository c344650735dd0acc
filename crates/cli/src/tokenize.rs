//! `mlx-engine tokenize`.

use mlx_engine::{EngineError, Prompt, PromptEncoder};
use serde_json::{Map, Value, json};

use crate::args::Tokenize;
use crate::failure::Failure;
use crate::input;
use crate::output::outln;

pub(crate) async fn run(args: &Tokenize) -> Result<(), Failure> {
    let text = input::stdin()?;
    let messages = args.chat.then(|| messages(&text)).transpose()?;
    let encoder = encoder(&args.model).await?;
    let (rendered, ids) = if let Some(messages) = messages {
        let rendered = encoder.chat_text(messages, &[], &Map::new())?;
        let ids = encoder.tokenizer().encode(&rendered, false);
        let ids =
            ids.map_err(|error| EngineError::tokenizer("the conversation could not be encoded", error))?;
        (rendered, ids)
    } else {
        let ids = encoder.encode(&Prompt::text(text.as_str()))?;
        (text, ids)
    };
    if args.json {
        outln!("{}", json!({"ids": ids, "text": rendered}));
    } else {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        outln!("{}", ids.join(" "));
    }
    Ok(())
}

/// Messages, which the template gets as they are.
fn messages(text: &str) -> Result<Vec<Value>, Failure> {
    let messages: Vec<Value> = serde_json::from_str(text)
        .map_err(|error| Failure::other(format!("stdin is no JSON list of messages: {error}")))?;
    match messages.iter().find(|message| !message["role"].is_string()) {
        Some(message) => Err(Failure::other(format!(
            "stdin has a message without a `role`: {message}"
        ))),
        None => Ok(messages),
    }
}

/// The tokenizer and the template of a model; of one that is not here they are all that is fetched.
#[cfg(all(feature = "mlx", feature = "hub"))]
async fn encoder(model: &str) -> Result<PromptEncoder, Failure> {
    let location = crate::pull::bring_tokenizer(model).await?;
    Ok(mlx_engine::InferenceEngine::load_encoder_at(&location)?)
}

#[cfg(all(feature = "mlx", not(feature = "hub")))]
#[expect(clippy::unused_async, reason = "it stands for the one that fetches")]
async fn encoder(model: &str) -> Result<PromptEncoder, Failure> {
    let engine = mlx_engine::InferenceEngine::new().with_registry(crate::registry::registry()?.clone());
    Ok(engine.load_encoder(model)?)
}

#[cfg(not(feature = "mlx"))]
#[expect(clippy::unused_async, reason = "it stands for the one that fetches")]
async fn encoder(model: &str) -> Result<PromptEncoder, Failure> {
    let reason = format!("this build reads no model files, and `{model}` has the tokenizer in one");
    Err(EngineError::MlxUnavailable { reason }.into())
}
