//! The engine apart: what crosses, what a death costs, and who comes after. The process is a thread here, at the other end
//! of a real socket; the tests of the command have real processes.

mod crossing;
mod deaths;
mod ending;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::{Stream, StreamExt, stream};
use mlx_engine_core::{
    Backend, Device, EngineError, EngineStatistics, EventStream, FinishReason, GenerateParams,
    GenerateSummary, GenerationEvent, LlmEngine, LoadProgress, ModelConfiguration, ModelType, Prompt,
    Timings, TokenInfo, TokenLogprob, Usage,
};
use mlx_engine_resilience::{Launch, Process, Service, Supervised, SupervisorConfiguration, serve};
use serde_json::{Value, json};
use tokio::sync::Notify;

/// What the test sees of the processes, and does to them.
#[derive(Clone, Debug, Default)]
struct World {
    launches: Arc<AtomicU32>,
    cancelled: Arc<AtomicU32>,
    /// Engines that did their last.
    finished: Arc<AtomicU32>,
    notify: Arc<Notify>,
    /// Lets the answer to "when told" end.
    go: Arc<Notify>,
    connections: Arc<Mutex<Vec<UnixStream>>>,
    /// Launches from this on fail to load.
    fails_from: Option<u32>,
    /// Launches from this on never get to the end of their load.
    stalls_from: Option<u32>,
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
    /// Since when a request runs that has no end.
    turn: Arc<Mutex<Option<Instant>>>,
}

impl Echo {
    fn new(world: World, launch: u32) -> Self {
        Self {
            world,
            launch,
            turn: Arc::default(),
        }
    }

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
struct Forever {
    world: World,
    turn: Arc<Mutex<Option<Instant>>>,
}

impl Stream for Forever {
    type Item = Result<GenerationEvent, EngineError>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Pending
    }
}

impl Drop for Forever {
    fn drop(&mut self) {
        *self.turn.lock().expect("not poisoned") = None;
        self.world.cancelled.fetch_add(1, Ordering::SeqCst);
        self.world.notify.notify_one();
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
                    *self.turn.lock().expect("not poisoned") = Some(Instant::now());
                    let forever = Forever {
                        world: self.world.clone(),
                        turn: Arc::clone(&self.turn),
                    };
                    return Ok(first.chain(forever).boxed());
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

    fn statistics(&self) -> Option<EngineStatistics> {
        let turn = *self.turn.lock().expect("not poisoned");
        Some(EngineStatistics {
            running: u64::from(turn.is_some()),
            turn_s: turn.map(|since| since.elapsed().as_secs_f64()),
            load: 1,
            ..EngineStatistics::default()
        })
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Service for Echo {
    fn finish(&self) {
        self.world.finished.fetch_add(1, Ordering::SeqCst);
    }

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
        let stalls = self.stalls_from.is_some_and(|from| launch >= from);
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
                if stalls {
                    std::future::pending::<()>().await;
                }
                Ok(Echo::new(world, launch))
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
