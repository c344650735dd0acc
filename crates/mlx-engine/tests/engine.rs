//! The facade on the mock: loading, falling back, conversations.

use std::time::Duration;

use futures::StreamExt;
use mlx_engine::MockScript;
use mlx_engine::prelude::*;

fn mock(script: MockScript) -> InferenceEngine {
    InferenceEngine::new()
        .with_backend(BackendChoice::Mock)
        .with_mock(script)
}

#[tokio::test]
async fn without_a_model_there_is_no_answer() {
    let engine = InferenceEngine::new();
    let error = engine
        .generate("Hi", GenerateParams::default())
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "model `none` is not loaded");
    assert_eq!((engine.backend(), engine.model()), (None, None));
    engine.unload().await.unwrap();
}

#[tokio::test]
async fn a_second_load_while_one_runs_is_refused() {
    let engine = mock(MockScript::default().with_load_delay(Duration::from_millis(200)));
    let (first, second) = tokio::join!(engine.load_model("first"), engine.load_model("second"));
    assert_eq!(first.unwrap().id, "first");
    assert_eq!(second.unwrap_err().to_string(), "model `first` is still loading");
    // Afterwards another model may take the place.
    assert_eq!(engine.load_model("second").await.unwrap().id, "second");
    engine.unload().await.unwrap();
    let error = engine
        .generate("Hi", GenerateParams::default())
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::NotLoaded { .. }));
}

#[tokio::test]
async fn a_load_that_is_dropped_or_fails_leaves_no_trace() {
    let engine = mock(MockScript::default().with_load_delay(Duration::from_millis(50)));
    drop(futures::poll!(Box::pin(engine.load_model("first"))));
    engine.load_model("second").await.unwrap();
    let engine = mock(MockScript::default().with_load_failure("broken"));
    let error = engine.load_model("third").await.unwrap_err();
    assert!(matches!(error, EngineError::ModelLoad { .. }), "{error}");
    assert!(matches!(engine.engine(), Err(EngineError::NotLoaded { .. })));
}

#[tokio::test]
async fn the_mock_stands_in_only_as_the_policy_allows() {
    let load = |choice, policy| async move {
        let engine = InferenceEngine::new().with_backend(choice).with_fallback(policy);
        let loaded = engine.load_model("no/such/model").await;
        (
            loaded.map_err(|error| error.to_string()),
            engine.fallback_reason(),
            engine.backend(),
        )
    };
    // With MLX the model is what is missing, without it MLX is.
    let compiled = cfg!(feature = "mlx");
    for (choice, policy) in [
        (BackendChoice::Auto, FallbackPolicy::Never),
        (BackendChoice::Mlx, FallbackPolicy::WhenMlxUnavailable),
        (BackendChoice::Mlx, FallbackPolicy::OnLoadFailure),
    ] {
        let (loaded, reason, backend) = load(choice, policy).await;
        let error = loaded.unwrap_err();
        let expect = if compiled {
            "not found"
        } else {
            "mlx is unavailable"
        };
        assert!(error.contains(expect), "{error}");
        assert_eq!((reason, backend), (None, None));
    }
    let (loaded, reason, backend) = load(BackendChoice::Auto, FallbackPolicy::WhenMlxUnavailable).await;
    if compiled {
        assert!(loaded.unwrap_err().contains("not found"));
    } else {
        assert!(reason.unwrap().contains("does not include MLX"));
        assert_eq!(backend, Some(Backend::Mock));
    }
    let (loaded, reason, backend) = load(BackendChoice::Auto, FallbackPolicy::OnLoadFailure).await;
    assert!(loaded.is_ok() && reason.is_some());
    assert_eq!(backend, Some(Backend::Mock));
    let (_, reason, backend) = load(BackendChoice::Mock, FallbackPolicy::Never).await;
    assert_eq!((reason, backend), (None, Some(Backend::Mock)));
}

#[tokio::test]
async fn a_conversation_remembers_and_can_be_taken_up_again() {
    let engine = mock(MockScript::reply("Paris"));
    engine.load_model("tiny").await.unwrap();
    let mut chat = engine.chat().with_system("Be brief.");
    assert_eq!(chat.send("The capital of France?").await.unwrap().text, "Paris");
    let second = chat.send("Again?").await.unwrap();
    // All of the first turn but what the template puts after it.
    assert!(second.usage.cached_tokens > 40, "{:?}", second.usage);
    let said: Vec<String> = chat
        .history()
        .iter()
        .map(|message| format!("{}: {}", message.role, message.content))
        .collect();
    assert_eq!(
        said,
        [
            "system: Be brief.",
            "user: The capital of France?",
            "assistant: Paris",
            "user: Again?",
            "assistant: Paris"
        ]
    );
    let json = serde_json::to_string(chat.history()).unwrap();
    let restored: Vec<ChatMessage> = serde_json::from_str(&json).unwrap();
    let mut later = engine.chat().with_history(restored);
    later.send("Once more?").await.unwrap();
    assert_eq!(later.history().len(), 7);
    later.clear();
    assert_eq!(later.history().len(), 1);
}

#[tokio::test]
async fn what_was_received_of_a_dropped_answer_stays() {
    let engine = mock(MockScript::reply("abc"));
    engine.load_model("tiny").await.unwrap();
    let mut chat = engine.chat();
    drop(chat.stream("first").await.unwrap());
    assert!(chat.history().is_empty());
    let mut stream = chat.stream("second").await.unwrap();
    while let Some(event) = stream.next().await {
        if matches!(event.unwrap(), GenerationEvent::Text { .. }) {
            break;
        }
    }
    drop(stream);
    assert_eq!(chat.history()[1].content, "a");
    let error = chat.stream("").await;
    drop(error);
    assert_eq!(chat.history().len(), 2);
}

#[tokio::test]
async fn without_a_model_everything_that_needs_one_says_so() {
    let engine = InferenceEngine::new();
    let prompt = || Prompt::text("Hi");
    let errors = [
        engine.score("Hi").await.err(),
        engine.prefix_cache().await.err(),
        engine.clear_prefix_cache().await.err(),
        engine.pin_prefix(prompt()).await.err(),
        engine.unpin_prefix(prompt()).await.err(),
        engine.stream(prompt(), GenerateParams::default()).await.err(),
        engine
            .stream_with_retry(prompt(), GenerateParams::default())
            .await
            .err(),
        engine
            .generate_with_retry(prompt(), GenerateParams::default())
            .await
            .err(),
        engine.engine().err(),
    ];
    for (which, error) in errors.iter().enumerate() {
        assert!(
            matches!(error, Some(EngineError::NotLoaded { model }) if model == "none"),
            "{which}: {error:?}"
        );
    }
    assert_eq!((engine.device(), engine.load_seconds()), (None, None));
    assert_eq!((engine.peak_memory_bytes(), engine.statistics()), (None, None));
    // What has nothing to end has ended.
    engine.unload_with(mlx_engine::UnloadMode::Drain).await.unwrap();
    engine.abandon();
}

#[tokio::test]
async fn what_is_asked_while_a_model_loads_is_refused_and_may_be_asked_again() {
    let engine = mock(MockScript::reply("Paris").with_load_delay(Duration::from_millis(100)));
    let mut load = Box::pin(engine.load_model("tiny"));
    assert!(futures::poll!(&mut load).is_pending());
    let error = engine
        .generate("Hi", GenerateParams::default())
        .await
        .unwrap_err();
    assert!(
        matches!(&error, EngineError::LoadInProgress { model } if model == "tiny") && error.is_retryable(),
        "{error}"
    );
    let error = engine.unload().await.unwrap_err();
    assert!(matches!(error, EngineError::LoadInProgress { .. }), "{error}");
    load.await.unwrap();
    let mut events = engine
        .stream_with_retry("Hi", GenerateParams::default())
        .await
        .unwrap();
    let mut text = String::new();
    while let Some(event) = events.next().await {
        if let GenerationEvent::Text { text: piece, .. } = event.unwrap() {
            text.push_str(&piece);
        }
    }
    assert_eq!(text, "Paris");
    let shown = format!("{engine:?}");
    assert!(shown.contains("Mock") && !shown.contains("Paris"), "{shown}");
}

#[tokio::test]
async fn limits_that_are_none_are_refused_by_their_names_and_changes_of_health_are_told() {
    use mlx_engine::{EngineHealth, HealthConfiguration, ResilienceConfiguration};

    let health = HealthConfiguration {
        window_s: -1.0,
        ..HealthConfiguration::default()
    };
    let error = InferenceEngine::new().with_health(health).unwrap_err();
    assert!(error.to_string().contains("`window_s`"), "{error}");
    let mut resilience = ResilienceConfiguration::default();
    resilience.breaker.failure_rate = 2.0;
    let error = InferenceEngine::new().with_resilience(resilience).unwrap_err();
    assert!(error.to_string().contains("`breaker.failure_rate`"), "{error}");

    let health = HealthConfiguration {
        max_consecutive_failures: 1,
        ..HealthConfiguration::default()
    };
    let script = MockScript::reply("Paris").with_fault(0, mlx_engine::MockFault::Device);
    let engine = mock(script).with_health(health).unwrap();
    engine.load_model("tiny").await.unwrap();
    assert_eq!(engine.health().status, EngineHealth::Degraded);
    let mut changes = engine.health_events();
    assert!(engine.generate("Hi", GenerateParams::default()).await.is_err());
    let change = changes.next().await.unwrap();
    assert_eq!(
        (change.from, change.to),
        (EngineHealth::Degraded, EngineHealth::Unhealthy)
    );
    assert!(!engine.detailed_status().engine.ready);
}

/// What the facade is made of, in other orders and each alone, over an engine that somebody else holds.
#[tokio::test]
async fn each_part_can_be_had_alone_over_any_engine() {
    use std::sync::Arc;

    use mlx_engine::monitor::Monitored;
    use mlx_engine::resilience::Resilient;
    use mlx_engine::{Engine, EngineConfig, EngineHealth, MockFault};

    let script = MockScript::reply("Paris")
        .with_fault(0, MockFault::Device)
        .with_fault(1, MockFault::Device);
    let engine = Engine::mock("tiny", script, EngineConfig::default())
        .await
        .unwrap();
    let engine: Arc<dyn LlmEngine> = Arc::new(engine);
    let params = GenerateParams::default;

    let resilient = Resilient::new(Arc::clone(&engine));
    let output = resilient
        .generate_with_retry(Prompt::user("Where?"), params())
        .await;
    assert_eq!(output.unwrap().text, "Paris");
    assert!(resilient.attempt_recovery().await.recovered);

    let monitored = Monitored::new(Arc::clone(&engine));
    monitored
        .generate(Prompt::user("Where?"), params())
        .await
        .unwrap();
    assert_eq!(monitored.metrics().total.finished.stop, 1);
    assert_eq!(monitored.check_health().await.status, EngineHealth::Degraded);

    // Seen from outside, a request that is tried again is one.
    let outside = Monitored::new(resilient);
    outside.generate(Prompt::user("Where?"), params()).await.unwrap();
    assert_eq!(outside.metrics().total.submitted, 1);
    // The facade is an engine like any other.
    let facade = Monitored::new(mock(MockScript::reply("Rome")));
    assert_eq!(facade.health().status, EngineHealth::Unhealthy);
    facade.engine().load_model("tiny").await.unwrap();
    let output = facade.generate(Prompt::user("Where?"), params()).await.unwrap();
    assert_eq!(output.text, "Rome");

    engine.unload().await.unwrap();
    for (backend, health) in [
        (monitored.backend(), monitored.health()),
        (outside.backend(), outside.health()),
    ] {
        assert_eq!((backend, health.status), (None, EngineHealth::Unhealthy));
    }
}
