//! The facade `metrics`: what is told of requests has OpenTelemetry's names where there are any, what is told of the engine those of
//! [the page that Prometheus reads](crate::Monitored::prometheus), with dots.

use metrics::{Label, gauge, histogram};
use mlx_engine_core::{BatchSizes, GenerateSummary};

use super::Look;
use crate::shared::Seen;
use crate::tally::Ended;
use crate::{EngineHealth, HealthReport};

/// The metrics of OpenTelemetry's conventions for generative AI, in their units: seconds and tokens.
pub(super) fn ended(operation: &'static str, ended: &Ended, summary: Option<&GenerateSummary>, seen: &Seen) {
    let model = summary.map_or_else(|| seen.model_id().unwrap_or_default(), |summary| &summary.model);
    let mut labels = of_engine(model, seen);
    labels.insert(1, Label::new("gen_ai.operation.name", operation));
    let with = |name: &'static str, value: &'static str| and(&labels, name, value);
    let of_duration = match super::error_type(ended) {
        Some(error) => with("error.type", error),
        None => labels.clone(),
    };
    histogram!("gen_ai.server.request.duration", of_duration).record(ended.duration.as_secs_f64());
    if let Some(time) = ended.time_to_first_token {
        histogram!("gen_ai.server.time_to_first_token", labels.clone()).record(time.as_secs_f64());
    }
    if let Some(time) = ended.decode.time_per_token() {
        histogram!("gen_ai.server.time_per_output_token", labels.clone()).record(time.as_secs_f64());
    }
    let tokens = |direction| histogram!("gen_ai.client.token.usage", with("gen_ai.token.type", direction));
    if let Some(summary) = summary {
        tokens("input").record(f64::from(summary.usage.prompt_tokens));
    }
    tokens("output").record(ended.generated_tokens as f64);
}

/// What the engine is at this moment.
pub(super) fn looked(look: &Look, health: &HealthReport, seen: &Seen) {
    let labels = of_engine(seen.model_id().unwrap_or_default(), seen);
    let tell = |name: &'static str, value: f64| gauge!(name, labels.clone()).set(value);
    for state in [
        EngineHealth::Healthy,
        EngineHealth::Degraded,
        EngineHealth::Unhealthy,
    ] {
        let labels = and(&labels, "state", state.to_string());
        gauge!("mlx_engine.health", labels).set(one_if(health.status == state));
    }
    tell("mlx_engine.live", one_if(health.is_live()));
    tell("mlx_engine.ready", one_if(health.is_ready()));
    tell("mlx_engine.uptime_seconds", look.uptime_s);
    if let Some(seconds) = look.load_time_s {
        tell("mlx_engine.load_seconds", seconds);
    }
    if let Some(bytes) = look.process_memory_bytes {
        tell("mlx_engine.process_resident_memory_bytes", bytes as f64);
    }
    in_flight(look.queued, look.running, seen);
    let Some(engine) = seen.statistics else {
        return;
    };
    for (name, value) in [
        ("mlx_engine.engine.queued", engine.queued),
        ("mlx_engine.engine.running", engine.running),
        ("mlx_engine.engine.batch_size", engine.batch_size),
        ("mlx_engine.engine.kv_reserved_bytes", engine.kv_reserved_bytes),
        ("mlx_engine.engine.prefix_cache_bytes", engine.prefix_cache_bytes),
        (
            "mlx_engine.engine.prefix_cache_sequences",
            engine.prefix_cache_sequences,
        ),
        ("mlx_engine.engine.weight_bytes", engine.weight_bytes),
    ] {
        tell(name, value as f64);
    }
    // Between two turns none takes long.
    tell(
        "mlx_engine.engine.turn_seconds",
        engine.turn_s.unwrap_or_default(),
    );
    if let Some(memory) = engine.memory {
        tell(
            "mlx_engine.device_memory_active_bytes",
            memory.active_bytes as f64,
        );
        tell("mlx_engine.device_memory_cache_bytes", memory.cache_bytes as f64);
        tell("mlx_engine.device_memory_peak_bytes", memory.peak_bytes as f64);
    }
}

/// How many requests wait and run.
pub(super) fn in_flight(queued: u64, running: u64, seen: &Seen) {
    let labels = of_engine(seen.model_id().unwrap_or_default(), seen);
    gauge!("mlx_engine.requests_queued", labels.clone()).set(queued as f64);
    gauge!("mlx_engine.requests_running", labels).set(running as f64);
}

/// How many answers turns took further together: of more than 16 the most that their class has.
pub(super) fn batched(sizes: &BatchSizes, seen: &Seen) {
    if sizes.count() == 0 {
        return;
    }
    let labels = of_engine(seen.model_id().unwrap_or_default(), seen);
    let answers = histogram!("mlx_engine.engine.turn_answers", labels);
    for (&turns, most) in sizes.turns.iter().zip(BatchSizes::MOST) {
        if turns > 0 {
            // The last class has no most; 128 is the next that there would be.
            answers.record_many(most.min(128) as f64, usize::try_from(turns).unwrap_or(usize::MAX));
        }
    }
}

fn one_if(true_: bool) -> f64 {
    f64::from(u8::from(true_))
}

/// Whose metrics they are.
fn of_engine(model: &str, seen: &Seen) -> Vec<Label> {
    let mut labels = vec![
        Label::new("gen_ai.provider.name", "mlx_engine"),
        Label::new("gen_ai.response.model", model.to_owned()),
    ];
    if let Some(backend) = seen.backend {
        labels.push(Label::new("mlx_engine.backend", backend.to_string()));
    }
    labels
}

fn and(labels: &[Label], name: &'static str, value: impl Into<metrics::SharedString>) -> Vec<Label> {
    let mut labels = labels.to_vec();
    labels.push(Label::new(name, value));
    labels
}
