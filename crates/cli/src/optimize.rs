//! `mlx-engine optimize`.

use mlx_engine::{OptimizeOptions, OptimizeReport};

use crate::args::Optimize;
use crate::failure::Failure;
use crate::input;
use crate::load;
use crate::output::{errln, outln};

pub(crate) async fn run(args: Optimize) -> Result<(), Failure> {
    let options = OptimizeOptions {
        time_limit_s: args.time_limit,
        sample: args.sample.as_deref().map(input::file).transpose()?,
        kv_integers: args.kv_integers,
        ..OptimizeOptions::new(args.goal.into())
    };
    options.validate().map_err(mlx_engine::EngineError::from)?;
    let engine = load::load(&args.model).await?;
    errln!(
        "measuring for {:.0} s at most, nothing else should run",
        args.time_limit
    );
    let report = tokio::select! {
        report = engine.optimize_performance(options) => report?,
        _ = tokio::signal::ctrl_c() => return Err(Failure::Interrupted),
    };
    if let Some(path) = &args.output {
        let written = serde_json::to_string_pretty(&report.config)
            .map_err(|error| error.to_string())
            .and_then(|json| std::fs::write(path, json + "\n").map_err(|error| error.to_string()));
        written
            .map_err(|error| Failure::other(format!("`{}` could not be written: {error}", path.display())))?;
    }
    if args.json {
        let json = serde_json::to_string(&report).map_err(|error| Failure::other(error.to_string()))?;
        outln!("{json}");
        return Ok(());
    }
    print(&report)
}

fn print(report: &OptimizeReport) -> Result<(), Failure> {
    for trial in &report.trials {
        let kept = if trial.kept { "  kept" } else { "" };
        match (&trial.measured, &trial.error) {
            (Some(measured), _) => outln!(
                "{:<14} {:>6}  {:.3} s  {:.1} tok/s  {:.1} MB  {:+.1}%{kept}",
                trial.knob,
                shown(&trial.value),
                measured.seconds,
                measured.tokens_per_second,
                measured.peak_memory_bytes as f64 / 1e6,
                trial.gain * 100.0
            ),
            (None, error) => outln!(
                "{:<14} {:>6}  failed: {}",
                trial.knob,
                shown(&trial.value),
                error.as_deref().unwrap_or("nobody knows why")
            ),
        }
    }
    if report.skipped > 0 {
        outln!("no time for    {} values", report.skipped);
    }
    outln!(
        "outcome        {:?}, {:+.1}%",
        report.outcome,
        report.gain * 100.0
    );
    let config = serde_json::to_string(&report.config).map_err(|error| Failure::other(error.to_string()))?;
    outln!("config         {config}");
    Ok(())
}

/// A value in a word: what has parts is shown by its name.
fn shown(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Object(parts) => parts.keys().next().cloned().unwrap_or_default(),
        value => value.to_string(),
    }
}
