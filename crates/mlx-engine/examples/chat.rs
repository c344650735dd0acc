//! A conversation of two turns: `cargo run --example chat -- MODEL`.

use mlx_engine::prelude::*;

#[tokio::main]
async fn main() -> Result<(), EngineError> {
    let Some(model) = std::env::args().nth(1) else {
        eprintln!("usage: chat MODEL");
        std::process::exit(2);
    };
    let engine = InferenceEngine::new();
    engine.load_model(&model).await?;

    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(48);
    let mut chat = engine
        .chat()
        .with_system("You are a helpful assistant.")
        .with_params(params);
    for question in ["What is the capital of France?", "And of Italy?"] {
        let output = chat.send(question).await?;
        println!("{question}\n  {}", output.text.trim());
        let usage = output.usage;
        println!(
            "  ({} tokens of the prompt, {} of them kept)",
            usage.prompt_tokens, usage.cached_tokens
        );
    }
    Ok(())
}
