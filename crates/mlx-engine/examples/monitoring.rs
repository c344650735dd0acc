//! What was counted, and how the engine is: `cargo run --example monitoring -- MODEL`.

use mlx_engine::prelude::*;

#[tokio::main]
async fn main() -> Result<(), EngineError> {
    let Some(model) = std::env::args().nth(1) else {
        eprintln!("usage: monitoring MODEL");
        std::process::exit(2);
    };
    let engine = InferenceEngine::new();
    println!("without a model: {:?}", engine.health().status);
    engine.load_model(&model).await?;

    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(16);
    let output = engine.generate("Name a river.", params.clone()).await?;
    // Dropping the stream cancels the request, and that is counted too.
    drop(engine.stream("Name all rivers.", params).await?);

    // One token of the real model proves that it works.
    let report = engine.check_health().await;
    println!("with it: {:?} {:?}", report.status, report.reasons);

    let metrics = engine.performance_metrics();
    let total = &metrics.total;
    println!(
        "{} submitted, {} finished, {} cancelled",
        total.submitted,
        total.finished.total(),
        total.cancelled
    );
    println!(
        "{} tokens generated, {} in this answer",
        total.generated_tokens, output.usage.completion_tokens
    );
    if let Some(first) = total.time_to_first_token.p50_s {
        println!("half of the first tokens came within {first:.3} s");
    }
    println!("{}", engine.prometheus());
    Ok(())
}
