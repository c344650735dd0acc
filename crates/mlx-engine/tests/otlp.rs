//! What a collector gets.

#[path = "otlp/collector.rs"]
mod collector;

use collector::{collector, read};
use futures::StreamExt;
use mlx_engine::otlp::{Otlp, OtlpError, OtlpOptions};
use mlx_engine::prelude::*;
use mlx_engine::{MockFault, MockScript};
use serde_json::{Value, json};

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
