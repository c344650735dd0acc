//! A filter for the shell: `echo "What is snow?" | cargo run --example command_line -- MODEL`.
//!
//! Each line of stdin is a question. Answers go to stdout and everything else to stderr; the exit code is 0 where all
//! were answered, 1 where one was not, 2 where the command was wrong.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;

use futures::StreamExt;
use mlx_engine::LoadProgress;
use mlx_engine::prelude::*;

#[tokio::main]
async fn main() -> ExitCode {
    let Some(model) = std::env::args().nth(1) else {
        eprintln!("usage: command_line MODEL < QUESTIONS");
        return ExitCode::from(2);
    };
    match run(&model).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

/// An error with all that led to it, and what to do about it.
fn report(error: &(dyn std::error::Error + 'static)) {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<String> = chain.map(ToString::to_string).collect();
    eprintln!("error: {}", texts.join(": "));
    if let Some(hint) = error.downcast_ref::<EngineError>().and_then(EngineError::hint) {
        eprintln!("hint: {hint}");
    }
}

async fn run(model: &str) -> Result<(), Box<dyn std::error::Error>> {
    let engine = InferenceEngine::new();
    let progress = |stage| {
        if let LoadProgress::Bytes { done, total } = stage {
            eprint!("\rloading {done} of {total} bytes");
        }
    };
    engine.load_model_with_progress(model, Box::new(progress)).await?;
    eprintln!();

    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(64);
    let mut out = io::stdout();
    for question in io::stdin().lock().lines() {
        let mut events = engine.stream(question?, params.clone()).await?;
        while let Some(event) = events.next().await {
            if let GenerationEvent::Text { text, .. } = event? {
                out.write_all(text.as_bytes())?;
                out.flush()?;
            }
        }
        writeln!(out)?;
    }
    Ok(())
}
