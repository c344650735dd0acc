//! What the engine counted and how it is, for people.

use mlx_engine::{Distribution, HealthReport, InferenceEngine};

use crate::output::errln;

/// Prints the counts and the health to stderr.
pub(crate) fn report(engine: &InferenceEngine) {
    let metrics = engine.performance_metrics();
    let total = &metrics.total;
    let failed: u64 = total.errors.values().sum();
    errln!(
        "requests    {} ({} cancelled, {failed} failed)",
        total.submitted,
        total.cancelled
    );
    errln!(
        "tokens      prompt {} ({} cached), answer {}",
        total.prompt_tokens,
        total.cached_tokens,
        total.generated_tokens
    );
    let speed = |speed: Option<f64>| speed.map_or("-".to_owned(), |speed| format!("{speed:.1} tok/s"));
    errln!(
        "speed       prefill {}, decode {}",
        speed(total.prefill.tokens_per_second),
        speed(total.decode.tokens_per_second)
    );
    errln!("first token {}", quantiles(&total.time_to_first_token));
    errln!("per token   {}", quantiles(&total.time_per_output_token));
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let resident = metrics
        .process_memory_bytes
        .map_or("-".to_owned(), |bytes| format!("{:.1} MB", mb(bytes)));
    errln!(
        "memory      peak {:.1} MB, process {resident}",
        mb(total.peak_memory_bytes)
    );
    if let Some(inside) = &metrics.engine {
        errln!(
            "kept        {} {}, {:.1} MB",
            inside.prefix_cache_sequences,
            if inside.prefix_cache_sequences == 1 {
                "sequence"
            } else {
                "sequences"
            },
            mb(inside.prefix_cache_bytes)
        );
        if let Some(memory) = inside.memory {
            errln!(
                "models      {:.1} MB in use, {:.1} MB kept by MLX",
                mb(memory.active_bytes),
                mb(memory.cache_bytes)
            );
        }
    }
    let recovery = engine.resilience_status();
    if recovery.recoveries > 0 {
        errln!("recoveries  {}", recovery.recoveries);
    }
    #[cfg(unix)]
    if let Some(child) = engine.child_status() {
        errln!(
            "process     {}, restarts {}",
            child.process_id.map_or("none".to_owned(), |id| id.to_string()),
            child.restarts
        );
    }
    health(&engine.health());
}

/// Prints a health report to stderr.
pub(crate) fn health(report: &HealthReport) {
    errln!("health      {}", report.status);
    for reason in &report.reasons {
        errln!("            {reason}");
    }
}

fn quantiles(times: &Distribution) -> String {
    let ms =
        |seconds: Option<f64>| seconds.map_or("-".to_owned(), |seconds| format!("{:.1} ms", seconds * 1e3));
    format!(
        "p50 {}, p90 {}, p99 {}",
        ms(times.p50_s),
        ms(times.p90_s),
        ms(times.p99_s)
    )
}
