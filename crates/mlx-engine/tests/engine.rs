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
