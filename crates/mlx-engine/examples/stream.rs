//! An answer piece by piece: `cargo run --example stream -- MODEL QUESTION`.

use std::io::Write;

use futures::StreamExt;
use mlx_engine::prelude::*;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(question)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: stream MODEL QUESTION");
        std::process::exit(2);
    };
    let engine = InferenceEngine::new();
    engine.load_model(&model).await?;

    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(64);
    let mut events = engine.stream(question, params).await?;
    let mut out = std::io::stdout();
    while let Some(event) = events.next().await {
        match event? {
            GenerationEvent::Text { text, .. } => {
                out.write_all(text.as_bytes())?;
                out.flush()?;
            }
            GenerationEvent::Finished(summary) => {
                writeln!(out)?;
                eprintln!(
                    "{} tokens, ended by {}",
                    summary.usage.completion_tokens, summary.finish_reason
                );
            }
            _ => {}
        }
    }
    Ok(())
}
