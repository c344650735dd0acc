//! What a collector gets, read by OpenTelemetry's own definitions of the protocol in Python.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use futures::StreamExt;
use mlx_engine::otlp::{Otlp, OtlpError, OtlpOptions};
use mlx_engine::prelude::*;
use mlx_engine::{MockFault, MockScript};
use serde_json::{Value, json};

/// Reads the length of each body and the body, and writes the spans as JSON.
const READ: &str = r#"
import json, struct, sys
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

def value(any):
    return getattr(any, any.WhichOneof("value"))

def fields(attributes):
    return {one.key: value(one.value) for one in attributes}

spans = []
data = sys.stdin.buffer
while header := data.read(4):
    request = ExportTraceServiceRequest.FromString(data.read(struct.unpack("<I", header)[0]))
    for resource in request.resource_spans:
        service = fields(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                assert len(span.trace_id) == 16 and len(span.span_id) == 8
                assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano
                spans.append({"service": service, "name": span.name, "error": span.status.code == 2,
                              "fields": fields(span.attributes)})
json.dump(spans, sys.stdout)
"#;

type Bodies = Arc<Mutex<Vec<Bytes>>>;

async fn collector() -> (String, Bodies) {
    let bodies = Bodies::default();
    let take = |State(bodies): State<Bodies>, body: Bytes| async move {
        bodies.lock().expect("not poisoned").push(body);
    };
    let router = Router::new()
        .route("/v1/traces", post(take))
        .with_state(Arc::clone(&bodies));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, router).await });
    (format!("http://{address}"), bodies)
}

fn read(bodies: &[Bytes]) -> Vec<Value> {
    let path = std::env::var_os("MLX_ENGINE_TEST_PYTHONPATH").expect("cargo xtask test sets it");
    let mut python = Command::new("python3")
        .args(["-c", READ])
        .env("PYTHONPATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python runs");
    let mut stdin = python.stdin.take().expect("a pipe");
    for body in bodies {
        stdin
            .write_all(&(body.len() as u32).to_le_bytes())
            .expect("it reads");
        stdin.write_all(body).expect("it reads");
    }
    drop(stdin);
    let output = python.wait_with_output().expect("it ends");
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The subscriber is the process's: there is one test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_and_steps_are_spans_that_a_collector_can_read() {
    let (endpoint, bodies) = collector().await;
    let otlp = Otlp::start(&OtlpOptions::new(endpoint)).unwrap();
    otlp.install().unwrap();
    assert!(matches!(otlp.install(), Err(OtlpError::Installed)));

    let script = MockScript::reply("Paris").with_fault(2, MockFault::Device);
    let engine = InferenceEngine::new()
        .with_backend(BackendChoice::Mock)
        .with_mock(script);
    engine.load_model("tiny").await.unwrap();
    let params = GenerateParams::default()
        .with_temperature(0.25)
        .with_max_tokens(40);
    let mut events = engine.stream("Where?", params.clone()).await.unwrap();
    let mut before = 0;
    while let Ok(event) = events.next().await.unwrap() {
        before += event.tokens().len() as u64;
    }
    let output = engine.generate("Where?", params).await.unwrap();
    let steps = engine.statistics().unwrap().turns;
    engine.unload().await.unwrap();
    tokio::task::spawn_blocking(|| otlp.shutdown())
        .await
        .unwrap()
        .unwrap();

    let bodies = bodies.lock().unwrap().clone();
    let spans = read(&bodies);
    assert!(
        spans.iter().all(|span| span["service"] == "mlx-engine"),
        "{spans:?}"
    );
    let requests: Vec<_> = spans.iter().filter(|span| span["name"] == "chat tiny").collect();
    let field = |span: &Value, name: &str| span["fields"][name].clone();
    assert_eq!(requests.len(), 2, "{spans:?}");
    for request in &requests {
        assert_eq!(field(request, "gen_ai.provider.name"), "mlx_engine");
        assert_eq!(field(request, "gen_ai.operation.name"), "chat");
        assert_eq!(field(request, "gen_ai.request.model"), "tiny");
        assert_eq!(field(request, "gen_ai.request.max_tokens"), json!(40));
        assert_eq!(field(request, "gen_ai.request.temperature"), json!(0.25));
    }
    let (failed, answered) = (requests[0], requests[1]);
    assert_eq!(
        (&failed["error"], &answered["error"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(field(failed, "error.type"), "device");
    assert_eq!(field(answered, "gen_ai.response.model"), "tiny");
    assert_eq!(field(answered, "gen_ai.response.finish_reasons"), "stop");
    let usage = output.usage;
    assert_eq!(
        field(answered, "gen_ai.usage.input_tokens"),
        json!(usage.prompt_tokens)
    );
    assert_eq!(
        field(answered, "gen_ai.usage.output_tokens"),
        json!(usage.completion_tokens)
    );

    let steps_sent: Vec<_> = spans
        .iter()
        .filter(|span| span["name"] == "gen_ai.step")
        .collect();
    assert!(
        steps_sent.len() as u64 >= steps - 1 && steps_sent.len() as u64 <= steps + 1,
        "{} of {steps}",
        steps_sent.len()
    );
    let sum = |name: &str| {
        steps_sent
            .iter()
            .filter_map(|step| field(step, name).as_u64())
            .sum::<u64>()
    };
    assert!(before > 0, "some came before the fault");
    assert_eq!(
        sum("gen_ai.usage.output_tokens"),
        before + u64::from(usage.completion_tokens)
    );
    assert!(sum("mlx_engine.step.prompt_tokens") >= u64::from(usage.prompt_tokens));
    assert_eq!(field(steps_sent[0], "gen_ai.request.model"), "tiny");
}
