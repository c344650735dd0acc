//! Metrics and health in Prometheus' text format.
//!
//! Quantiles of the summaries are those of the window, as Prometheus' own clients have them; their sums and counts are
//! totals, so that rates can be taken.

use std::fmt::{self, Display, Write};

use mlx_engine_core::{BatchSizes, EngineStatistics};

use crate::{Distribution, EngineHealth, HealthReport, InferenceMetrics, Throughput};

impl InferenceMetrics {
    /// These metrics and a verdict on health in Prometheus' text format, version 0.0.4 (`text/plain; version=0.0.4`).
    pub fn prometheus(&self, health: &HealthReport) -> String {
        let mut page = Page::default();
        page.everything(self, health);
        page.text
    }
}

#[derive(Default)]
struct Page {
    text: String,
}

/// A label and its value.
type Label<'a> = (&'a str, &'a str);

impl Page {
    fn everything(&mut self, metrics: &InferenceMetrics, health: &HealthReport) {
        let (total, window) = (&metrics.total, &metrics.window);
        self.family("info", "gauge", "What the engine runs; always 1.");
        let backend = metrics
            .backend
            .map(|backend| backend.to_string())
            .unwrap_or_default();
        let model = metrics.model.as_deref().unwrap_or_default();
        self.sample("info", &[("model", model), ("backend", &backend)], 1);

        self.family("health", "gauge", "1 for the state that the engine is in.");
        for state in [
            EngineHealth::Healthy,
            EngineHealth::Degraded,
            EngineHealth::Unhealthy,
        ] {
            let value = u8::from(health.status == state);
            self.sample("health", &[("state", &state.to_string())], value);
        }
        self.single(
            "live",
            "gauge",
            "Whether the engine is not stuck.",
            u8::from(health.is_live()),
        );
        self.single(
            "ready",
            "gauge",
            "Whether requests should come here.",
            u8::from(health.is_ready()),
        );

        self.seconds(
            "uptime_seconds",
            "Since monitoring began.",
            Some(metrics.uptime_s),
        );
        self.seconds(
            "load_seconds",
            "What loading the model took.",
            metrics.load_time_s,
        );
        let memory = "Resident memory of the engine's process.";
        if let Some(bytes) = metrics.process_memory_bytes {
            self.single("process_resident_memory_bytes", "gauge", memory, bytes);
        }
        self.single(
            "device_memory_peak_bytes",
            "gauge",
            "The most device memory that a request saw in use.",
            total.peak_memory_bytes,
        );
        self.single(
            "requests_queued",
            "gauge",
            "Requests that wait to start.",
            metrics.queued,
        );
        self.single(
            "requests_running",
            "gauge",
            "Requests that were started and not ended.",
            metrics.running,
        );

        if let Some(engine) = &metrics.engine {
            self.engine(engine);
        }

        self.single(
            "requests_submitted_total",
            "counter",
            "Requests that were submitted.",
            total.submitted,
        );
        self.single(
            "requests_started_total",
            "counter",
            "Requests that were started.",
            total.started,
        );
        let finished = "requests_finished_total";
        self.family(finished, "counter", "Requests that finished, by the reason.");
        let reasons = [
            ("stop", total.finished.stop),
            ("tool_calls", total.finished.tool_calls),
            ("length", total.finished.length),
            ("cancelled", total.finished.cancelled),
            ("other", total.finished.other),
        ];
        for (reason, count) in reasons {
            self.sample(finished, &[("reason", reason)], count);
        }
        let failed = "requests_failed_total";
        self.family(
            failed,
            "counter",
            "Requests that failed, by the kind of the error.",
        );
        for (kind, &count) in &total.errors {
            self.sample(failed, &[("kind", kind.as_str())], count);
        }
        self.single(
            "requests_cancelled_total",
            "counter",
            "Requests that the caller dropped.",
            total.cancelled,
        );
        let probes = "probes_total";
        self.family(
            probes,
            "counter",
            "Checks of health by a token, by what came of them.",
        );
        self.sample(probes, &[("result", "passed")], metrics.probes.passed);
        self.sample(probes, &[("result", "failed")], metrics.probes.failed);
        self.sample(probes, &[("result", "abandoned")], metrics.probes.abandoned);

        self.single(
            "prompt_tokens_total",
            "counter",
            "Tokens of prompts, cached ones included.",
            total.prompt_tokens,
        );
        self.single(
            "cached_tokens_total",
            "counter",
            "Tokens of prompts that the prefix cache held.",
            total.cached_tokens,
        );
        self.single(
            "generated_tokens_total",
            "counter",
            "Tokens generated.",
            total.generated_tokens,
        );
        if let Some(rate) = window.cache_hit_rate {
            self.single(
                "cache_hit_ratio",
                "gauge",
                "Cached tokens by tokens of prompts, in the window.",
                rate,
            );
        }
        self.throughput("prefill", &total.prefill, &window.prefill);
        self.throughput("decode", &total.decode, &window.decode);

        self.summary(
            "request_duration_seconds",
            "From submission to the end, of finished requests.",
            &total.generation_time,
            &window.generation_time,
        );
        self.summary(
            "queue_seconds",
            "From submission to the start.",
            &total.queue_time,
            &window.queue_time,
        );
        self.summary(
            "time_to_first_token_seconds",
            "From submission to the first token.",
            &total.time_to_first_token,
            &window.time_to_first_token,
        );
        self.summary(
            "time_per_output_token_seconds",
            "The mean time from token to token of each finished request.",
            &total.time_per_output_token,
            &window.time_per_output_token,
        );
    }

    fn throughput(&mut self, what: &str, total: &Throughput, window: &Throughput) {
        let tokens = format!("{what}_tokens_total");
        self.single(
            &tokens,
            "counter",
            "Tokens whose time is known, of finished requests.",
            total.tokens,
        );
        let time = format!("{what}_seconds_total");
        self.single(
            &time,
            "counter",
            "The time that these tokens took.",
            total.seconds,
        );
        if let Some(rate) = window.tokens_per_second {
            let name = format!("{what}_tokens_per_second");
            self.single(
                &name,
                "gauge",
                "One by the other, of one request, in the window.",
                rate,
            );
        }
    }

    fn summary(&mut self, name: &str, help: &str, total: &Distribution, window: &Distribution) {
        self.family(name, "summary", help);
        let quantiles = [
            ("0.5", window.p50_s),
            ("0.9", window.p90_s),
            ("0.99", window.p99_s),
        ];
        for (quantile, value) in quantiles {
            self.sample(name, &[("quantile", quantile)], value.unwrap_or(f64::NAN));
        }
        self.sample(&format!("{name}_sum"), &[], total.sum_s);
        self.sample(&format!("{name}_count"), &[], total.count);
    }

    fn seconds(&mut self, name: &str, help: &str, value: Option<f64>) {
        if let Some(value) = value {
            self.single(name, "gauge", help, value);
        }
    }

    /// What the engine says of its inside.
    fn engine(&mut self, engine: &EngineStatistics) {
        let gauges = [
            (
                "engine_queued",
                "Requests that wait in the engine.",
                engine.queued,
            ),
            ("engine_running", "Requests that the engine runs.", engine.running),
            (
                "engine_batch_size",
                "Answers that the last turn took further together.",
                engine.batch_size,
            ),
            (
                "engine_kv_reserved_bytes",
                "Bytes that keys and values of what runs may come to take.",
                engine.kv_reserved_bytes,
            ),
            (
                "engine_prefix_cache_bytes",
                "Bytes of keys and values that are kept.",
                engine.prefix_cache_bytes,
            ),
            (
                "engine_prefix_cache_sequences",
                "Sequences that are kept.",
                engine.prefix_cache_sequences,
            ),
            (
                "engine_weight_bytes",
                "Bytes of the weights.",
                engine.weight_bytes,
            ),
        ];
        for (name, help, value) in gauges {
            self.single(name, "gauge", help, value);
        }
        self.batch_sizes(&engine.batch_sizes);
        self.seconds(
            "engine_turn_seconds",
            "How long the turn that runs has taken.",
            engine.turn_s,
        );
        self.single(
            "engine_turns_total",
            "counter",
            "Turns of the engine.",
            engine.turns,
        );
        let guesses = [
            (
                "engine_drafted_tokens_total",
                "Tokens that were guessed and verified.",
                engine.drafted_tokens,
            ),
            (
                "engine_accepted_tokens_total",
                "Guesses that were right.",
                engine.accepted_tokens,
            ),
        ];
        for (name, help, value) in guesses {
            self.single(name, "counter", help, value);
        }
        let redone = "Steps that were run again for one answer alone.";
        self.single(
            "engine_redone_steps_total",
            "counter",
            redone,
            engine.redone_steps,
        );
        let restarts = "How often the worker went on after a panic.";
        self.single(
            "engine_worker_restarts_total",
            "counter",
            restarts,
            engine.worker_restarts,
        );
        if let Some(memory) = engine.memory {
            self.single(
                "device_memory_active_bytes",
                "gauge",
                "Device memory in use.",
                memory.active_bytes,
            );
            let cache = "Device memory that is kept for the next arrays.";
            self.single("device_memory_cache_bytes", "gauge", cache, memory.cache_bytes);
        }
    }

    fn batch_sizes(&mut self, sizes: &BatchSizes) {
        let name = "engine_turn_answers";
        self.family(name, "histogram", "Answers that turns took further together.");
        let mut count = 0;
        for (turns, most) in sizes.turns.iter().zip(BatchSizes::MOST) {
            count += turns;
            let most = if most == u64::MAX {
                "+Inf".to_owned()
            } else {
                most.to_string()
            };
            self.sample(&format!("{name}_bucket"), &[("le", &most)], count);
        }
        self.sample(&format!("{name}_sum"), &[], sizes.answers);
        self.sample(&format!("{name}_count"), &[], count);
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.write(format_args!(
            "# HELP mlx_engine_{name} {help}\n# TYPE mlx_engine_{name} {kind}\n"
        ));
    }

    fn sample(&mut self, name: &str, labels: &[Label<'_>], value: impl Display) {
        self.write(format_args!("mlx_engine_{name}"));
        for (index, (label, value)) in labels.iter().enumerate() {
            let open = if index == 0 { '{' } else { ',' };
            self.write(format_args!("{open}{label}=\"{}\"", Escaped(value)));
        }
        let close = if labels.is_empty() { "" } else { "}" };
        self.write(format_args!("{close} {value}\n"));
    }

    fn write(&mut self, text: fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.text.write_fmt(text);
    }
}

/// The value of a label, with what would end it escaped.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}
