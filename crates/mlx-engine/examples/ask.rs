//! Asks a model one question: `cargo run --release --example ask -- MODEL QUESTION`.

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
    let output = engine.generate(question, GenerateParams::default()).await?;
    println!("{} (by {} on {})", output.text, output.backend, output.device);
    Ok(())
}
