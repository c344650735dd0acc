//! A collector, and what it got, read by OpenTelemetry's own definitions of the protocol in Python.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use serde_json::Value;

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

pub(crate) type Bodies = Arc<Mutex<Vec<Bytes>>>;

pub(crate) async fn collector() -> (String, Bodies) {
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

pub(crate) fn read(bodies: &[Bytes]) -> Vec<Value> {
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
