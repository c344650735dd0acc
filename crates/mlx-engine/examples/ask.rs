//! A question and its answer: `cargo run --example ask -- MODEL QUESTION`.

use mlx_engine::prelude::*;

#[tokio::main]
async fn main() -> Result<(), EngineError> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(question)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: ask MODEL QUESTION");
        std::process::exit(2);
    };
    let engine = InferenceEngine::new();
    engine.load_model(&model).await?;
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(64);
    let output = engine.generate(question, params).await?;
    println!("{}", output.text);
    eprintln!(
        "{} tokens by {} on {}",
        output.usage.completion_tokens, output.backend, output.device
    );
    Ok(())
}
