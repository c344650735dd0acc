//! The process that has the engine.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use mlx_engine_core::{
    EngineError, EngineStatistics, GenerateParams, GenerationEvent, LlmEngine, ProgressFn, Prompt,
};
use mlx_engine_monitor::resident_bytes;
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::frame::{Frames, FromChild, Ready, ToChild, VERSION, encode};

/// How long the engine may take to end what runs, once the program is gone.
const UNLOAD_LIMIT: Duration = Duration::from_secs(5);

/// How often the program hears how the engine is, or that it is as it was.
const TOLD_EVERY: Duration = Duration::from_millis(250);

/// An engine that can be asked for more than answers to prompts.
pub trait Service: LlmEngine {
    /// What it says of itself, once it is loaded, whenever a request has ended, and a few times a second while that changes:
    /// [`Supervised::details`](super::Supervised::details).
    fn details(&self) -> Value {
        Value::Null
    }

    /// Answers a [call](super::Supervised::call).
    ///
    /// # Errors
    ///
    /// That there is no such method, and those of the method.
    fn call(&self, method: String, argument: Value) -> BoxFuture<'_, Result<Value, EngineError>> {
        let _ = argument;
        Box::pin(async move {
            Err(EngineError::unsupported(format!(
                "the engine has no method `{method}`"
            )))
        })
    }

    /// The last that the process does for the engine: it was unloaded, and the program waits for the end of the connection, up to
    /// its [`exit_limit`](super::SupervisorConfiguration::exit_limit). It may block. Once the connection has ended, the process is
    /// ended too.
    fn finish(&self) {}
}

/// The connection to the program that started this process: its standard input.
///
/// # Errors
///
/// Where this process was not started by [`Supervised`](super::Supervised), but by hand.
pub fn connection() -> io::Result<UnixStream> {
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // A terminal, a file and a pipe have no peer.
    stream.peer_addr()?;
    Ok(stream)
}

/// Serves one engine over a connection until that ends: `load` makes it from what
/// [`Supervised::start`](super::Supervised::start) was given. Needs a tokio runtime with time.
///
/// # Errors
///
/// Where the program on the other side speaks another version; that the engine could not be loaded, which the program has
/// been told; and [`DeadlineExceeded`](EngineError::DeadlineExceeded) where the engine hangs and does not end, so that the
/// process should be aborted.
pub async fn serve<E, F, L>(connection: UnixStream, load: F) -> Result<(), EngineError>
where
    E: Service + 'static,
    F: FnOnce(Value, ProgressFn) -> L,
    L: Future<Output = Result<E, EngineError>>,
{
    let broken = |error: io::Error| EngineError::device("the connection to the program failed", error);
    let writer = connection.try_clone().map_err(broken)?;
    let line = Arc::new(Line(Mutex::new(writer)));
    let _end = HangUp(Arc::clone(&line));
    let (first, setup) = oneshot::channel();
    let (over, mut ended) = oneshot::channel();
    // The program sends no requests before it hears that the engine is ready.
    let ready = Arc::new(OnceLock::<Arc<Tasks<E>>>::new());
    let serving = Arc::clone(&ready);
    let reading = std::thread::Builder::new().name("engine-requests".to_owned());
    let reader = reading.spawn(move || {
        let mut frames = Frames::new(connection);
        let mut first = Some(first);
        // Whatever is wrong with the connection, it is over.
        while let Ok(Some(frame)) = frames.next::<ToChild>() {
            match frame {
                ToChild::Load { version, setup } => {
                    if let Some(first) = first.take() {
                        let _ = first.send((version, setup));
                    }
                }
                frame => {
                    if let Some(tasks) = serving.get() {
                        tasks.take(frame);
                    }
                }
            }
        }
        let _ = over.send(());
    });
    drop(reader.map_err(broken)?);
    let Ok((version, setup)) = setup.await else {
        return Ok(());
    };
    if version != VERSION {
        let error = EngineError::internal(format!(
            "the program is of version {version} and its engine of version {VERSION}"
        ));
        line.say(&FromChild::Failed(error.clone()));
        return Err(error);
    }
    let told = Arc::clone(&line);
    let progress: ProgressFn = Box::new(move |stage| told.say(&FromChild::Progress(stage)));
    let loaded = tokio::select! {
        loaded = load(setup, progress) => loaded,
        _ = &mut ended => return Ok(()),
    };
    let engine = match loaded {
        Ok(engine) => Arc::new(engine),
        Err(error) => {
            line.say(&FromChild::Failed(error.clone()));
            return Err(error);
        }
    };
    let tasks = Arc::new(Tasks {
        engine: Arc::clone(&engine),
        line: Arc::clone(&line),
        runtime: Handle::current(),
        running: Mutex::default(),
    });
    let said = Ready {
        backend: engine.backend(),
        model: engine.model().map(Arc::unwrap_or_clone),
        details: engine.details(),
        statistics: tasks.statistics(),
    };
    let mut told = (said.details.clone(), said.statistics);
    // It is set here alone.
    let _ = ready.set(Arc::clone(&tasks));
    line.say(&FromChild::Ready(Box::new(said)));
    let mut tick = interval(TOLD_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // The reader says so, or is gone.
            _ = &mut ended => break,
            _ = tick.tick() => tasks.tell_changes(&mut told),
        }
    }
    tasks.abort();
    let unloaded = timeout(UNLOAD_LIMIT, engine.unload()).await;
    let finish = tokio::task::spawn_blocking(move || engine.finish());
    if let Err(error) = finish.await {
        tracing::error!(%error, "the last of the engine's process went wrong");
    }
    unloaded.unwrap_or(Err(EngineError::DeadlineExceeded { limit: UNLOAD_LIMIT }))
}

/// The way to the program.
#[derive(Debug)]
struct Line(Mutex<UnixStream>);

impl Line {
    fn say(&self, frame: &FromChild) {
        let mut bytes = Vec::new();
        if let Err(error) = encode(frame, &mut bytes) {
            tracing::error!(%error, "a frame could not be written");
            return;
        }
        // Where nobody hears it, the reader sees the end too.
        let _ = lock(&self.0).write_all(&bytes);
    }
}

/// Ends the connection, and with it the thread that reads from it.
struct HangUp(Arc<Line>);

impl Drop for HangUp {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = lock(&self.0.0).shutdown(Shutdown::Both);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the process works on.
struct Tasks<E> {
    engine: Arc<E>,
    line: Arc<Line>,
    runtime: Handle,
    running: Mutex<HashMap<u64, AbortHandle>>,
}

impl<E: Service + 'static> Tasks<E> {
    fn take(self: &Arc<Self>, frame: ToChild) {
        match frame {
            ToChild::Generate { id, prompt, params } => {
                self.spawn(
                    id,
                    |tasks| async move { tasks.generate(id, prompt, *params).await },
                );
            }
            ToChild::Call { id, method, argument } => self.spawn(id, |tasks| async move {
                match tasks.engine.call(method, argument).await {
                    Ok(value) => FromChild::Answer { id, value },
                    Err(error) => FromChild::Error { id, error },
                }
            }),
            ToChild::Cancel { id } => {
                if let Some(task) = lock(&self.running).remove(&id) {
                    task.abort();
                }
            }
            ToChild::Load { .. } => {}
        }
    }

    /// Runs a task that ends with a frame.
    fn spawn<T>(self: &Arc<Self>, id: u64, task: impl FnOnce(Arc<Self>) -> T)
    where
        T: Future<Output = FromChild> + Send + 'static,
    {
        let work = task(Arc::clone(self));
        let tasks = Arc::clone(self);
        let mut running = lock(&self.running);
        let spawned = self.runtime.spawn(async move {
            let mut last = Last {
                tasks: &tasks,
                id,
                frame: None,
            };
            last.frame = Some(work.await);
        });
        running.insert(id, spawned.abort_handle());
    }

    /// Streams an answer, and returns how it ended.
    async fn generate(&self, id: u64, prompt: Prompt, params: GenerateParams) -> FromChild {
        let mut events = match self.engine.stream(prompt, params).await {
            Ok(events) => events,
            Err(error) => return FromChild::Error { id, error },
        };
        self.line.say(&FromChild::Admitted { id });
        while let Some(event) = events.next().await {
            match event {
                Ok(event @ GenerationEvent::Finished(_)) => return FromChild::Event { id, event },
                Ok(event) => self.line.say(&FromChild::Event { id, event }),
                Err(error) => return FromChild::Error { id, error },
            }
        }
        let error = EngineError::internal("event stream ended without a finished event");
        FromChild::Error { id, error }
    }

    /// What the engine says of its inside, with the memory of this process.
    fn statistics(&self) -> Option<EngineStatistics> {
        let statistics = self.engine.statistics()?;
        Some(EngineStatistics {
            process_memory_bytes: resident_bytes(),
            ..statistics
        })
    }

    /// Tells the program how the engine is.
    fn tell(&self, details: Value, statistics: Option<Box<EngineStatistics>>) {
        self.line.say(&FromChild::Details { details, statistics });
    }

    /// Tells the program how the engine is, or that all is as it was at the last look.
    fn tell_changes(&self, told: &mut (Value, Option<EngineStatistics>)) {
        let now = (self.engine.details(), self.statistics());
        if now == *told {
            self.line.say(&FromChild::Alive);
        } else {
            self.tell(now.0.clone(), now.1.map(Box::new));
            *told = now;
        }
    }

    /// Drops everything that runs, which cancels it.
    fn abort(&self) {
        for (_, task) in lock(&self.running).drain() {
            task.abort();
        }
    }
}

/// Says the last word on a request, also where its task panics.
struct Last<'a, E: Service + 'static> {
    tasks: &'a Tasks<E>,
    id: u64,
    frame: Option<FromChild>,
}

impl<E: Service + 'static> Drop for Last<'_, E> {
    fn drop(&mut self) {
        self.tasks
            .tell(self.tasks.engine.details(), self.tasks.statistics().map(Box::new));
        // One that was cancelled is not there, and nobody waits for it.
        if lock(&self.tasks.running).remove(&self.id).is_some() {
            let frame = self.frame.take().unwrap_or_else(|| FromChild::Error {
                id: self.id,
                error: EngineError::WorkerPanicked {
                    message: "the engine panicked on the request".to_owned(),
                },
            });
            self.tasks.line.say(&frame);
        }
    }
}
