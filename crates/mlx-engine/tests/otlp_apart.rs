//! What a collector gets of an engine in a process of its own.
#![cfg(unix)]

#[path = "otlp/collector.rs"]
mod collector;

use collector::{collector, read};
use mlx_engine::otlp::{Otlp, OtlpOptions};
use mlx_engine::prelude::*;
use mlx_engine::{MockScript, Program, SupervisorConfiguration, serve_child_then};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// The engine's process is this program again, which runs this test alone.
#[test]
fn the_process_of_an_engine() {
    let otlp = std::env::var(ENDPOINT).ok().map(|endpoint| {
        let otlp = Otlp::start(&OtlpOptions::new(endpoint)).unwrap();
        otlp.install().unwrap();
        otlp
    });
    let served = serve_child_then(move || {
        if let Some(otlp) = otlp {
            otlp.shutdown().unwrap();
        }
    });
    if let Err(error) = served {
        let by_hand = "standard input is no connection to the program of this engine";
        assert!(error.to_string().contains(by_hand), "{error}");
    }
}

#[tokio::test]
async fn steps_of_an_engine_apart_are_spans_of_its_process_and_the_last_are_sent_too() {
    let (endpoint, bodies) = collector().await;
    let program = Program::this().unwrap().env(ENDPOINT, endpoint);
    let program = ["--exact", "the_process_of_an_engine", "--nocapture"]
        .into_iter()
        .fold(program, Program::arg);
    let engine = InferenceEngine::new()
        .with_backend(BackendChoice::Mock)
        .with_mock(MockScript::reply("Paris"))
        .with_child_process(program, SupervisorConfiguration::default());
    engine.load_model("tiny").await.unwrap();
    let output = engine
        .generate("Where?", GenerateParams::default())
        .await
        .unwrap();
    assert_eq!(output.text, "Paris");
    // It waits for the end of the process, which sends what it has first.
    engine.unload().await.unwrap();

    let spans = read(&bodies.lock().unwrap().clone());
    // Requests are spans of the process that asks, which sends none here.
    assert!(
        !spans.is_empty()
            && spans.iter().all(
                |span| (&span["name"], &span["service"]) == (&"gen_ai.step".into(), &"mlx-engine".into())
            ),
        "{spans:?}"
    );
    let sum = |name: &str| {
        spans
            .iter()
            .filter_map(|span| span["fields"][name].as_u64())
            .sum::<u64>()
    };
    let usage = output.usage;
    assert_eq!(
        sum("gen_ai.usage.output_tokens"),
        u64::from(usage.completion_tokens)
    );
    assert_eq!(
        sum("mlx_engine.step.prompt_tokens"),
        u64::from(usage.prompt_tokens)
    );
    assert_eq!(spans[0]["fields"]["gen_ai.request.model"], "tiny");
}
