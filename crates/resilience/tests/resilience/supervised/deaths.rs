//! What a death costs, and who comes after.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
use mlx_engine_monitor::{EngineHealth, Monitored};
use mlx_engine_resilience::{
    ChildState, Launch, Process, Recover, RecoveryStep, ResilienceConfiguration, Resilient, Supervised,
    SupervisorConfiguration,
};
use serde_json::{Value, json};

use super::{World, ask, quick, running, start, start_as};

#[tokio::test]
async fn a_death_costs_what_runs_and_nothing_that_waits() {
    let world = World::default();
    let engine = Arc::new(start(&world).await);
    let mut victim = running(&engine, "forever").await;
    let waits = Arc::clone(&engine);
    let waits = tokio::spawn(async move { ask(&waits, "unless first").await });
    // Its frame is behind that of the one that waits.
    assert_eq!(ask(&engine, "neighbour").await.unwrap(), "neighbour");
    world.kill();
    let error = victim.next().await.unwrap().unwrap_err();
    assert!(
        matches!(error, EngineError::WorkerLost { .. }) && error.is_retryable(),
        "{error}"
    );
    assert!(victim.next().await.is_none());
    assert_eq!(waits.await.unwrap().unwrap(), "unless first");
    assert_eq!(ask(&engine, "after").await.unwrap(), "after");
    let status = engine.status();
    assert_eq!((status.state, status.restarts), (ChildState::Ready, 1));
    assert_eq!(status.last_end.as_deref(), Some("thread ended: true"));
    assert_eq!(engine.details(), Some(json!({"launch": 1})));
}

#[tokio::test]
async fn a_request_that_kills_every_process_is_given_up() {
    let world = World::default();
    let engine = Arc::new(start(&world).await);
    let waits = Arc::clone(&engine);
    let poison = tokio::spawn(async move { ask(&waits, "never").await });
    for launch in 0..2 {
        // Once a process has answered a later one, it has the poison too.
        while engine.details() != Some(json!({"launch": launch})) || ask(&engine, "x").await.is_err() {
            tokio::task::yield_now().await;
        }
        world.kill();
    }
    assert!(matches!(
        poison.await.unwrap(),
        Err(EngineError::WorkerLost { .. })
    ));
    assert_eq!(ask(&engine, "after").await.unwrap(), "after");
}

#[tokio::test]
async fn a_model_that_does_not_load_is_an_error_and_no_loop() {
    let world = World {
        fails_from: Some(0),
        ..World::default()
    };
    let started = Supervised::start(world.clone(), json!({"why": "no such file"}), quick(), None).await;
    let error = started.err().unwrap();
    assert!(
        matches!(&error, EngineError::ModelLoad { source, .. } if source.to_string() == "no such file"),
        "{error:?}"
    );
    assert_eq!(world.launches.load(Ordering::SeqCst), 1);
    let wrong = SupervisorConfiguration {
        exit_limit: Duration::ZERO,
        ..quick()
    };
    let started = Supervised::start(world.clone(), Value::Null, wrong, None).await;
    assert!(matches!(started, Err(EngineError::InvalidParameter(_))));
}

#[tokio::test]
async fn too_many_deaths_end_it_and_recovery_brings_it_back() {
    let world = World::default();
    let configuration = SupervisorConfiguration {
        max_restarts: 0,
        ..quick()
    };
    let engine = start_as(&world, configuration).await;
    let engine = Resilient::builder(Monitored::new(engine))
        .recoverable()
        .build()
        .unwrap();
    let health = || engine.engine().health().status;
    ask(&engine, "before").await.unwrap();
    assert_eq!(health(), EngineHealth::Healthy);
    let mut victim = running(&engine, "forever").await;
    world.kill();
    assert!(victim.next().await.unwrap().is_err());
    let error = ask(&engine, "lost").await.unwrap_err();
    assert!(matches!(error, EngineError::WorkerLost { .. }), "{error}");
    assert_eq!(health(), EngineHealth::Unhealthy);
    assert_eq!(engine.engine().engine().status().state, ChildState::GivenUp);

    let report = engine.attempt_recovery().await;
    assert!(report.recovered, "{report:?}");
    assert_eq!(
        report.steps.iter().map(|step| step.step).collect::<Vec<_>>(),
        [RecoveryStep::RestartWorker]
    );
    assert_eq!(health(), EngineHealth::Healthy);
    assert_eq!(ask(&engine, "after").await.unwrap(), "after");
    assert_eq!(engine.engine().engine().status().restarts, 1);
}

#[tokio::test]
async fn a_process_that_cannot_load_any_more_is_given_up_with_its_error() {
    let world = World {
        fails_from: Some(1),
        ..World::default()
    };
    let engine = start(&world).await;
    let error = engine.restart().await.unwrap_err();
    assert!(matches!(error, EngineError::ModelLoad { .. }), "{error}");
    assert_eq!(
        world.launches.load(Ordering::SeqCst),
        7,
        "one by hand, five by the policy, and the first"
    );
    assert!(matches!(
        ask(&engine, "x").await,
        Err(EngineError::ModelLoad { .. })
    ));
    assert_eq!(
        (engine.backend(), engine.status().state),
        (None, ChildState::GivenUp)
    );
}

#[tokio::test]
async fn a_process_that_hangs_is_found_and_replaced() {
    let world = World::default();
    let configuration = SupervisorConfiguration {
        silence_limit: Some(Duration::from_secs(1)),
        ..quick()
    };
    let engine = start_as(&world, configuration).await;
    let error = ask(&engine, "forever").await.unwrap_err();
    assert!(error.to_string().contains("it hung: nothing came for"), "{error}");
    assert_eq!(ask(&engine, "after").await.unwrap(), "after");
    assert_eq!(engine.status().restarts, 1);
}

#[tokio::test]
async fn an_engine_that_hangs_in_its_process_is_found_and_its_process_replaced() {
    let world = World::default();
    let mut configuration = ResilienceConfiguration::default();
    configuration.recovery.hang_limit = Some(Duration::from_secs(1));
    let engine = Resilient::builder(Monitored::new(start(&world).await))
        .recoverable()
        .configuration(configuration)
        .build()
        .unwrap();
    // It would wait for ever where the process told nothing of its turn while it hangs.
    let error = ask(&engine, "forever").await.unwrap_err();
    assert!(
        matches!(error, EngineError::Unavailable { .. }) && error.is_retryable(),
        "{error}"
    );
    assert_eq!(ask(&engine, "after").await.unwrap(), "after");
    let report = engine.status().last_recovery.expect("it was recovered");
    assert!(report.automatic && report.recovered, "{report:?}");
    assert_eq!(engine.engine().engine().status().restarts, 1);
}

#[tokio::test]
async fn what_a_process_says_of_its_engine_is_of_now() {
    let engine = start(&World::default()).await;
    let statistics = || engine.statistics().expect("it is told");
    let first = statistics();
    assert_eq!((first.running, first.turn_s), (0, None));
    assert!(first.process_memory_bytes > Some(4096) || !cfg!(target_os = "linux"));
    let events = running(&engine, "forever").await;
    while statistics().running == 0 {
        tokio::task::yield_now().await;
    }
    let turn = statistics().turn_s;
    assert!(turn.is_some());
    // Also between two of its reports.
    while statistics().turn_s <= turn {
        tokio::task::yield_now().await;
    }
    drop(events);
    while statistics().running > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(statistics().load, first.load);
    engine.restart().await.unwrap();
    assert!(
        statistics().load > first.load,
        "it was loaded again, whatever it says of itself"
    );
}

/// A process that says what it is told, word for word, and then nothing until it is killed.
struct Raw(Vec<u8>);

impl Launch for Raw {
    fn launch(&mut self, mut connection: UnixStream) -> io::Result<Box<dyn Process>> {
        connection.write_all(&self.0)?;
        Ok(Box::new(Silent(Some(connection))))
    }
}

/// What has said all that it says. The connection ends when it is killed.
struct Silent(Option<UnixStream>);

impl Process for Silent {
    fn id(&self) -> Option<u32> {
        Some(7)
    }

    fn kill(&mut self) -> io::Result<()> {
        self.0 = None;
        Err(io::Error::other("told to fail"))
    }

    fn wait(&mut self) -> io::Result<String> {
        Err(io::Error::other("no such child"))
    }
}

fn frame(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

const READY: &str = r#"{"ready":{"backend":"mlx","model":null,"details":null,"statistics":null}}"#;

#[tokio::test]
async fn a_process_that_speaks_another_language_or_says_nothing_is_an_error_of_the_start() {
    for (said, expected) in [
        (
            frame("hello"),
            "it said what cannot be read: frame is not of the protocol",
        ),
        (
            vec![255; 4],
            "it said what cannot be read: frame of 4294967295 bytes",
        ),
        (Vec::new(), "it hung: nothing came for"),
    ] {
        let mut configuration = quick();
        // What is said has to be read, however busy the machine is.
        if said.is_empty() {
            configuration.start_limit = Duration::from_millis(40);
        }
        let started = Supervised::start(Raw(said), Value::Null, configuration, None).await;
        let error = started.err().unwrap();
        assert!(
            matches!(&error, EngineError::WorkerLost { message } if message.contains(expected)),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_process_that_does_not_end_when_it_is_asked_to_is_killed() {
    let impatient = SupervisorConfiguration {
        exit_limit: Duration::from_millis(1),
        ..quick()
    };
    let engine = Supervised::start(Raw(frame(READY)), Value::Null, impatient, None)
        .await
        .unwrap();
    assert_eq!(engine.status().process_id, Some(7));
    // It would never end by itself.
    engine.unload().await.unwrap();
    assert_eq!(
        (engine.status().state, engine.status().process_id),
        (ChildState::Unloaded, None)
    );
}

#[tokio::test]
async fn a_process_that_stands_still_is_found_though_nothing_limits_an_answer() {
    let still = SupervisorConfiguration {
        standstill_limit: Duration::from_secs(2),
        max_restarts: 0,
        ..quick()
    };
    let engine = Supervised::start(Raw(frame(READY)), Value::Null, still, None)
        .await
        .unwrap();
    // It says nothing, whether somebody waits or not.
    let error = ask(&engine, "x").await.unwrap_err();
    assert!(
        matches!(&error, EngineError::WorkerLost { message } if message.contains("it stood still")),
        "{error}"
    );
}

#[tokio::test]
async fn what_callers_do_wrong_hides_no_hang() {
    let world = World::default();
    let configuration = SupervisorConfiguration {
        silence_limit: Some(Duration::from_secs(1)),
        ..quick()
    };
    let engine = Arc::new(start_as(&world, configuration).await);
    let mut hangs = running(&engine, "forever").await;
    let wrong = Arc::clone(&engine);
    // Each is answered, and none by what hangs.
    let wrong = tokio::spawn(async move {
        loop {
            let asked = wrong.stream(Prompt::chat([]), GenerateParams::default()).await;
            assert!(asked.is_err(), "there is no chat");
            tokio::task::yield_now().await;
        }
    });
    let error = hangs.next().await.unwrap().unwrap_err();
    assert!(error.to_string().contains("it hung: nothing came for"), "{error}");
    wrong.abort();
}

#[tokio::test]
async fn as_many_wait_for_a_process_as_may() {
    let world = World {
        stalls_from: Some(1),
        ..World::default()
    };
    let configuration = SupervisorConfiguration {
        max_waiting: 1,
        ..quick()
    };
    let engine = Arc::new(start_as(&world, configuration).await);
    let mut victim = running(&*engine, "forever").await;
    world.kill();
    assert!(victim.next().await.unwrap().is_err());
    let mut waits = Box::pin(ask(&*engine, "waits"));
    assert!(futures::poll!(&mut waits).is_pending());
    let error = ask(&*engine, "one too many").await.unwrap_err();
    assert!(
        matches!(error, EngineError::QueueFull { .. }) && error.is_retryable(),
        "{error}"
    );
    assert!(engine.details().is_none() && engine.statistics().is_none());
    let metrics = Monitored::new(Arc::clone(&engine)).metrics();
    assert_eq!(
        metrics.process_memory_bytes, None,
        "that of this process is not its"
    );
    assert!(!engine.can(RecoveryStep::ReloadModel) && engine.can(RecoveryStep::RestartWorker));
    let error = engine.recover(RecoveryStep::ReloadModel).await.unwrap_err();
    assert!(matches!(error, EngineError::Unsupported { .. }), "{error}");
    engine.unload().await.unwrap();
    assert!(matches!(waits.await, Err(EngineError::NotLoaded { .. })));
    assert!(!engine.can(RecoveryStep::RestartWorker));
}

#[tokio::test]
async fn who_abandons_it_has_another_process() {
    let world = World::default();
    let engine = start(&world).await;
    let mut victim = running(&engine, "forever").await;
    engine.abandon();
    assert!(matches!(
        victim.next().await,
        Some(Err(EngineError::WorkerLost { .. }))
    ));
    assert_eq!(ask(&engine, "after").await.unwrap(), "after");
    assert!(format!("{engine:?}").contains("restarts: 1"), "{engine:?}");
}
