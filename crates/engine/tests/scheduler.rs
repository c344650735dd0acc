//! The life of a request, driven by the mock.

use std::time::Duration;

use futures::StreamExt;
use mlx_engine_core::{
    Backend, EngineError, EventStream, FinishReason, GenerateParams, GenerationEvent, LlmEngine, Prompt,
};
use mlx_engine_engine::{Engine, EngineConfig, MockFault, MockScript, PrefixCacheConfig};
use proptest::prelude::*;

async fn mock(script: MockScript) -> Engine {
    Engine::mock("tiny", script, EngineConfig::default())
        .await
        .expect("the mock loads")
}

async fn error(engine: &Engine, prompt: Prompt, params: GenerateParams) -> EngineError {
    engine.generate(prompt, params).await.expect_err("it is refused")
}

fn params() -> GenerateParams {
    GenerateParams::default()
}

/// The events of a stream to its end.
async fn events(mut stream: EventStream) -> Vec<Result<GenerationEvent, EngineError>> {
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    events
}

#[tokio::test]
async fn an_answer_names_the_mock_and_counts_its_tokens() {
    let engine = mock(MockScript::reply("Grüße")).await;
    let output = engine.generate(Prompt::text("Hi"), params()).await.unwrap();
    assert_eq!(
        (output.text.as_str(), output.backend, output.model.as_str()),
        ("Grüße", Backend::Mock, "tiny")
    );
    assert_eq!(output.finish_reason, FinishReason::Stop);
    // Seven bytes and the end.
    assert_eq!(
        (output.usage.prompt_tokens, output.usage.completion_tokens),
        (2, 8)
    );
    assert_eq!(output.tokens.len(), 8);
    assert!(output.timings.ttft_s > 0.0 && output.timings.load_s > 0.0);
    assert_eq!(
        (engine.backend(), engine.model().unwrap().id.as_str()),
        (Some(Backend::Mock), "tiny")
    );
}

#[tokio::test]
async fn a_stream_begins_and_ends_once_and_never_splits_a_character() {
    let engine = mock(MockScript::reply("aß🦀")).await;
    let stream = engine.stream(Prompt::text("Hi"), params()).await.unwrap();
    let events: Vec<GenerationEvent> = events(stream).await.into_iter().map(Result::unwrap).collect();
    let pieces: Vec<&str> = events
        .iter()
        .filter_map(|event| {
            if let GenerationEvent::Text { text, .. } = event {
                Some(text.as_str())
            } else {
                None
            }
        })
        .collect();
    assert_eq!(pieces, ["a", "ß", "🦀", ""]);
    assert!(matches!(
        events[0],
        GenerationEvent::Started {
            prompt_tokens: 2,
            cached_tokens: 0
        }
    ));
    assert!(matches!(events.last(), Some(GenerationEvent::Finished(_))));
    assert_eq!(events.len(), 6);
}

#[tokio::test]
async fn an_answer_ends_where_the_parameters_say() {
    let engine = mock(MockScript::reply("one two three")).await;
    let run = |params| engine.generate(Prompt::text("Hi"), params);
    let output = run(params().with_max_tokens(5)).await.unwrap();
    assert_eq!(
        (output.text.as_str(), output.finish_reason),
        ("one t", FinishReason::Length)
    );
    assert_eq!(output.usage.completion_tokens, 5);
    let output = run(params().with_stop(["two", "e t"])).await.unwrap();
    assert_eq!(
        (output.text.as_str(), output.finish_reason),
        ("on", FinishReason::Stop)
    );
    let output = run(params().with_stop_tokens([u32::from(b'w')])).await.unwrap();
    assert_eq!(
        (output.text.as_str(), output.finish_reason),
        ("one t", FinishReason::Stop)
    );
    let output = run(params().with_ignore_eos(true).with_max_tokens(20))
        .await
        .unwrap();
    assert_eq!(
        (output.text.as_str(), output.usage.completion_tokens),
        ("one two three", 20)
    );
}

#[tokio::test]
async fn an_answer_ends_at_the_end_of_the_context() {
    let engine = mock(MockScript::reply("a long answer").with_context_length(10)).await;
    let output = engine.generate(Prompt::text("12345678"), params()).await.unwrap();
    assert_eq!(
        (output.text.as_str(), output.finish_reason),
        ("a ", FinishReason::Length)
    );
    let error = error(&engine, Prompt::text("1234567890"), params()).await;
    assert_eq!(
        error.to_string(),
        "prompt of 10 tokens does not fit the context of 10"
    );
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_said_before_it_runs() {
    let engine = mock(MockScript::default()).await;
    let refused = error(&engine, Prompt::text("Hi"), params().with_top_p(2.0)).await;
    assert_eq!(
        refused.to_string(),
        "invalid parameter: `top_p` is 2, allowed: above 0 and at most 1"
    );
    assert_eq!(
        error(&engine, Prompt::text(""), params()).await.to_string(),
        "prompt is empty"
    );
    assert_eq!(
        error(&engine, Prompt::chat([]), params()).await.to_string(),
        "prompt is empty"
    );
    let refused = error(&engine, Prompt::text("Hi"), params().with_logprobs(true)).await;
    assert_eq!(
        refused.to_string(),
        "unsupported: the mock has no probabilities to report"
    );
    let refused = engine.score("Hi").await.unwrap_err();
    assert!(
        refused.to_string().contains("the mock has no probabilities"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_fault_is_the_requests_own() {
    for (fault, expect) in [
        (MockFault::Device, "device failed: scripted fault"),
        (MockFault::OutOfMemory, "device is out of memory"),
        (MockFault::Panic, "engine worker panicked: scripted panic"),
    ] {
        let engine = mock(MockScript::default().with_fault(9, fault)).await;
        // The long one reaches its tenth token, the short one does not.
        let (long, short) = tokio::join!(
            engine.generate(Prompt::text("a long prompt"), params()),
            engine.generate(Prompt::text("short"), params()),
        );
        assert_eq!(long.unwrap_err().to_string(), expect);
        assert_eq!(short.unwrap().text, "short");
        let again = engine
            .generate(Prompt::text("a long prompt"), params())
            .await
            .unwrap();
        assert_eq!(again.text, "a long prompt");
    }
}

#[tokio::test]
async fn requests_run_at_the_same_time_and_keep_apart() {
    let engine = mock(MockScript::default()).await;
    let prompts: Vec<String> = (0..40).map(|i| format!("request number {i}")).collect();
    let runs = prompts
        .iter()
        .map(|prompt| engine.generate(Prompt::text(prompt.clone()), params()));
    for (output, prompt) in futures::future::join_all(runs).await.into_iter().zip(&prompts) {
        assert_eq!(&output.unwrap().text, prompt);
    }
}

#[tokio::test]
async fn a_full_queue_refuses_and_says_when_to_come_again() {
    let config = EngineConfig {
        max_queue: 1,
        max_batch: 1,
        ..EngineConfig::default()
    };
    let script = MockScript::default().with_step_delay(Duration::from_millis(5));
    let engine = Engine::mock("tiny", script, config).await.unwrap();
    let endless = params().with_ignore_eos(true).with_max_tokens(4000);
    let mut running = engine.stream(Prompt::text("first"), endless).await.unwrap();
    running.next().await.unwrap().unwrap();
    let waiting = engine.stream(Prompt::text("second"), params()).await.unwrap();
    let Err(refused) = engine.stream(Prompt::text("third"), params()).await else {
        panic!("the queue is full")
    };
    assert!(matches!(refused, EngineError::QueueFull { .. }) && refused.retry_after().is_some());
    drop(running);
    assert!(events(waiting).await.last().unwrap().is_ok());
}

#[tokio::test]
async fn a_dropped_stream_makes_room_at_once() {
    let config = EngineConfig {
        max_batch: 1,
        ..EngineConfig::default()
    };
    let script = MockScript::default().with_step_delay(Duration::from_millis(5));
    let engine = Engine::mock("tiny", script, config).await.unwrap();
    let endless = params().with_ignore_eos(true).with_max_tokens(4000);
    let mut stream = engine.stream(Prompt::text("endless"), endless).await.unwrap();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    let output = engine.generate(Prompt::text("next"), params()).await.unwrap();
    assert_eq!(output.text, "next");
}

#[tokio::test]
async fn a_request_that_begins_alike_takes_over_what_was_computed() {
    let engine = mock(MockScript::reply("ok")).await;
    let cached = |text: &str| {
        let run = engine.generate(Prompt::text(text), params());
        async move { run.await.unwrap().usage.cached_tokens }
    };
    assert_eq!(cached("the beginning").await, 0);
    assert_eq!(cached("the beginning and more").await, 13);
    assert_eq!(cached("something else").await, 0);
}

#[tokio::test]
async fn unloading_ends_what_runs_and_what_comes_after_says_so() {
    let engine = mock(MockScript::default().with_step_delay(Duration::from_millis(5))).await;
    let endless = params().with_ignore_eos(true).with_max_tokens(4000);
    let stream = engine.stream(Prompt::text("endless"), endless).await.unwrap();
    engine.unload().await.unwrap();
    let last = events(stream).await.pop().unwrap().unwrap_err();
    assert_eq!(last.to_string(), "model `tiny` is not loaded");
    let refused = error(&engine, Prompt::text("Hi"), params()).await;
    assert_eq!(refused.to_string(), "model `tiny` is not loaded");
    assert!(matches!(
        engine.score("Hi").await,
        Err(EngineError::NotLoaded { .. })
    ));
    assert_eq!((engine.backend(), engine.model()), (None, None));
    engine.unload().await.unwrap();
}

#[tokio::test]
async fn a_load_that_fails_says_why() {
    let script = MockScript::default().with_load_failure("no such weights");
    let Err(refused) = Engine::mock("tiny", script, EngineConfig::default()).await else {
        panic!("it fails")
    };
    assert_eq!(refused.to_string(), "model `mock` could not be loaded");
    assert_eq!(
        std::error::Error::source(&refused).unwrap().to_string(),
        "no such weights"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Every request ends exactly once, with its own text or cancelled, whatever the others do.
    #[test]
    fn every_request_ends_exactly_once(
        requests in prop::collection::vec(("[a-z ]{1,30}", 1u32..40, prop::option::of(0usize..6)), 1..12),
        max_batch in 1usize..5,
        prefill_chunk in 1usize..16,
        max_bytes in prop::sample::select(vec![0, 60, 1 << 20]),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let config = EngineConfig {
                max_batch,
                prefill_chunk: Some(prefill_chunk),
                prefix_cache: PrefixCacheConfig::of(max_bytes),
                ..EngineConfig::default()
            };
            let engine = Engine::mock("tiny", MockScript::default(), config).await.unwrap();
            let runs = requests.iter().map(|(text, max_tokens, cancel_after)| {
                let stream = engine.stream(Prompt::text(text.clone()), params().with_max_tokens(*max_tokens));
                async move {
                    let mut stream = stream.await.unwrap();
                    let (mut said, mut ends) = (String::new(), 0);
                    for _ in 0..cancel_after.unwrap_or(usize::MAX) {
                        match stream.next().await {
                            Some(Ok(GenerationEvent::Text { text, .. })) => said.push_str(&text),
                            Some(Ok(GenerationEvent::Finished(_))) => ends += 1,
                            Some(event) => drop(event.unwrap()),
                            None => break,
                        }
                    }
                    let expected: String = text.chars().take(*max_tokens as usize).collect();
                    match cancel_after {
                        Some(_) => assert!(expected.starts_with(&said)),
                        None => assert_eq!((said, ends), (expected, 1)),
                    }
                }
            });
            futures::future::join_all(runs).await;
            // Nothing that was cancelled holds a place.
            let output = engine.generate(Prompt::text("last"), params()).await.unwrap();
            assert_eq!(output.text, "last");
        });
    }
}

/// Also that what may come is found out before the logits are waited for: the worker asserts it of each of them.
#[tokio::test]
#[cfg(feature = "grammar")]
async fn constrained_and_free_requests_share_a_batch() {
    use mlx_engine_core::OutputConstraint;

    let engine = mock(MockScript::reply("42 Paris")).await;
    let digits = params().with_constraint(OutputConstraint::Regex("[0-9]{2}".into()));
    let word = params().with_constraint(OutputConstraint::Regex("z+y".into()));
    let (free, digits, word) = futures::join!(
        engine.generate(Prompt::text("a"), params()),
        engine.generate(Prompt::text("b"), digits),
        engine.generate(Prompt::text("c"), word.with_max_tokens(3)),
    );
    assert_eq!(free.unwrap().text, "42 Paris");
    let digits = digits.unwrap();
    assert_eq!(
        (digits.text.as_str(), digits.finish_reason),
        ("42", FinishReason::Stop)
    );
    // What the script says may not come: the first byte that may is the mock's then, and y is before z.
    assert_eq!(word.unwrap().text, "zy");
    let refused = params().with_constraint(OutputConstraint::Regex("(".into()));
    let error = error(&engine, Prompt::text("d"), refused).await;
    assert!(error.to_string().contains("output constraint refused"), "{error}");
}

#[tokio::test]
async fn memory_is_asked_for_before_it_is_used() {
    let config = EngineConfig {
        memory_limit: Some(1000),
        max_batch: 8,
        ..EngineConfig::default()
    };
    let script = MockScript::reply("Paris").with_bytes_per_token(10);
    let engine = Engine::mock("tiny", script, config).await.unwrap();
    // A prompt of 2 tokens and an answer of 98 are all that there is.
    let fits = params().with_max_tokens(98);
    let found = error(&engine, Prompt::text("Hi"), params().with_max_tokens(99)).await;
    let EngineError::InsufficientMemory { required, available } = found else {
        panic!("{found}")
    };
    assert_eq!((required, available), (1010, 1000));
    // Those that do not fit beside each other come one after the other, and what is kept makes room.
    let requests = (0..20).map(|_| engine.generate(Prompt::text("Hi"), fits.clone()));
    for output in futures::future::join_all(requests).await {
        assert_eq!(output.unwrap().text, "Paris");
    }
    // One that waits is given up with its stream, or with the engine.
    let running = engine.stream(Prompt::text("Hi"), fits.clone()).await.unwrap();
    let waiting = engine.stream(Prompt::text("Hi"), fits.clone()).await.unwrap();
    let last = engine.stream(Prompt::text("Hi"), fits).await.unwrap();
    drop(waiting);
    assert!(events(running).await.last().unwrap().is_ok());
    assert!(events(last).await.last().unwrap().is_ok());
}

#[tokio::test]
async fn a_request_has_the_time_that_it_was_given() {
    let slow = async |max_batch| {
        let config = EngineConfig {
            max_batch,
            ..EngineConfig::default()
        };
        let script = MockScript::default().with_step_delay(Duration::from_millis(2));
        Engine::mock("tiny", script, config).await.unwrap()
    };
    let endless = || params().with_ignore_eos(true).with_max_tokens(4000);
    let late = async |engine: &Engine, params, milliseconds| {
        let error = error(engine, Prompt::text("late"), params).await;
        let limit = Duration::from_millis(milliseconds);
        assert!(
            matches!(error, EngineError::DeadlineExceeded { limit: found } if found == limit),
            "{error}"
        );
    };
    late(&slow(16).await, endless().with_timeout_s(0.02), 20).await;
    let engine = slow(1).await;
    let running = engine.stream(Prompt::text("endless"), endless()).await.unwrap();
    late(&engine, params().with_queue_timeout_s(0.01), 10).await;
    drop(running);
    let output = engine
        .generate(Prompt::text("runs"), params().with_queue_timeout_s(60.0))
        .await
        .unwrap();
    assert_eq!(output.text, "runs");
}

#[tokio::test]
async fn a_shorter_context_than_the_models_is_kept_to() {
    let config = EngineConfig {
        context_length: Some(10),
        ..EngineConfig::default()
    };
    let engine = Engine::mock("tiny", MockScript::reply("a long answer"), config)
        .await
        .unwrap();
    assert_eq!(engine.model().unwrap().context_length, 10);
    let output = engine.generate(Prompt::text("12345678"), params()).await.unwrap();
    assert_eq!(
        (output.text.as_str(), output.finish_reason),
        ("a ", FinishReason::Length)
    );
    let error = error(&engine, Prompt::text("1234567890"), params()).await;
    assert!(
        matches!(
            error,
            EngineError::PromptTooLong {
                context_length: 10,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn what_steps_take_is_measured_and_admission_corrected() {
    let config = EngineConfig {
        memory_limit: Some(1000),
        ..EngineConfig::default()
    };
    let script = MockScript::reply("ok")
        .with_bytes_per_token(10)
        .with_workspace(200, 500);
    let engine = Engine::mock("tiny", script, config).await.unwrap();
    let available = async |engine: &Engine| {
        let found = error(engine, Prompt::text("Hi"), params().with_max_tokens(4000)).await;
        let EngineError::InsufficientMemory { available, .. } = found else {
            panic!("{found}")
        };
        available
    };
    assert_eq!(available(&engine).await, 800);
    engine
        .generate(Prompt::text("Hi"), params().with_max_tokens(4))
        .await
        .unwrap();
    assert_eq!(available(&engine).await, 500);
}

/// What an engine says that it works by is what it works by.
#[tokio::test]
async fn a_configuration_that_was_changed_is_told() {
    let loaded = EngineConfig {
        threads: Some(2),
        ..EngineConfig::default()
    };
    let engine = Engine::mock("echo", MockScript::default(), loaded.clone())
        .await
        .unwrap();
    assert_eq!(engine.config(), loaded);
    let changed = EngineConfig {
        max_batch: 3,
        prefill_chunk: Some(64),
        ..loaded
    };
    engine.reconfigure(changed.clone()).await.unwrap();
    assert_eq!(engine.config(), changed);
    let refused = EngineConfig {
        threads: Some(3),
        ..changed.clone()
    };
    let error = engine.reconfigure(refused).await.unwrap_err();
    assert!(matches!(error, EngineError::InvalidParameter(_)), "{error}");
    assert_eq!(engine.config(), changed, "nothing of it is taken");
}

/// A bias for a token that there is not would do nothing, and is refused.
#[tokio::test]
async fn a_bias_is_for_a_token_that_there_is() {
    let engine = mock(MockScript::reply("a")).await;
    let biased = |token| params().with_logit_bias([(token, 1.0)]);
    let output = engine.generate(Prompt::text("Hi"), biased(256)).await.unwrap();
    assert_eq!(output.text, "a");
    let refused = error(&engine, Prompt::text("Hi"), biased(257)).await;
    assert_eq!(
        refused.to_string(),
        "invalid parameter: `logit_bias` is 257, allowed: tokens of the model's vocabulary"
    );
}
