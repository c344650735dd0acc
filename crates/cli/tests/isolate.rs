//! The engine in a process of its own, with real processes and real signals.
#![cfg(unix)]

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use futures::StreamExt;
use mlx_engine::prelude::*;
use mlx_engine::{
    ChildState, EngineConfig, EngineHealth, HealthConfiguration, MockScript, Program, RecoveryStep,
    SupervisorConfiguration, UnloadMode,
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

/// How health is while nothing is wrong: a mock is no model.
fn well(engine: &InferenceEngine) -> EngineHealth {
    match engine.backend() {
        Some(Backend::Mlx) => EngineHealth::Healthy,
        _ => EngineHealth::Degraded,
    }
}

/// Kills the engine's process with an answer running and another request behind it, and brings the engine back. With
/// `restarts` the process is started again by itself.
async fn killed(engine: InferenceEngine, model: &str, with: &str, restarts: bool) {
    let context = format!("{model} {with} restarts {restarts}");
    let health = HealthConfiguration {
        max_consecutive_failures: 1,
        ..HealthConfiguration::default()
    };
    let engine = engine.with_health(health).expect("valid");
    engine.load_model(model).await.expect("it loads");
    let (well, before) = (well(&engine), process(&engine));
    let neighbour = async || {
        let params = GenerateParams::default()
            .with_temperature(0.0)
            .with_max_tokens(12);
        engine.stream(Prompt::text("the next one"), params).await
    };
    let tokens = async |events| {
        mlx_engine::collect_events(events)
            .await
            .map(|output| output.tokens)
    };
    let answered = async || {
        tokens(neighbour().await.expect("it is taken"))
            .await
            .expect("an answer")
    };
    let expected = answered().await;
    assert_eq!(engine.health().status, well, "{context}");

    let mut changes = engine.health_events();
    let long = GenerateParams::default()
        .with_max_tokens(2000)
        .with_ignore_eos(true);
    let victim = running(&engine, long).await;
    let behind = neighbour().await.expect("it is taken");
    signal(with, before);
    let error = end(victim).await;
    assert!(
        matches!(error, EngineError::WorkerLost { .. }) && error.is_retryable(),
        "{context}: {error}"
    );
    let number = if with == "-KILL" { "signal: 9" } else { "signal: 6" };
    assert!(error.to_string().contains(number), "{context}: {error}");
    let change = changes.next().await.expect("health changed");
    assert_eq!(
        (change.from, change.to),
        (well, EngineHealth::Unhealthy),
        "{context}"
    );

    let behind = tokens(behind).await;
    let report = if restarts {
        // It had not started, and goes to the next process.
        assert_eq!(behind.expect("an answer"), expected, "{context}");
        engine.attempt_recovery().await
    } else {
        assert!(
            matches!(behind, Err(EngineError::WorkerLost { .. })),
            "{context}: {behind:?}"
        );
        assert_eq!(engine.health().status, EngineHealth::Unhealthy, "{context}");
        assert_eq!(
            engine.child_status().expect("it is apart").state,
            ChildState::GivenUp
        );
        engine.attempt_recovery().await
    };
    let steps: Vec<_> = report.steps.iter().map(|step| step.step).collect();
    let expected_steps: &[_] = if restarts {
        &[]
    } else {
        &[RecoveryStep::RestartWorker]
    };
    assert!(
        report.recovered && steps == expected_steps,
        "{context}: {report:?}"
    );
    assert_eq!(answered().await, expected, "{context}");
    assert_eq!(engine.health().status, well, "{context}");
    assert_ne!(process(&engine), before);
    let status = engine.child_status().expect("it is apart");
    assert_eq!((status.state, status.restarts), (ChildState::Ready, 1));
    engine.unload().await.expect("it ends");
    assert!(engine.child_status().is_none() && engine.backend().is_none());
}

/// The rows of the table of faults (`crates/engine/src/faults/suite.rs`) that need a process: by an abort in a driver, and by a
/// kill of the system.
#[tokio::test]
async fn a_process_that_is_killed_is_told_survived_and_recovered_from() {
    for with in ["-KILL", "-ABRT"] {
        for restarts in [true, false] {
            killed(mock(supervisor(restarts)), "tiny", with, restarts).await;
            #[cfg(feature = "mlx")]
            killed(
                one_at_a_time(supervisor(restarts)),
                &model::model(),
                with,
                restarts,
            )
            .await;
        }
    }
}

/// A process that does nothing any more, with an engine that had nothing to do: no turn of it takes too long.
#[tokio::test]
async fn a_process_that_is_stopped_is_found_and_replaced() {
    let engine = mock(SupervisorConfiguration {
        standstill_limit: Duration::from_secs(2),
        ..SupervisorConfiguration::default()
    });
    engine.load_model("tiny").await.unwrap();
    let answer = async || {
        let output = engine
            .generate(Prompt::text("x"), GenerateParams::default())
            .await;
        output.map(|output| output.text)
    };
    let expected = answer().await.unwrap();
    signal("-STOP", process(&engine));
    // It goes to the next process, as it had not started.
    assert_eq!(answer().await.unwrap(), expected);
    let status = engine.child_status().unwrap();
    let how = status.last_end.unwrap_or_default();
    assert!(status.restarts == 1 && how.contains("it stood still"), "{how}");
}

fn supervisor(restarts: bool) -> SupervisorConfiguration {
    SupervisorConfiguration {
        max_restarts: if restarts { 5 } else { 0 },
        ..SupervisorConfiguration::default()
    }
}

#[tokio::test]
async fn what_only_this_process_could_have_is_refused_with_what_to_do() {
    let engine = mock(SupervisorConfiguration::default());
    engine.load_model("tiny").await.unwrap();
    let error = engine.engine().unwrap_err();
    assert!(
        matches!(error, EngineError::Unsupported { .. }) && !error.is_retryable(),
        "{error:?}"
    );
    assert!(
        error
            .hint()
            .is_some_and(|hint| hint.contains("with_child_process")),
        "{error:?}"
    );
    // What the mock cannot do is the same error from there.
    let error = engine.score("one two").await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Unsupported { message, .. } if message.contains("no probabilities")),
        "{error:?}"
    );
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

    pub(super) fn model() -> String {
        std::env::var("MLX_ENGINE_TEST_MODEL").expect("the tests are run by `cargo xtask test`")
    }

    fn greedy() -> GenerateParams {
        GenerateParams::default()
            .with_temperature(0.0)
            .with_max_tokens(16)
    }

    #[tokio::test]
    async fn the_real_model_gives_the_same_tokens_apart() {
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
    }

    /// What the system says of a process's resident memory.
    #[cfg(target_os = "linux")]
    fn resident_bytes(process: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
        kilobytes
            .expect("a number")
            .trim()
            .parse::<u64>()
            .expect("a number")
            * 1024
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_memory_that_is_told_is_that_of_the_process_with_the_model() {
        let engine = one_at_a_time(SupervisorConfiguration::default());
        engine.load_model(&model()).await.unwrap();
        engine
            .generate("What is the capital of France?", greedy())
            .await
            .unwrap();
        let there = resident_bytes(&process(&engine).to_string());
        let told = engine.performance_metrics().process_memory_bytes.unwrap();
        // It was read a moment before.
        assert!(told.abs_diff(there) < there / 4, "{told} {there}");
        let here = resident_bytes("self");
        assert!(here < told - told / 4, "the weights are not here: {here} {told}");
        // So a limit is one for that process.
        let health = HealthConfiguration {
            process_memory_limit_bytes: Some(told - told / 4),
            ..HealthConfiguration::default()
        };
        let engine = engine.with_health(health).unwrap();
        assert_eq!(engine.health().status, EngineHealth::Degraded);
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
