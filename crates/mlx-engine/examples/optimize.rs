//! The configuration that serves best here, as measured: `cargo run --release --example optimize -- MODEL SECONDS`.

use mlx_engine::prelude::*;
use mlx_engine::{OptimizeGoal, OptimizeOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(seconds)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: optimize MODEL SECONDS");
        std::process::exit(2);
    };
    let engine = InferenceEngine::new();
    engine.load_model(&model).await?;

    let options = OptimizeOptions {
        time_limit_s: seconds.parse()?,
        prompt_tokens: 256,
        answer_tokens: 8,
        ..OptimizeOptions::new(OptimizeGoal::Latency)
    };
    let report = engine.optimize_performance(options).await?;
    for trial in &report.trials {
        eprintln!(
            "{} = {}: gain {:+.1}%",
            trial.knob,
            trial.value,
            trial.gain * 100.0
        );
    }
    eprintln!("{:?} in {:.1} s", report.outcome, report.took_s);
    // To be read again at the next start, for `InferenceEngine::with_config`.
    println!("{}", serde_json::to_string_pretty(&report.config)?);
    Ok(())
}
