//! What is handed to the facades `metrics` and `tracing`, where a feature asks for it.

#![cfg_attr(
    not(all(feature = "metrics", feature = "tracing")),
    expect(
        unused_variables,
        reason = "without both features something is told to nobody"
    )
)]

#[cfg(feature = "metrics")]
mod facade;

use mlx_engine_core::{BatchSizes, GenerateParams, GenerateSummary, Prompt};

use crate::HealthReport;
use crate::events::HealthEvent;
use crate::shared::Seen;
use crate::tally::Ended;

/// What the facades hear of one request.
#[derive(Debug)]
pub(crate) struct Telemetry {
    #[cfg(feature = "metrics")]
    operation: &'static str,
    #[cfg(feature = "tracing")]
    span: tracing::Span,
}

impl Telemetry {
    /// A request is submitted.
    pub(crate) fn begin(prompt: &Prompt, params: &GenerateParams, seen: &Seen) -> Self {
        let operation = match prompt {
            Prompt::Chat { .. } => "chat",
            _ => "text_completion",
        };
        Self {
            #[cfg(feature = "metrics")]
            operation,
            #[cfg(feature = "tracing")]
            span: trace::span(operation, params, seen),
        }
    }

    /// Runs what the engine does for the request on the caller's thread.
    #[cfg_attr(
        not(feature = "tracing"),
        expect(clippy::unused_self, reason = "there is no span")
    )]
    pub(crate) fn scope<T>(&self, run: impl FnOnce() -> T) -> T {
        #[cfg(feature = "tracing")]
        return self.span.in_scope(run);
        #[cfg(not(feature = "tracing"))]
        run()
    }

    /// The request has ended.
    #[cfg_attr(
        not(any(feature = "metrics", feature = "tracing")),
        expect(clippy::unused_self, reason = "there is nobody to tell")
    )]
    pub(crate) fn end(&self, ended: &Ended, summary: Option<&GenerateSummary>, seen: &Seen) {
        #[cfg(feature = "metrics")]
        facade::ended(self.operation, ended, summary, seen);
        #[cfg(feature = "tracing")]
        trace::ended(&self.span, ended, summary);
    }
}

/// What is measured by looking, beside what the engine says of itself.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(feature = "metrics"),
    expect(dead_code, reason = "there is nobody to tell")
)]
pub(crate) struct Look {
    pub(crate) queued: u64,
    pub(crate) running: u64,
    pub(crate) uptime_s: f64,
    pub(crate) load_time_s: Option<f64>,
    pub(crate) process_memory_bytes: Option<u64>,
}

/// Whether somebody hears of a [`Look`].
pub(crate) const LOOKS_ARE_TOLD: bool = cfg!(feature = "metrics");

/// Somebody has looked at the engine.
pub(crate) fn looked(look: &Look, health: &HealthReport, seen: &Seen) {
    #[cfg(feature = "metrics")]
    facade::looked(look, health, seen);
}

/// How many requests wait and run has changed.
pub(crate) fn in_flight(queued: u64, running: u64, seen: &Seen) {
    #[cfg(feature = "metrics")]
    facade::in_flight(queued, running, seen);
}

/// The engine has taken turns since it was looked at last.
pub(crate) fn batched(sizes: &BatchSizes, seen: &Seen) {
    #[cfg(feature = "metrics")]
    facade::batched(sizes, seen);
}

/// The health has changed.
pub(crate) fn changed(event: &HealthEvent) {
    #[cfg(feature = "tracing")]
    {
        let reasons: Vec<String> = event.reasons.iter().map(ToString::to_string).collect();
        tracing::warn!(from = %event.from, to = %event.to, reasons = reasons.join("; "), "health changed");
    }
}

/// The name of what went wrong, as OpenTelemetry's `error.type` has it.
#[cfg(any(feature = "metrics", feature = "tracing"))]
fn error_type(ended: &Ended) -> Option<&'static str> {
    use crate::tally::Outcome;

    match ended.outcome {
        Outcome::Finished(_) => None,
        Outcome::Failed(kind) => Some(kind.as_str()),
        Outcome::Dropped => Some("dropped"),
    }
}

#[cfg(feature = "tracing")]
mod trace {
    use mlx_engine_core::{GenerateParams, GenerateSummary};
    use tracing::field::{Empty, display};

    use crate::shared::Seen;
    use crate::tally::Ended;

    pub(super) fn span(operation: &'static str, params: &GenerateParams, seen: &Seen) -> tracing::Span {
        tracing::info_span!(
            "gen_ai.request",
            "otel.name" = %format_args!("{operation} {}", seen.model_id().unwrap_or("none")),
            "otel.kind" = "internal",
            "otel.status_code" = Empty,
            "gen_ai.provider.name" = "mlx_engine",
            "gen_ai.operation.name" = operation,
            "gen_ai.request.model" = seen.model_id(),
            // An unsigned number would be sent as a text.
            "gen_ai.request.max_tokens" = i64::from(params.max_tokens),
            "gen_ai.request.temperature" = params.temperature,
            "gen_ai.request.top_p" = params.top_p,
            "gen_ai.response.model" = Empty,
            "gen_ai.response.finish_reasons" = Empty,
            "gen_ai.usage.input_tokens" = Empty,
            "gen_ai.usage.output_tokens" = Empty,
            "error.type" = Empty,
            time_to_first_token_s = Empty,
        )
    }

    pub(super) fn ended(span: &tracing::Span, ended: &Ended, summary: Option<&GenerateSummary>) {
        if let Some(summary) = summary {
            span.record("gen_ai.response.model", summary.model.as_str());
            span.record("gen_ai.response.finish_reasons", display(summary.finish_reason));
            span.record(
                "gen_ai.usage.input_tokens",
                i64::from(summary.usage.prompt_tokens),
            );
        }
        span.record("gen_ai.usage.output_tokens", ended.generated_tokens as i64);
        if let Some(error) = super::error_type(ended) {
            span.record("error.type", error);
            span.record("otel.status_code", "ERROR");
        }
        if let Some(time) = ended.time_to_first_token {
            span.record("time_to_first_token_s", time.as_secs_f64());
        }
        tracing::debug!(parent: span, duration_s = ended.duration.as_secs_f64(), "request ended");
    }
}
