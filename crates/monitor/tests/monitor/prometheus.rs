//! The text that Prometheus reads, read by Prometheus' own client.
//!
//! `fixtures/metrics.prom` is the page, `fixtures/metrics.json` what prometheus_client made of it;
//! `fixtures/read_metrics.py` writes the second from the first.

use std::sync::Arc;
use std::time::Duration;

use futures::executor::block_on;
use mlx_engine_core::{
    Backend, BatchSizes, DeviceMemory, EngineError, EngineStatistics, GenerateParams, LlmEngine, Prompt,
};
use mlx_engine_monitor::{ManualClock, Monitored};
use serde_json::Value;

use crate::support::{Script, Scripted};

const PAGE: &str = include_str!("../fixtures/metrics.prom");
const READ: &str = include_str!("../fixtures/metrics.json");

/// An engine that has a past.
fn engine() -> Monitored<Arc<Scripted>> {
    let clock = ManualClock::default();
    let builder = Monitored::builder(Arc::new(Scripted::new(Backend::Mock)));
    let engine = builder
        .clock(clock.clone())
        .load_time(Duration::from_millis(1500))
        .build()
        .expect("as the test sets it up");
    let ask = |script| {
        engine.engine().next(script);
        block_on(engine.generate(Prompt::text("x"), GenerateParams::default())).is_ok()
    };
    assert!(ask(Script::answer(3, 10.0)) && ask(Script::answer(5, 40.0)));
    clock.advance(Duration::from_millis(2250));
    assert!(!ask(Script::refuse(EngineError::OutOfMemory)));
    assert!(!ask(Script::refuse(EngineError::EmptyPrompt)));
    block_on(engine.check_health());
    *engine.engine().statistics.lock().expect("not poisoned") = Some(EngineStatistics {
        queued: 2,
        running: 3,
        batch_size: 4,
        batch_sizes: BatchSizes {
            turns: std::array::from_fn(|class| class as u64 % 3),
            answers: 150,
        },
        turns: 50,
        generated_tokens: 60,
        drafted_tokens: 40,
        accepted_tokens: 30,
        turn_s: Some(0.25),
        kv_reserved_bytes: 700,
        prefix_cache_bytes: 800,
        prefix_cache_sequences: 9,
        weight_bytes: 1000,
        redone_steps: 6,
        worker_restarts: 1,
        memory: Some(DeviceMemory {
            active_bytes: 1100,
            cache_bytes: 1200,
            peak_bytes: 1300,
        }),
        ..EngineStatistics::default()
    });
    engine
}

/// Without the family whose value is this process' own.
fn page(engine: &Monitored<Arc<Scripted>>) -> String {
    let text = engine.prometheus();
    let own = |line: &&str| line.contains("process_resident_memory_bytes");
    text.split_inclusive('\n').filter(|line| !own(line)).collect()
}

#[test]
fn the_page_is_the_one_that_was_read() {
    if let Some(path) = std::env::var_os("WRITE_METRICS_PROM") {
        std::fs::write(path, page(&engine())).unwrap();
    }
    assert_eq!(page(&engine()), PAGE);
}

#[test]
fn what_prometheus_reads_is_what_was_measured() {
    let read: Vec<(String, Value, f64)> = serde_json::from_str(READ).unwrap();
    let check = |name: &str, labels: Value, value: f64| {
        let name = format!("mlx_engine_{name}");
        let found = read
            .iter()
            .find(|(read, with, _)| *read == name && *with == labels);
        assert_eq!(found.map(|(_, _, value)| *value), Some(value), "{name} {labels}");
    };
    let (metrics, none) = (engine().metrics(), serde_json::json!({}));
    let (total, window) = (&metrics.total, &metrics.window);
    check(
        "info",
        serde_json::json!({"model": "tiny", "backend": "mock"}),
        1.0,
    );
    check("health", serde_json::json!({"state": "degraded"}), 1.0);
    check("health", serde_json::json!({"state": "healthy"}), 0.0);
    check("ready", none.clone(), 1.0);
    check("uptime_seconds", none.clone(), 2.25);
    check("load_seconds", none.clone(), 1.5);
    check("requests_submitted_total", none.clone(), 4.0);
    check(
        "requests_finished_total",
        serde_json::json!({"reason": "stop"}),
        2.0,
    );
    check(
        "requests_failed_total",
        serde_json::json!({"kind": "out_of_memory"}),
        1.0,
    );
    check(
        "requests_failed_total",
        serde_json::json!({"kind": "empty_prompt"}),
        1.0,
    );
    check("probes_total", serde_json::json!({"result": "passed"}), 1.0);
    check("prompt_tokens_total", none.clone(), total.prompt_tokens as f64);
    check("generated_tokens_total", none.clone(), 8.0);
    check("decode_tokens_total", none.clone(), total.decode.tokens as f64);
    check("decode_seconds_total", none.clone(), total.decode.seconds);
    check(
        "decode_tokens_per_second",
        none.clone(),
        window.decode.tokens_per_second.unwrap(),
    );
    check(
        "time_per_output_token_seconds_sum",
        none.clone(),
        total.time_per_output_token.sum_s,
    );
    check("time_per_output_token_seconds_count", none.clone(), 2.0);
    // Of 1 to 16 answers 15 turns, of up to 32 one, of up to 64 two.
    let up_to = |most: &str| serde_json::json!({ "le": most });
    check("engine_turn_answers_bucket", up_to("1"), 0.0);
    check("engine_turn_answers_bucket", up_to("16"), 15.0);
    check("engine_turn_answers_bucket", up_to("64"), 18.0);
    check("engine_turn_answers_bucket", up_to("+Inf"), 18.0);
    check("engine_turn_answers_sum", none.clone(), 150.0);
    check("engine_turn_answers_count", none, 18.0);
    let quantile = serde_json::json!({"quantile": "0.9"});
    check(
        "time_per_output_token_seconds",
        quantile,
        window.time_per_output_token.p90_s.unwrap(),
    );
}

#[test]
fn a_model_may_have_any_name() {
    let mut metrics = engine().metrics();
    metrics.model = Some("a\\b\"c\nd".to_owned());
    let text = metrics.prometheus(&engine().health());
    assert!(
        text.contains(r#"mlx_engine_info{model="a\\b\"c\nd",backend="mock"} 1"#),
        "{text}"
    );
}
