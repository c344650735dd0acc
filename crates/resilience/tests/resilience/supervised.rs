//! The engine apart: what crosses, what a death costs, and who comes after. The process is a thread here, at the other end
//! of a real socket; the tests of the command have real processes.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{Stream, StreamExt, stream};
use mlx_engine_core::{
    Backend, Device, EngineError, EventStream, FinishReason, GenerateParams, GenerateSummary,
    GenerationEvent, LlmEngine, LoadProgress, ModelConfiguration, ModelType, Prompt, Timings, TokenInfo,
    TokenLogprob, Usage, collect_events,
};
use mlx_engine_monitor::{EngineHealth, Monitored};
use mlx_engine_resilience::{
    ChildState, Launch, Process, RecoveryStep, Resilient, Service, Supervised, SupervisorConfiguration, serve,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::sync::Notify;

/// What the test sees of the processes, and does to them.
#[derive(Clone, Debug, Default)]
struct World {
    launches: Arc<AtomicU32>,
    cancelled: Arc<AtomicU32>,
    notify: Arc<Notify>,
    /// Lets the answer to "when told" end.
    go: Arc<Notify>,
    connections: Arc<Mutex<Vec<UnixStream>>>,
    /// Launches from this on fail to load.
    fails_from: Option<u32>,
}

impl World {
    /// Ends the process that runs now, as a kill would: without a word.
    fn kill(&self) {
        let connections = self.connections.lock().expect("not poisoned");
        let _ = connections.last().expect("there is one").shutdown(Shutdown::Both);
    }
}

/// Says the prompt back, a character a token. Some prompts do something else.
struct Echo {
    world: World,
    launch: u32,
}

impl Echo {
    fn event(&self, text: String) -> GenerationEvent {
        let logprob = TokenLogprob {
            token: 7,
            text: Some(text.clone()),
            logprob: -0.1,
            top: Vec::new(),
        };
        let tokens = vec![TokenInfo {
            id: self.launch,
            logprob: Some(logprob),
        }];
        GenerationEvent::Text { text, tokens }
    }
}

fn finished(completion_tokens: u32) -> GenerationEvent {
    GenerationEvent::Finished(GenerateSummary {
        model: "echo".to_owned(),
        backend: Backend::Mock,
        device: Device::Cpu,
        finish_reason: FinishReason::Stop,
        usage: Usage {
            prompt_tokens: 1,
            completion_tokens,
            cached_tokens: 0,
        },
        timings: Timings {
            load_s: 0.1,
            ttft_s: 0.3,
            prompt_tps: 1.0 / 3.0,
            generation_tps: 7e9,
        },
        peak_memory_bytes: 0,
        speculation: None,
    })
}

/// Counts its drop as a cancel.
struct Forever(World);

impl Stream for Forever {
    type Item = Result<GenerationEvent, EngineError>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Pending
    }
}

impl Drop for Forever {
    fn drop(&mut self) {
        self.0.cancelled.fetch_add(1, Ordering::SeqCst);
        self.0.notify.notify_one();
    }
}

impl LlmEngine for Echo {
    fn stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        Box::pin(async move {
            let Prompt::Text(text) = prompt else {
                return Err(EngineError::template("no chat here", "a source"));
            };
            let started = Ok(GenerationEvent::Started {
                prompt_tokens: 1,
                cached_tokens: 0,
            });
            match text.as_str() {
                "full" => {
                    return Err(EngineError::QueueFull {
                        retry_after: Duration::from_secs(2),
                    });
                }
                "panic" => panic!("told to"),
                "forever" => {
                    let first = stream::iter([started, Ok(self.event("x".to_owned()))]);
                    return Ok(first.chain(Forever(self.world.clone())).boxed());
                }
                "when told" => {
                    let go = Arc::clone(&self.world.go);
                    let end = stream::once(async move {
                        go.notified().await;
                        Ok(finished(0))
                    });
                    return Ok(stream::iter([started]).chain(end).boxed());
                }
                "fail" => {
                    let fails = [started, Err(EngineError::OutOfMemory)];
                    return Ok(stream::iter(fails).boxed());
                }
                "unless first" if self.launch == 0 => std::future::pending::<()>().await,
                "never" => std::future::pending::<()>().await,
                _ => {}
            }
            let taken = text.chars().take(params.max_tokens as usize);
            let events: Vec<_> = taken.map(|one| Ok(self.event(one.to_string()))).collect();
            let count = events.len() as u32;
            Ok(stream::iter([started])
                .chain(stream::iter(events))
                .chain(stream::iter([Ok(finished(count))]))
                .boxed())
        })
    }

    fn backend(&self) -> Option<Backend> {
        Some(Backend::Mlx)
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        Some(Arc::new(ModelConfiguration::new("echo", ModelType::Base)))
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Service for Echo {
    fn details(&self) -> Value {
        json!({"launch": self.launch})
    }

    fn call(&self, method: String, argument: Value) -> BoxFuture<'_, Result<Value, EngineError>> {
        Box::pin(async move {
            match method.as_str() {
                "twice" => Ok(json!([argument, argument])),
                _ => Err(EngineError::Cancelled),
            }
        })
    }
}

/// A process that is a thread.
struct Thread {
    connection: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Process for Thread {
    fn id(&self) -> Option<u32> {
        None
    }

    fn kill(&mut self) -> io::Result<()> {
        // It may have ended.
        let _ = self.connection.shutdown(Shutdown::Both);
        Ok(())
    }

    fn wait(&mut self) -> io::Result<String> {
        let ended = self.thread.take().map(JoinHandle::join);
        Ok(format!(
            "thread ended: {}",
            ended.is_some_and(|ended| ended.is_ok())
        ))
    }
}

impl Launch for World {
    fn launch(&mut self, connection: UnixStream) -> io::Result<Box<dyn Process>> {
        let launch = self.launches.fetch_add(1, Ordering::SeqCst);
        let ours = connection.try_clone()?;
        self.connections
            .lock()
            .expect("not poisoned")
            .push(connection.try_clone()?);
        let world = self.clone();
        let fails = self.fails_from.is_some_and(|from| launch >= from);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let served = runtime.block_on(serve(connection, |setup, mut progress| async move {
                progress(LoadProgress::Layers { done: 1, total: 2 });
                if fails {
                    return Err(EngineError::model_load(
                        "echo",
                        setup["why"].as_str().unwrap_or_default().to_owned(),
                    ));
                }
                Ok(Echo { world, launch })
            }));
            assert_eq!(served.is_err(), fails, "{served:?}");
        });
        Ok(Box::new(Thread {
            connection: ours,
            thread: Some(thread),
        }))
    }
}

fn quick() -> SupervisorConfiguration {
    SupervisorConfiguration {
        base_delay: Duration::ZERO,
        ..SupervisorConfiguration::default()
    }
}

async fn start(world: &World) -> Supervised {
    start_as(world, quick()).await
}

async fn start_as(world: &World, configuration: SupervisorConfiguration) -> Supervised {
    Supervised::start(world.clone(), json!({"why": "told to"}), configuration, None)
        .await
        .expect("it starts")
}

#[tokio::test]
async fn draining_takes_nothing_more_and_ends_with_the_last_answer() {
    let world = World::default();
    let engine = Arc::new(start(&world).await);
    let events = engine.stream(Prompt::text("when told"), GenerateParams::default());
    let mut running = events.await.unwrap();
    assert!(running.next().await.unwrap().is_ok());
    let drains = tokio::spawn({
        let engine = Arc::clone(&engine);
        async move { engine.drain().await }
    });
    // It is taken back as soon as the other thread has begun.
    while ask(&*engine, "late").await.is_ok() {
        tokio::task::yield_now().await;
    }
    world.go.notify_one();
    let last = running.next().await.unwrap();
    assert!(matches!(last, Ok(GenerationEvent::Finished(_))), "{last:?}");
    drains.await.unwrap().unwrap();
    assert_eq!(engine.status().state, ChildState::Unloaded);

    // Who unloads waits for no answer.
    let engine = Arc::new(start(&world).await);
    let events = engine.stream(Prompt::text("forever"), GenerateParams::default());
    let mut running = events.await.unwrap();
    let drains = tokio::spawn({
        let engine = Arc::clone(&engine);
        async move { engine.drain().await }
    });
    while ask(&*engine, "late").await.is_ok() {
        tokio::task::yield_now().await;
    }
    engine.unload().await.unwrap();
    drains.await.unwrap().unwrap();
    let error = loop {
        match running.next().await.expect("an end") {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, EngineError::NotLoaded { .. }), "{error}");
}

async fn ask(engine: &impl LlmEngine, text: &str) -> Result<String, EngineError> {
    let output = engine
        .generate(Prompt::text(text), GenerateParams::default())
        .await?;
    Ok(output.text)
}

/// A request of which the first token is there.
async fn running(engine: &impl LlmEngine, text: &str) -> EventStream {
    let mut events = engine
        .stream(Prompt::text(text), GenerateParams::default())
        .await
        .expect("it starts");
    for _ in 0..2 {
        events.next().await.expect("an event").expect("no error");
    }
    events
}

#[tokio::test]
async fn events_errors_and_calls_cross_as_they_are() {
    let world = World::default();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let progress = Box::new(move |stage| hears.lock().unwrap().push(stage));
    let engine = Supervised::start(world.clone(), json!({}), quick(), Some(progress))
        .await
        .unwrap();
    assert_eq!(
        *heard.lock().unwrap(),
        [LoadProgress::Layers { done: 1, total: 2 }]
    );
    assert_eq!(
        (engine.backend(), engine.model().unwrap().id.as_str()),
        (Some(Backend::Mlx), "echo")
    );
    assert_eq!(engine.details(), Some(json!({"launch": 0})));

    let here = Echo { world, launch: 0 };
    for text in ["hello", "zwölf Boxkämpfer 🥊\n\"x\"", ""] {
        let collect = |events: EventStream| async { events.map(Result::unwrap).collect::<Vec<_>>().await };
        let params = GenerateParams::default().with_max_tokens(9);
        let there = engine.stream(Prompt::text(text), params.clone()).await.unwrap();
        let same = here.stream(Prompt::text(text), params).await.unwrap();
        assert_eq!(collect(there).await, collect(same).await);
    }
    let error = engine
        .generate(Prompt::user("x"), GenerateParams::default())
        .await
        .unwrap_err();
    assert!(
        matches!(&error, EngineError::Template { source: Some(source), .. } if source.to_string() == "a source")
    );
    let error = engine
        .stream(Prompt::text("full"), GenerateParams::default())
        .await
        .err()
        .unwrap();
    assert_eq!(error.retry_after(), Some(Duration::from_secs(2)));
    let nan = GenerateParams::default().with_temperature(f32::NAN);
    assert!(matches!(
        engine.generate(Prompt::text("x"), nan).await,
        Err(EngineError::InvalidParameter(_))
    ));
    assert!(matches!(
        ask(&engine, "fail").await,
        Err(EngineError::OutOfMemory)
    ));
    assert!(matches!(
        ask(&engine, "panic").await,
        Err(EngineError::WorkerPanicked { .. })
    ));
    assert_eq!(engine.call("twice", json!(2)).await.unwrap(), json!([2, 2]));
    assert!(matches!(
        engine.call("else", Value::Null).await,
        Err(EngineError::Cancelled)
    ));
    assert_eq!(ask(&engine, "still here").await.unwrap(), "still here");
    assert_eq!(engine.status().restarts, 0);
}

#[tokio::test]
async fn many_at_once_keep_their_own_and_dropping_cancels() {
    let world = World::default();
    let engine = start(&world).await;
    let kept = running(&engine, "forever").await;
    let texts: Vec<String> = (0..50).map(|number| format!("request {number}")).collect();
    let answers = futures::future::join_all(texts.iter().map(|text| ask(&engine, text))).await;
    assert_eq!(answers.into_iter().map(Result::unwrap).collect::<Vec<_>>(), texts);
    drop(kept);
    // It would wait for ever where cancelling did not cross.
    world.notify.notified().await;
    assert_eq!(world.cancelled.load(Ordering::SeqCst), 1);
    let dropped = engine.stream(Prompt::text("never"), GenerateParams::default());
    assert!(
        tokio::time::timeout(Duration::ZERO, dropped).await.is_err(),
        "before it is admitted, too"
    );
    assert_eq!(ask(&engine, "after").await.unwrap(), "after");
}

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
async fn what_was_unloaded_stays_so() {
    let world = World::default();
    let engine = start(&world).await;
    let mut runs = running(&engine, "forever").await;
    engine.unload().await.unwrap();
    engine.unload().await.unwrap();
    assert!(matches!(
        runs.next().await,
        Some(Err(EngineError::NotLoaded { .. }))
    ));
    assert!(matches!(ask(&engine, "x").await, Err(EngineError::NotLoaded { model }) if model == "echo"));
    assert!(matches!(
        engine.restart().await,
        Err(EngineError::NotLoaded { .. })
    ));
    assert_eq!(
        (engine.backend(), engine.status().state),
        (None, ChildState::Unloaded)
    );
    assert_eq!(
        world.cancelled.load(Ordering::SeqCst),
        1,
        "what ran there was ended there"
    );
    assert_eq!(world.launches.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_program_that_speaks_another_language_is_left() {
    let serves = |bytes: &[u8]| {
        let (mut program, connection) = UnixStream::pair().unwrap();
        program.write_all(bytes).unwrap();
        program.shutdown(Shutdown::Write).unwrap();
        async move {
            let served = serve(connection, |_, _| async {
                Err::<Echo, _>(EngineError::EmptyPrompt)
            })
            .await;
            drop(program);
            served
        }
    };
    assert!(serves(b"").await.is_ok());
    assert!(serves(b"GET / HTTP/1.1\r\n\r\n").await.is_ok());
    let load = br#"{"load":{"version":"0.0.0-other","setup":null}}"#;
    let frame = [&(load.len() as u32).to_le_bytes()[..], load].concat();
    let error = serves(&frame).await.unwrap_err();
    assert!(error.to_string().contains("version 0.0.0-other"), "{error}");
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Ask,
    Drop,
    Kill,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_request_ends_once_with_its_own_answer_or_a_loss(
        acts in prop::collection::vec(prop_oneof![6 => Just(Act::Ask), 1 => Just(Act::Drop), 1 => Just(Act::Kill)], 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let world = World::default();
            let configuration = SupervisorConfiguration { max_restarts: 100, ..quick() };
            let engine = Arc::new(start_as(&world, configuration).await);
            let mut asked = Vec::new();
            for (number, act) in acts.into_iter().enumerate() {
                let text = format!("request {number}");
                match act {
                    Act::Kill => world.kill(),
                    Act::Drop => drop(engine.stream(Prompt::text("forever"), GenerateParams::default()).await),
                    Act::Ask => {
                        let engine = Arc::clone(&engine);
                        asked.push((text.clone(), tokio::spawn(async move {
                            let events = engine.stream(Prompt::text(text), GenerateParams::default()).await?;
                            collect_events(events).await
                        })));
                    }
                }
            }
            for (text, answer) in asked {
                match answer.await.unwrap() {
                    Ok(output) => assert_eq!(output.text, text),
                    Err(error) => assert!(matches!(error, EngineError::WorkerLost { .. }), "{error}"),
                }
            }
            assert_eq!(ask(&*engine, "after").await.unwrap(), "after");
        });
    }
}
