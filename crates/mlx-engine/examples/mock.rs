//! A program that runs where MLX does not: `cargo run --no-default-features --example mock`.

use mlx_engine::MockScript;
use mlx_engine::prelude::*;

#[tokio::main]
async fn main() -> Result<(), EngineError> {
    // Chosen: a test of a program that needs no model.
    let engine = InferenceEngine::new()
        .with_backend(BackendChoice::Mock)
        .with_mock(MockScript::reply("Paris"));
    engine.load_model("any name").await?;
    let output = engine
        .generate("What is the capital of France?", GenerateParams::default())
        .await?;
    println!(
        "chosen: {} ({}, {:?})",
        output.text,
        output.backend,
        engine.fallback_reason()
    );

    // Fallen back to, since the caller allows it: a model that is not there is an error under any other policy.
    let engine = InferenceEngine::new().with_fallback(FallbackPolicy::OnLoadFailure);
    engine.load_model("a model that does not exist").await?;
    let output = engine
        .generate("Are you real?", GenerateParams::default())
        .await?;
    println!("fallen back: {} is {:?}", output.backend, engine.health().status);
    println!("because: {}", engine.fallback_reason().unwrap_or_default());

    // Refused, under the policy that allows nothing.
    let engine = InferenceEngine::new().with_fallback(FallbackPolicy::Never);
    let error = engine.load_model("a model that does not exist").await.err();
    println!(
        "refused: {}",
        error.map(|error| error.to_string()).unwrap_or_default()
    );
    Ok(())
}
