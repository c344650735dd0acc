//! Metrics, health, retry and recovery, as a program sees them on the facade.

use futures::StreamExt;
use mlx_engine::prelude::*;
use mlx_engine::{EngineHealth, MockFault, MockScript};

fn mock(script: MockScript) -> InferenceEngine {
    InferenceEngine::new()
        .with_backend(BackendChoice::Mock)
        .with_mock(script)
}

#[tokio::test]
async fn health_follows_the_model() {
    let engine = mock(MockScript::reply("Paris"));
    assert_eq!(
        engine.health().status,
        EngineHealth::Unhealthy,
        "nothing is loaded"
    );
    engine.load_model("tiny").await.unwrap();
    let report = engine.check_health().await;
    assert_eq!(
        report.status,
        EngineHealth::Degraded,
        "a mock is no model: {report:?}"
    );
    engine.unload().await.unwrap();
    assert_eq!(engine.health().status, EngineHealth::Unhealthy);
    let report = engine.attempt_recovery().await;
    assert!(!report.recovered, "what was unloaded on purpose stays so");
}

#[tokio::test]
async fn what_was_answered_is_counted() {
    let engine = mock(MockScript::reply("Paris"));
    engine.load_model("tiny").await.unwrap();
    for _ in 0..3 {
        engine
            .generate("Where?", GenerateParams::default())
            .await
            .unwrap();
    }
    let mut stream = engine.stream("Where?", GenerateParams::default()).await.unwrap();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    let metrics = engine.performance_metrics();
    assert_eq!((metrics.total.submitted, metrics.total.cancelled), (4, 1));
    // Five bytes and the end, three times, and what was there of the fourth.
    assert!(metrics.total.generated_tokens >= 18, "{metrics:?}");
    let page = engine.prometheus();
    assert!(
        page.contains("requests_submitted_total") && page.contains(" 4\n"),
        "{page}"
    );
    assert!(serde_json::to_value(engine.detailed_status()).is_ok());
}

#[tokio::test]
async fn a_fault_is_an_error_and_a_retry_answers() {
    for fault in [MockFault::Panic, MockFault::OutOfMemory, MockFault::Device] {
        let engine = mock(MockScript::reply("Paris").with_fault(2, fault));
        engine.load_model("tiny").await.unwrap();
        let error = engine
            .generate("Where?", GenerateParams::default())
            .await
            .unwrap_err();
        assert!(error.is_retryable(), "{error}");
        let output = engine
            .generate("Where?", GenerateParams::default())
            .await
            .unwrap();
        assert_eq!(output.text, "Paris");

        // The fault comes back with the model that is loaded again.
        engine.load_model("tiny").await.unwrap();
        let output = engine
            .generate_with_retry("Where?", GenerateParams::default())
            .await;
        assert_eq!(output.unwrap().text, "Paris");
        let report = engine.attempt_recovery().await;
        assert!(report.recovered && report.steps.is_empty(), "{report:?}");
        assert_eq!(engine.performance_metrics().total.errors.values().sum::<u64>(), 2);
    }
}
