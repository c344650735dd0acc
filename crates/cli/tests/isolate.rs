//! The engine in a process of its own, with real processes and real signals.
#![cfg(unix)]

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use futures::StreamExt;
use mlx_engine::prelude::*;
use mlx_engine::{
    ChildState, EngineConfig, EngineHealth, MockScript, Program, SupervisorConfiguration, UnloadMode,
};

fn program() -> Program {
    Program::new(assert_cmd::cargo::cargo_bin("mlx-engine")).arg("serve-engine")
}

fn signal(name: &str, process: u32) {
    let sent = Command::new("kill").args([name, &process.to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

/// An engine with one place, so that a second request waits.
fn one_at_a_time(supervisor: SupervisorConfiguration) -> InferenceEngine {
    let config = EngineConfig {
        max_batch: 1,
        ..EngineConfig::default()
    };
    InferenceEngine::new()
        .with_config(config)
        .with_child_process(program(), supervisor)
}

fn mock(supervisor: SupervisorConfiguration) -> InferenceEngine {
    let script = MockScript::default().with_step_delay(Duration::from_millis(1));
    one_at_a_time(supervisor)
        .with_backend(BackendChoice::Mock)
        .with_mock(script)
}

fn process(engine: &InferenceEngine) -> u32 {
    let status = engine.child_status().expect("it is apart");
    status.process_id.expect("it runs")
}

/// A request that has given text.
async fn running(engine: &InferenceEngine, params: GenerateParams) -> mlx_engine::EventStream {
    let prompt = Prompt::text("Once upon a time");
    let mut events = engine.stream(prompt, params).await.expect("it is taken");
    loop {
        let event = events.next().await.expect("an event").expect("no error");
        if let GenerationEvent::Text { .. } = event {
            return events;
        }
    }
}

async fn end(mut events: mlx_engine::EventStream) -> EngineError {
    loop {
        match events.next().await.expect("an end") {
            Ok(GenerationEvent::Finished(_)) => panic!("it was killed"),
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}

#[tokio::test]
async fn a_kill_costs_what_runs_and_recovery_brings_a_token() {
    let once = SupervisorConfiguration {
        max_restarts: 0,
        ..SupervisorConfiguration::default()
    };
    let engine = mock(once);
    engine.load_model("tiny").await.unwrap();
    assert_eq!(
        engine.health().status,
        EngineHealth::Degraded,
        "a mock is no model"
    );
    let victim = running(&engine, GenerateParams::default()).await;
    let before = process(&engine);
    signal("-KILL", before);
    let error = end(victim).await;
    assert!(matches!(error, EngineError::WorkerLost { .. }) && error.is_retryable());
    assert!(error.to_string().contains("signal: 9"), "{error}");
    let error = engine
        .generate(Prompt::text("x"), GenerateParams::default())
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::WorkerLost { .. }), "{error}");
    assert_eq!(engine.health().status, EngineHealth::Unhealthy);
    assert_eq!(engine.child_status().unwrap().state, ChildState::GivenUp);

    let report = engine.attempt_recovery().await;
    assert!(report.recovered, "{report:?}");
    assert_eq!(report.steps.len(), 1);
    assert_eq!(engine.health().status, EngineHealth::Degraded);
    let output = engine
        .generate(Prompt::text("back"), GenerateParams::default())
        .await
        .unwrap();
    assert_eq!(output.text, "back");
    assert_ne!(process(&engine), before);
}

#[tokio::test]
async fn an_unload_that_waits_lets_what_was_taken_be_answered() {
    let engine = mock(SupervisorConfiguration::default());
    engine.load_model("tiny").await.unwrap();
    let events = running(&engine, GenerateParams::default().with_max_tokens(30)).await;
    let waits = engine.stream(Prompt::text("the next one"), GenerateParams::default());
    let waits = waits.await.unwrap();
    // Nobody reads them meanwhile.
    engine.unload_with(UnloadMode::Drain).await.unwrap();
    assert_eq!(engine.backend(), None);
    let ends: Vec<_> = events.collect().await;
    assert!(
        matches!(ends.last(), Some(Ok(GenerationEvent::Finished(_)))),
        "{ends:?}"
    );
    assert_eq!(
        mlx_engine::collect_events(waits).await.unwrap().text,
        "the next one"
    );
    let late = engine
        .generate(Prompt::text("x"), GenerateParams::default())
        .await;
    assert!(matches!(late, Err(EngineError::NotLoaded { .. })), "{late:?}");
}

#[tokio::test]
async fn what_is_kept_is_looked_after_across_the_processes() {
    let engine = mock(SupervisorConfiguration::default());
    engine.load_model("tiny").await.unwrap();
    let prompt = Prompt::text("A long beginning that requests have in common");
    engine.pin_prefix(prompt.clone()).await.unwrap();
    let report = engine.prefix_cache().await.unwrap();
    assert!(
        report.entries.iter().any(|entry| entry.pinned) && report.bytes > 0,
        "{report:?}"
    );
    let output = engine
        .generate(prompt.clone(), GenerateParams::default())
        .await
        .unwrap();
    assert!(output.usage.cached_tokens > 0);
    assert!(engine.unpin_prefix(prompt.clone()).await.unwrap());
    assert!(!engine.unpin_prefix(prompt).await.unwrap());
    assert!(engine.clear_prefix_cache().await.unwrap() > 0);
    assert_eq!(engine.prefix_cache().await.unwrap().bytes, 0);
}

#[tokio::test]
async fn what_had_not_started_survives_a_kill() {
    let engine = mock(SupervisorConfiguration::default());
    engine.load_model("tiny").await.unwrap();
    let victim = running(&engine, GenerateParams::default()).await;
    let waits = engine
        .stream(Prompt::text("the next one"), GenerateParams::default())
        .await
        .unwrap();
    signal("-KILL", process(&engine));
    assert!(matches!(end(victim).await, EngineError::WorkerLost { .. }));
    assert_eq!(
        mlx_engine::collect_events(waits).await.unwrap().text,
        "the next one"
    );
    let status = engine.child_status().unwrap();
    assert_eq!((status.state, status.restarts), (ChildState::Ready, 1));
    let output = engine
        .generate_with_retry(Prompt::text("x"), GenerateParams::default())
        .await
        .unwrap();
    assert_eq!(output.text, "x");
    engine.unload().await.unwrap();
    assert!(engine.child_status().is_none() && engine.backend().is_none());
}

#[tokio::test]
async fn an_abort_in_the_process_is_an_error_here() {
    let engine = mock(SupervisorConfiguration::default());
    engine.load_model("tiny").await.unwrap();
    let victim = running(&engine, GenerateParams::default()).await;
    signal("-ABRT", process(&engine));
    let error = end(victim).await;
    assert!(error.to_string().contains("signal: 6"), "{error}");
    let output = engine
        .generate(Prompt::text("x"), GenerateParams::default())
        .await
        .unwrap();
    assert_eq!(output.text, "x");
}

#[tokio::test]
async fn a_program_that_is_no_engine_is_an_error_of_the_load() {
    for program in ["/no/such/program", "/bin/true"] {
        let engine = InferenceEngine::new()
            .with_backend(BackendChoice::Mock)
            .with_child_process(Program::new(program), SupervisorConfiguration::default());
        let error = engine.load_model("tiny").await.unwrap_err();
        assert!(
            matches!(error, EngineError::Device { .. } | EngineError::WorkerLost { .. }),
            "{program}: {error}"
        );
        assert_eq!(engine.health().status, EngineHealth::Unhealthy);
    }
}

#[test]
fn the_process_ends_with_the_program_however_that_ends() {
    let arguments = ["--model", "tiny", "--backend", "mock", "--isolate"];
    let mut program = Command::new(assert_cmd::cargo::cargo_bin("mlx-engine"))
        .arg("chat")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command runs");
    let stdin = program.stdin.as_mut().expect("a pipe");
    std::io::Write::write_all(stdin, b"hello\n").unwrap();
    // The first piece of the answer says that both processes are there.
    let mut first = [0_u8; 1];
    program
        .stdout
        .as_mut()
        .expect("a pipe")
        .read_exact(&mut first)
        .unwrap();
    signal("-KILL", program.id());
    program.wait().unwrap();
    // Both hold it open: this waits for the end of the engine's process.
    let mut rest = String::new();
    program
        .stderr
        .as_mut()
        .expect("a pipe")
        .read_to_string(&mut rest)
        .unwrap();
    assert!(!rest.contains("error"), "{rest}");
}

#[test]
fn by_hand_the_process_says_what_it_is_not_for() {
    let output = Command::new(assert_cmd::cargo::cargo_bin("mlx-engine"))
        .arg("serve-engine")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        err.contains("standard input is no connection to the program"),
        "{err}"
    );
}

/// With the real model.
#[cfg(feature = "mlx")]
mod model {
    use super::*;

    fn model() -> String {
        std::env::var("MLX_ENGINE_TEST_MODEL").expect("the tests are run by `cargo xtask test`")
    }

    fn greedy() -> GenerateParams {
        GenerateParams::default()
            .with_temperature(0.0)
            .with_max_tokens(16)
    }

    #[tokio::test]
    async fn the_real_model_gives_the_same_tokens_apart_and_after_a_kill() {
        let here = InferenceEngine::new();
        here.load_model(&model()).await.unwrap();
        let question = "What is the capital of France?";
        let expected = here
            .generate(question, greedy().with_logprobs(true))
            .await
            .unwrap();
        here.unload().await.unwrap();

        let engine = one_at_a_time(SupervisorConfiguration::default());
        engine.load_model(&model()).await.unwrap();
        assert_eq!(engine.health().status, EngineHealth::Healthy);
        assert!(engine.peak_memory_bytes().unwrap() > 0 && engine.load_seconds().unwrap() > 0.0);
        let output = engine
            .generate(question, greedy().with_logprobs(true))
            .await
            .unwrap();
        assert_eq!(
            (&output.text, &output.tokens, &output.logprobs),
            (&expected.text, &expected.tokens, &expected.logprobs)
        );
        assert_eq!(engine.score("one two").await.unwrap().tokens.len(), 2);

        let victim = running(&engine, greedy().with_max_tokens(4000).with_ignore_eos(true)).await;
        let waits = engine.stream(question, greedy()).await.unwrap();
        signal("-KILL", process(&engine));
        assert!(matches!(end(victim).await, EngineError::WorkerLost { .. }));
        assert_eq!(
            mlx_engine::collect_events(waits).await.unwrap().tokens,
            expected.tokens
        );
        assert_eq!(engine.check_health().await.status, EngineHealth::Healthy);
    }

    #[tokio::test]
    async fn a_model_that_does_not_load_apart_is_the_same_error() {
        let folder = tempfile::tempdir().unwrap();
        let broken = folder.path().join("broken.gguf");
        std::fs::write(&broken, b"GGUF").unwrap();
        let fails =
            async |engine: InferenceEngine| engine.load_model(broken.to_str().unwrap()).await.unwrap_err();
        let here = fails(InferenceEngine::new()).await;
        let apart = fails(one_at_a_time(SupervisorConfiguration::default())).await;
        assert!(matches!(apart, EngineError::ModelLoad { .. }), "{apart}");
        let chain = |error: &EngineError| {
            let first: &(dyn std::error::Error + 'static) = error;
            std::iter::successors(Some(first), |error| (*error).source())
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(chain(&here), chain(&apart));
    }
}
