//! Errors that say what to do, tries that come again, and an engine that comes back: `cargo run --example recovery -- MODEL`.

use mlx_engine::prelude::*;
use mlx_engine::{MockFault, MockScript, ResilienceConfiguration, RetryConfiguration};

#[tokio::main]
async fn main() -> Result<(), EngineError> {
    let Some(model) = std::env::args().nth(1) else {
        eprintln!("usage: recovery MODEL");
        std::process::exit(2);
    };
    let retry = RetryConfiguration {
        max_retries: 3,
        ..RetryConfiguration::default()
    };
    let resilience = ResilienceConfiguration {
        retry,
        ..ResilienceConfiguration::default()
    };
    let engine = InferenceEngine::new().with_resilience(resilience)?;

    // An error says whether another try may help, and what a user can do.
    if let Err(error) = engine.generate("Hello", GenerateParams::default()).await {
        println!(
            "{error}; retryable: {}; hint: {:?}",
            error.is_retryable(),
            error.hint()
        );
    }

    engine.load_model(&model).await?;
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(16);
    let output = engine
        .generate_with_retry("Name a river.", params.clone())
        .await?;
    println!("answered by {}", output.backend);

    // A working engine is left alone: a token proves that it works, and nothing is done.
    let report = engine.attempt_recovery().await;
    println!("recovered: {}, steps: {}", report.recovered, report.steps.len());

    // A mock that runs out of memory at its first token, to see another try succeed.
    let script = MockScript::reply("Here again.").with_fault(0, MockFault::OutOfMemory);
    let broken = InferenceEngine::new()
        .with_backend(BackendChoice::Mock)
        .with_mock(script);
    broken.load_model("any name").await?;
    let output = broken.generate_with_retry("Hello", params).await?;
    println!("{} ({})", output.text, output.backend);
    Ok(())
}
