//! Questions that are answered together: `cargo run --example batching -- MODEL QUESTION...`.

use futures::future::join_all;
use mlx_engine::EngineConfig;
use mlx_engine::prelude::*;

#[tokio::main]
async fn main() -> Result<(), EngineError> {
    let mut arguments = std::env::args().skip(1);
    let Some(model) = arguments.next() else {
        eprintln!("usage: batching MODEL QUESTION...");
        std::process::exit(2);
    };
    let questions: Vec<String> = arguments.collect();

    // Four run at a time, and as many as there are wait for their turn.
    let config = EngineConfig {
        max_batch: 4,
        max_queue: questions.len(),
        ..EngineConfig::default()
    };
    let engine = InferenceEngine::new().with_config(config);
    engine.load_model(&model).await?;

    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(64);
    let answers = join_all(
        questions
            .iter()
            .map(|question| engine.generate(question.as_str(), params.clone())),
    )
    .await;
    for answer in answers {
        match answer {
            Ok(output) => println!("{}", output.text.replace('\n', " ")),
            // What goes wrong with one is its own: the others are answered.
            Err(error) => eprintln!("{error}"),
        }
    }
    Ok(())
}
