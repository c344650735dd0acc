//! What the facades of `metrics` and `tracing` hear. One test, alone in its program: which spans are of interest is global.

#![cfg(all(feature = "metrics", feature = "tracing"))]

#[expect(dead_code, reason = "this test uses a part of it")]
#[path = "monitor/support.rs"]
mod support;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use futures::executor::block_on;
use metrics::{
    Counter, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
};
use mlx_engine_core::{
    Backend, BatchSizes, ChatMessage, DeviceMemory, EngineError, EngineStatistics, GenerateParams, LlmEngine,
    Prompt,
};
use mlx_engine_monitor::{ManualClock, Monitored};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};

use support::{Script, Scripted};

/// Two requests: one that answers with three tokens, one that is refused. Gives the page that Prometheus would read after them.
fn two_requests() -> String {
    let engine = Monitored::builder(Arc::new(Scripted::new(Backend::Mlx)));
    let engine = engine
        .clock(ManualClock::default())
        .build()
        .expect("as the test sets it up");
    let ask = |prompt, script| {
        engine.engine().next(script);
        block_on(engine.generate(prompt, GenerateParams::default().with_max_tokens(7)))
    };
    ask(Prompt::chat([ChatMessage::user("x")]), Script::answer(3, 10.0)).expect("as the test sets it up");
    ask(Prompt::text("x"), Script::refuse(EngineError::OutOfMemory)).expect_err("as the test sets it up");
    // Somebody looks, and looks again.
    let mut batch_sizes = BatchSizes::default();
    (batch_sizes.turns[0], batch_sizes.turns[16], batch_sizes.answers) = (2, 1, 22);
    *engine.engine().statistics.lock().expect("not poisoned") = Some(EngineStatistics {
        queued: 2,
        running: 3,
        batch_size: 4,
        batch_sizes,
        turn_s: Some(0.25),
        kv_reserved_bytes: 700,
        prefix_cache_bytes: 800,
        prefix_cache_sequences: 9,
        weight_bytes: 1000,
        memory: Some(DeviceMemory {
            active_bytes: 1100,
            cache_bytes: 1200,
            peak_bytes: 1300,
        }),
        load_s: Some(1.5),
        ..EngineStatistics::default()
    });
    engine.health();
    engine.health();
    engine.prometheus()
}

/// Name, labels and value of everything recorded.
#[derive(Clone, Default)]
struct Recorded(Arc<Mutex<Vec<String>>>, Arc<Mutex<BTreeMap<String, f64>>>);

struct One(Key, Recorded);

impl HistogramFn for One {
    fn record(&self, value: f64) {
        let labels: Vec<_> = self
            .0
            .labels()
            .map(|label| format!("{}={}", label.key(), label.value()))
            .collect();
        self.1.0.lock().expect("as the test sets it up").push(format!(
            "{} {} {value}",
            self.0.name(),
            labels.join(",")
        ));
    }
}

impl GaugeFn for One {
    fn increment(&self, _: f64) {}
    fn decrement(&self, _: f64) {}

    fn set(&self, value: f64) {
        let mut gauges = self.1.1.lock().expect("as the test sets it up");
        let state = self.0.labels().find(|label| label.key() == "state");
        let state = state.map(|label| label.value().to_owned()).unwrap_or_default();
        gauges.insert(self.0.name().to_owned() + &state, value);
    }
}

impl Recorder for Recorded {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(Arc::new(One(key.clone(), self.clone())))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::new(One(key.clone(), self.clone())))
    }
}

/// The fields of every span.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<BTreeMap<String, String>>>>);

struct Fields<'a>(&'a mut BTreeMap<String, String>);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

impl Subscriber for Spans {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut spans = self.0.lock().expect("not poisoned");
        let mut fields = BTreeMap::from([("name".to_owned(), span.metadata().name().to_owned())]);
        span.record(&mut Fields(&mut fields));
        spans.push(fields);
        Id::from_u64(spans.len() as u64)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        values.record(&mut Fields(
            &mut self.0.lock().expect("not poisoned")[span.into_u64() as usize - 1],
        ));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

fn check_metrics(recorded: &Recorded) {
    let common = |operation: &str| {
        format!(
            "gen_ai.provider.name=mlx_engine,gen_ai.operation.name={operation},gen_ai.response.model=tiny,mlx_engine.backend=mlx"
        )
    };
    let (chat, completion) = (common("chat"), common("text_completion"));
    let engine = "gen_ai.provider.name=mlx_engine,gen_ai.response.model=tiny,mlx_engine.backend=mlx";
    let expected = [
        format!("gen_ai.server.request.duration {chat} 0"),
        format!("gen_ai.server.time_per_output_token {chat} 0.1"),
        format!("gen_ai.client.token.usage {chat},gen_ai.token.type=input 4"),
        format!("gen_ai.client.token.usage {chat},gen_ai.token.type=output 3"),
        format!("gen_ai.server.request.duration {completion},error.type=out_of_memory 0"),
        format!("gen_ai.client.token.usage {completion},gen_ai.token.type=output 0"),
        format!("mlx_engine.engine.turn_answers {engine} 1"),
        format!("mlx_engine.engine.turn_answers {engine} 1"),
        format!("mlx_engine.engine.turn_answers {engine} 32"),
    ];
    let found: Vec<String> = recorded.0.lock().expect("not poisoned").clone();
    let found: Vec<_> = found
        .iter()
        .filter(|line| !line.contains("time_to_first_token"))
        .collect();
    assert_eq!(found, expected.iter().collect::<Vec<_>>());
}

/// What is told of the engine is what the page has, under the same names.
fn check_gauges(recorded: &Recorded, page: &str) {
    let gauges = recorded.1.lock().expect("not poisoned");
    let check = |name: &str, value: f64| {
        assert_eq!(gauges.get(&format!("mlx_engine.{name}")), Some(&value), "{name}");
    };
    check("requests_queued", 0.0);
    check("requests_running", 0.0);
    check("healthhealthy", 0.0);
    check("healthdegraded", 1.0);
    check("live", 1.0);
    check("ready", 1.0);
    check("uptime_seconds", 0.0);
    check("load_seconds", 1.5);
    check("engine.queued", 2.0);
    check("engine.running", 3.0);
    check("engine.batch_size", 4.0);
    check("engine.turn_seconds", 0.25);
    check("engine.kv_reserved_bytes", 700.0);
    check("engine.prefix_cache_bytes", 800.0);
    check("engine.prefix_cache_sequences", 9.0);
    check("engine.weight_bytes", 1000.0);
    check("device_memory_active_bytes", 1100.0);
    check("device_memory_cache_bytes", 1200.0);
    check("device_memory_peak_bytes", 1300.0);
    let process = gauges.get("mlx_engine.process_resident_memory_bytes");
    assert_eq!(
        process.is_some_and(|&bytes| bytes > 4096.0),
        cfg!(target_os = "linux")
    );
    for name in gauges
        .keys()
        .filter(|name| !name.starts_with("mlx_engine.health"))
    {
        let family = format!("# TYPE {} gauge\n", name.replace('.', "_"));
        assert!(page.contains(&family), "{family}");
    }
}

fn check_spans(spans: &Spans) {
    let spans = spans.0.lock().expect("not poisoned");
    assert_eq!(spans.len(), 2);
    let check = |span: &BTreeMap<String, String>, field: &str, value: &str| {
        assert_eq!(span.get(field).map(String::as_str), Some(value), "{field}");
    };
    check(&spans[0], "name", "gen_ai.request");
    check(&spans[0], "gen_ai.operation.name", "\"chat\"");
    check(&spans[0], "gen_ai.request.model", "\"tiny\"");
    check(&spans[0], "gen_ai.request.max_tokens", "7");
    check(&spans[0], "gen_ai.usage.input_tokens", "4");
    check(&spans[0], "gen_ai.usage.output_tokens", "3");
    check(&spans[0], "gen_ai.response.finish_reasons", "stop");
    assert_eq!(spans[0].get("error.type"), None);
    check(&spans[1], "gen_ai.operation.name", "\"text_completion\"");
    check(&spans[1], "error.type", "\"out_of_memory\"");
}

#[test]
fn requests_have_the_names_and_fields_of_opentelemetry() {
    let (recorded, spans) = (Recorded::default(), Spans::default());
    let mut page = String::new();
    tracing::subscriber::with_default(spans.clone(), || {
        page = metrics::with_local_recorder(&recorded, two_requests);
    });
    check_metrics(&recorded);
    check_gauges(&recorded, &page);
    check_spans(&spans);
}
