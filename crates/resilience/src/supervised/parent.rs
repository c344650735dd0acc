//! The engine that a program holds, whose work a process does.

use std::fmt;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use mlx_engine_core::{
    Backend, EngineError, EngineStatistics, EventStream, GenerateParams, LlmEngine, ModelConfiguration,
    Prompt,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use super::child::ProgressFn;
use super::configuration::{RestartPolicy, SupervisorConfiguration};
use super::frame::{FrameError, Frames, FromChild, Ready, ToChild, VERSION, encode};
use super::launch::{Launch, Process};
use super::requests::{Item, Request, Requests};
use crate::{Recover, RecoveryStep};

/// Frames that wait are written together, up to about as many bytes.
const WRITTEN_AT_ONCE: usize = 64 << 10;

/// An engine in a process of its own. See the module `supervised` for what it is good for.
///
/// While the process is being started, requests wait and [`backend`](LlmEngine::backend) is `None`, so that health says that no
/// model is loaded. Dropping it ends the process, and waits for that.
pub struct Supervised {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the engine's process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChildState {
    /// It loads the model.
    Starting,
    /// It serves.
    Ready,
    /// It has ended and will be started again in a while.
    Waiting,
    /// It has ended too often, and is not started again by itself.
    GivenUp,
    /// The engine was unloaded.
    Unloaded,
}

/// How the engine's process is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisedStatus {
    /// What it does.
    pub state: ChildState,
    /// The process that runs, where one does.
    pub process_id: Option<u32>,
    /// How often it was started again.
    pub restarts: u64,
    /// How the last one ended that was not meant to.
    pub last_end: Option<String>,
}

/// What those who wait for a start look at.
#[derive(Clone, Debug)]
struct Stage {
    /// Which start it is about.
    start: u64,
    state: ChildState,
    /// Why it was given up.
    error: Option<EngineError>,
}

struct Shared {
    configuration: SupervisorConfiguration,
    state: Mutex<State>,
    /// The thread waits on it between two processes, and who ends the engine waits for the thread.
    changed: Condvar,
    stage: watch::Sender<Stage>,
}

struct State {
    requests: Requests,
    /// To the thread that writes to the process.
    link: Option<Sender<Vec<u8>>>,
    process: Option<Box<dyn Process>>,
    /// What the process said when it was ready; none before.
    ready: Option<Ready>,
    /// The name of the model, also where it is not loaded.
    model: String,
    /// Starts so far.
    starts: u64,
    last_end: Option<String>,
    stopping: bool,
    /// No more requests are taken, and the process ends with the last that was.
    draining: bool,
    /// Somebody wants a new process.
    restart: bool,
    /// The thread is gone.
    over: bool,
    /// Since when requests have heard nothing.
    silent_since: Instant,
}

/// How a process ended.
struct End {
    how: String,
    /// Why it could not load.
    failure: Option<EngineError>,
    was_ready: bool,
}

impl fmt::Debug for Supervised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervised")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl Supervised {
    /// Starts the process and waits until it has loaded what `setup` says, which is for
    /// [`serve`](super::serve) to understand. Dropping the future ends the process.
    ///
    /// # Errors
    ///
    /// The field of the configuration that is out of its range, that the process could not be started, the error of its load, and
    /// [`WorkerLost`](EngineError::WorkerLost) where it ended while it loaded.
    pub async fn start(
        launch: impl Launch,
        setup: Value,
        configuration: SupervisorConfiguration,
        progress: Option<ProgressFn>,
    ) -> Result<Self, EngineError> {
        configuration.validate()?;
        let stage = watch::Sender::new(Stage {
            start: 0,
            state: ChildState::Starting,
            error: None,
        });
        let mut started = stage.subscribe();
        let shared = Arc::new(Shared {
            configuration,
            state: Mutex::new(State {
                requests: Requests::default(),
                link: None,
                process: None,
                ready: None,
                model: "none".to_owned(),
                starts: 0,
                last_end: None,
                stopping: false,
                draining: false,
                restart: false,
                over: false,
                silent_since: Instant::now(),
            }),
            changed: Condvar::new(),
            stage,
        });
        let watching = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("engine-supervisor".to_owned())
            .spawn(move || {
                let _over = Over(&watching);
                watching.supervise(Box::new(launch), &setup, progress);
            })
            .map_err(|error| EngineError::device("the supervisor thread could not be started", error))?;
        let this = Self {
            shared,
            thread: Mutex::new(Some(thread)),
        };
        outcome(&mut started, 1).await?;
        Ok(this)
    }

    /// How the process is.
    pub fn status(&self) -> SupervisedStatus {
        let state = self.shared.lock();
        SupervisedStatus {
            state: self.shared.stage.borrow().state,
            process_id: state.process.as_ref().and_then(|process| process.id()),
            restarts: state.starts.saturating_sub(1),
            last_end: state.last_end.clone(),
        }
    }

    /// What the engine said of itself last; `None` while it is not ready.
    pub fn details(&self) -> Option<Value> {
        let state = self.shared.lock();
        state.ready.as_ref().map(|ready| ready.details.clone())
    }

    /// Asks the engine for something that is no answer to a prompt: see
    /// [`Service::call`](super::Service::call). It may be asked twice where the process ends meanwhile.
    ///
    /// # Errors
    ///
    /// Those of the method, and of an engine that is not there.
    pub async fn call(&self, method: &str, argument: Value) -> Result<Value, EngineError> {
        let (answer, waits) = oneshot::channel();
        let request = Request::Call {
            method: method.to_owned(),
            argument,
            answer,
        };
        let _guard = self.shared.submit(request)?;
        waits.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Ends the process, whatever it does, starts a new one, and waits until that serves. What the policy held against the
    /// old one is forgotten.
    ///
    /// # Errors
    ///
    /// [`NotLoaded`](EngineError::NotLoaded) where the engine was unloaded, and why no process came to serve.
    pub async fn restart(&self) -> Result<(), EngineError> {
        let (mut stage, next) = {
            let mut state = self.shared.lock();
            if state.stopping || state.over {
                return Err(state.not_loaded());
            }
            state.restart = true;
            state.kill();
            (self.shared.stage.subscribe(), state.starts + 1)
        };
        self.shared.changed.notify_all();
        outcome(&mut stage, next).await
    }

    /// Takes no more requests, waits until those that it has are over, and then ends as
    /// [`unload`](LlmEngine::unload) does. One that is unloaded meanwhile waits no longer.
    ///
    /// # Errors
    ///
    /// Why the process could not be waited for.
    pub async fn drain(&self) -> Result<(), EngineError> {
        self.end(true).await
    }

    async fn end(&self, drain: bool) -> Result<(), EngineError> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else {
            if !drain {
                self.shared.hurry();
            }
            return Ok(());
        };
        let shared = Arc::clone(&self.shared);
        let (ended, wait) = oneshot::channel();
        // Off the caller's executor.
        let stopping = std::thread::Builder::new()
            .name("engine-unload".to_owned())
            .spawn(move || {
                if drain {
                    shared.drain();
                }
                shared.stop();
                let _ = ended.send(thread.join().is_ok());
            });
        stopping.map_err(|error| EngineError::device("the process could not be waited for", error))?;
        match wait.await {
            Ok(true) => Ok(()),
            _ => Err(EngineError::internal("the supervisor panicked")),
        }
    }

    fn serves(&self) -> Option<Ready> {
        self.shared.lock().ready.clone()
    }
}

/// Waits until a start, or one after it, has come to something.
async fn outcome(stage: &mut watch::Receiver<Stage>, start: u64) -> Result<(), EngineError> {
    let settled = |stage: &Stage| {
        let given_up = matches!(stage.state, ChildState::GivenUp | ChildState::Unloaded);
        stage.start >= start && (given_up || stage.state == ChildState::Ready)
            || stage.state == ChildState::Unloaded
    };
    let stage = stage.wait_for(settled).await.map_err(|_| gone())?;
    match (&stage.error, stage.state) {
        (_, ChildState::Ready) => Ok(()),
        (Some(error), _) => Err(error.clone()),
        (None, _) => Err(gone()),
    }
}

fn gone() -> EngineError {
    EngineError::internal("the supervisor has gone")
}

fn lost(how: &str) -> EngineError {
    EngineError::WorkerLost {
        message: format!("its process ended: {how}"),
    }
}

impl State {
    fn not_loaded(&self) -> EngineError {
        EngineError::NotLoaded {
            model: self.model.clone(),
        }
    }

    fn kill(&mut self) {
        if let Some(process) = &mut self.process
            && let Err(error) = process.kill()
        {
            tracing::warn!(%error, "the engine's process could not be killed");
        }
    }

    /// Hands what waits to the process, where one is ready.
    fn send(&mut self) {
        if self.ready.is_some()
            && let Some(link) = &self.link
        {
            let frames = self.requests.send();
            if !frames.is_empty() {
                // Where nobody takes it the process has ended, and the next one gets it.
                let _ = link.send(frames);
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kill(&self) {
        self.lock().kill();
    }

    fn stage(&self, state: &State, now: ChildState, error: Option<EngineError>) {
        self.stage.send_replace(Stage {
            start: state.starts,
            state: now,
            error,
        });
    }

    /// Takes a request, for the process that runs or the next.
    fn submit(self: &Arc<Self>, request: Request) -> Result<Guard, EngineError> {
        let mut state = self.lock();
        if state.stopping || state.draining || state.over {
            return Err(state.not_loaded());
        }
        let stage = self.stage.borrow().clone();
        if stage.state == ChildState::GivenUp {
            return Err(stage.error.unwrap_or_else(gone));
        }
        if state.ready.is_none() && state.requests.waiting() >= self.configuration.max_waiting {
            return Err(EngineError::QueueFull {
                retry_after: Duration::from_secs(1),
            });
        }
        if state.requests.is_empty() {
            state.silent_since = Instant::now();
        }
        let id = state.requests.add(request);
        state.send();
        Ok(Guard {
            shared: Arc::clone(self),
            id,
        })
    }

    fn cancel(&self, id: u64) {
        let mut state = self.lock();
        if state.requests.cancel(id)
            && let Some(link) = &state.link
        {
            let mut frame = Vec::new();
            if encode(&ToChild::Cancel { id }, &mut frame).is_ok() {
                let _ = link.send(frame);
            }
        }
        self.tell_who_drains(&state);
    }

    /// Who waits for the last request hears of its end.
    fn tell_who_drains(&self, state: &State) {
        if state.draining && state.requests.is_empty() {
            self.changed.notify_all();
        }
    }

    /// Takes no more requests, and waits until there are none.
    fn drain(&self) {
        let mut state = self.lock();
        state.draining = true;
        while !state.stopping && !state.over && !state.requests.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for no request any longer.
    fn hurry(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Runs processes, one after the other, until the engine is unloaded.
    fn supervise(&self, mut launch: Box<dyn Launch>, setup: &Value, mut progress: Option<ProgressFn>) {
        let origin = Instant::now();
        let mut policy = RestartPolicy::new(self.configuration.clone());
        loop {
            let end = self.run(&mut *launch, setup, progress.take());
            let error = end.failure.unwrap_or_else(|| lost(&end.how));
            let mut state = self.lock();
            if state.stopping {
                return;
            }
            if !state.restart {
                state.last_end = Some(end.how.clone());
            }
            state.requests.lost(&lost(&end.how));
            self.tell_who_drains(&state);
            if state.starts == 1 && !end.was_ready {
                self.stage(&state, ChildState::GivenUp, Some(error));
                return;
            }
            let mut wait = policy.ended(origin.elapsed());
            if state.restart {
                policy.forgive();
                wait = Some(Duration::ZERO);
            }
            if let Some(wait) = wait {
                tracing::warn!(
                    end = end.how,
                    ?wait,
                    "the engine's process ended and is started again"
                );
                self.stage(&state, ChildState::Waiting, None);
            } else {
                tracing::error!(
                    end = end.how,
                    "the engine's process ended too often and stays ended"
                );
                state.requests.fail_all(&error);
                self.tell_who_drains(&state);
                self.stage(&state, ChildState::GivenUp, Some(error));
            }
            let until = wait.map(|wait| Instant::now() + wait);
            while !state.stopping && !state.restart {
                state = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                    Some(Duration::ZERO) => break,
                    Some(left) => {
                        let woken = self.changed.wait_timeout(state, left);
                        woken.unwrap_or_else(PoisonError::into_inner).0
                    }
                    None => {
                        let woken = self.changed.wait(state);
                        woken.unwrap_or_else(PoisonError::into_inner)
                    }
                };
            }
            if state.stopping {
                return;
            }
            if wait.is_none() {
                policy.forgive();
            }
        }
    }

    /// Runs one process to its end.
    fn run(&self, launch: &mut dyn Launch, setup: &Value, progress: Option<ProgressFn>) -> End {
        let failed = |how: String, failure: EngineError| End {
            how,
            failure: Some(failure),
            was_ready: false,
        };
        let connection = match self.begin(launch, setup) {
            Ok(connection) => connection,
            Err(error) => {
                let how = format!("it could not be started: {error}");
                return failed(
                    how,
                    EngineError::device("the engine's process could not be started", error),
                );
            }
        };
        let mut end = End {
            how: String::new(),
            failure: None,
            was_ready: false,
        };
        let broken = self.hear(&connection, progress, &mut end);
        let process = {
            let mut state = self.lock();
            state.link = None;
            state.ready = None;
            state.process.take()
        };
        let Some(mut process) = process else {
            return end;
        };
        // It has closed its connection, or it cannot be spoken with.
        if let Err(error) = process.kill() {
            tracing::warn!(%error, "the engine's process could not be killed");
        }
        let how = process
            .wait()
            .unwrap_or_else(|error| format!("nobody knows how: {error}"));
        end.how = match (broken, &end.failure) {
            (Some(broken), _) => broken,
            (None, Some(failure)) => failure.to_string(),
            (None, None) => how,
        };
        end
    }

    /// Starts a process and tells it what to load.
    fn begin(&self, launch: &mut dyn Launch, setup: &Value) -> std::io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let (link, frames) = channel();
        let writer = ours.try_clone()?;
        let mut load = Vec::new();
        let frame = ToChild::Load {
            version: VERSION.to_owned(),
            setup: setup.clone(),
        };
        encode(&frame, &mut load).map_err(std::io::Error::other)?;
        // Its receiver is here.
        let _ = link.send(load);
        {
            let mut state = self.lock();
            state.starts += 1;
            state.restart = false;
            state.silent_since = Instant::now();
            self.stage(&state, ChildState::Starting, None);
        }
        let process = launch.launch(theirs)?;
        std::thread::Builder::new()
            .name("engine-requests".to_owned())
            .spawn(move || write_frames(writer, &frames))?;
        let mut state = self.lock();
        state.process = Some(process);
        // Whoever ends the engine now finds the process, or has set this before.
        if !state.stopping {
            state.link = Some(link);
        }
        Ok(ours)
    }

    /// Reads what the process says, to the end. Returns what is wrong with it where it has not ended by itself.
    fn hear(
        &self,
        connection: &UnixStream,
        mut progress: Option<ProgressFn>,
        end: &mut End,
    ) -> Option<String> {
        let mut limit = Some(self.configuration.start_limit);
        let mut frames = Frames::new(connection);
        loop {
            // A silence is found within a quarter of its limit.
            let tick = limit.map(|limit| (limit / 4).max(Duration::from_millis(1)));
            if let Err(error) = connection.set_read_timeout(tick) {
                return Some(format!("its connection cannot be waited for: {error}"));
            }
            let frame = loop {
                match frames.next::<FromChild>() {
                    Ok(Some(frame)) => break frame,
                    // A process that ended in the middle of a word has ended all the same.
                    Ok(None) | Err(FrameError::Cut | FrameError::Io(_)) => return None,
                    Err(FrameError::Silent) => {
                        if let Some(silent) = self.silent(limit, end.was_ready) {
                            return Some(silent);
                        }
                    }
                    Err(error @ (FrameError::TooLong(_) | FrameError::Malformed(_))) => {
                        return Some(format!("it said what cannot be read: {error}"));
                    }
                }
            };
            let mut state = self.lock();
            state.silent_since = Instant::now();
            match frame {
                FromChild::Progress(stage) => {
                    drop(state);
                    if let Some(progress) = &mut progress {
                        progress(stage);
                    }
                }
                FromChild::Details { details, statistics } => {
                    if let Some(ready) = &mut state.ready {
                        ready.details = details;
                        ready.statistics = statistics.map(|statistics| *statistics);
                    }
                }
                FromChild::Ready(ready) => {
                    if let Some(model) = &ready.model {
                        state.model.clone_from(&model.id);
                    }
                    state.ready = Some(*ready);
                    end.was_ready = true;
                    limit = self.configuration.silence_limit;
                    self.stage(&state, ChildState::Ready, None);
                    state.send();
                }
                FromChild::Failed(error) => {
                    end.failure = Some(error);
                    return None;
                }
                FromChild::Admitted { id } => state.requests.admitted(id),
                FromChild::Event { id, event } => {
                    state.requests.event(id, event);
                    self.tell_who_drains(&state);
                }
                FromChild::Error { id, error } => {
                    state.requests.error(id, error);
                    self.tell_who_drains(&state);
                }
                FromChild::Answer { id, value } => {
                    state.requests.answer(id, value);
                    self.tell_who_drains(&state);
                }
            }
        }
    }

    /// Says so where those who wait have heard nothing for too long.
    fn silent(&self, limit: Option<Duration>, ready: bool) -> Option<String> {
        let limit = limit?;
        let state = self.lock();
        let silence = state.silent_since.elapsed();
        let somebody_waits = !ready || !state.requests.is_empty();
        (somebody_waits && silence >= limit)
            .then(|| format!("it hung: nothing came for {:.1} s", silence.as_secs_f64()))
    }

    /// Ends the process and waits until it has. Asked first, made to where it takes too long.
    fn stop(&self) {
        let error = {
            let mut state = self.lock();
            state.stopping = true;
            // The writer ends, and the process sees the end of its connection.
            state.link = None;
            state.not_loaded()
        };
        self.changed.notify_all();
        let mut state = self.lock();
        state.requests.fail_all(&error);
        let until = Instant::now() + self.configuration.exit_limit;
        while !state.over {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.kill();
                break;
            }
            let woken = self.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Marks the end of the supervisor's thread, however it comes.
struct Over<'a>(&'a Shared);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.over = true;
        state.ready = None;
        state.link = None;
        let error = state.not_loaded();
        state.requests.fail_all(&error);
        let given_up = self.0.stage.borrow().error.clone();
        self.0.stage(&state, ChildState::Unloaded, given_up);
        drop(state);
        self.0.changed.notify_all();
    }
}

/// Writes frames until nobody sends any, and then says that there will be no more.
fn write_frames(mut connection: UnixStream, frames: &Receiver<Vec<u8>>) {
    while let Ok(mut bytes) = frames.recv() {
        while bytes.len() < WRITTEN_AT_ONCE
            && let Ok(more) = frames.try_recv()
        {
            bytes.extend(more);
        }
        // The reader sees the end of the process too.
        if connection.write_all(&bytes).is_err() {
            return;
        }
    }
    let _ = connection.shutdown(Shutdown::Write);
}

/// A request that somebody waits for. Dropping it cancels the request, where it is not over.
struct Guard {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shared.cancel(self.id);
    }
}

/// The events of a request.
struct Events {
    events: mpsc::UnboundedReceiver<Item>,
    _guard: Guard,
}

impl Stream for Events {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        self.events.poll_recv(cx)
    }
}

impl LlmEngine for Supervised {
    fn stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        Box::pin(async move {
            // What is no number would not survive the way.
            params.validate()?;
            let (admitted, waits) = oneshot::channel();
            let (sender, events) = mpsc::unbounded_channel();
            let guard = self.shared.submit(Request::Generate {
                prompt,
                params: Box::new(params),
                admitted: Some(admitted),
                events: sender,
                started: false,
            })?;
            waits.await.unwrap_or_else(|_| Err(gone()))?;
            let events = Events {
                events,
                _guard: guard,
            };
            Ok(events.boxed())
        })
    }

    fn backend(&self) -> Option<Backend> {
        self.serves()?.backend
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        self.serves()?.model.map(Arc::new)
    }

    fn abandon(&self) {
        // It cannot hang: a process that does not end is killed.
        self.shared.kill();
    }

    fn statistics(&self) -> Option<EngineStatistics> {
        let state = self.shared.lock();
        state.ready.as_ref()?.statistics
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(self.end(false))
    }
}

impl Recover for Supervised {
    fn can(&self, step: RecoveryStep) -> bool {
        let state = self.shared.lock();
        step == RecoveryStep::RestartWorker && !state.stopping && !state.over
    }

    fn recover(&self, step: RecoveryStep) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async move {
            match step {
                RecoveryStep::RestartWorker => self.restart().await,
                _ => Err(EngineError::internal(format!("the engine cannot {step}"))),
            }
        })
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            self.shared.stop();
            // A panic of it was reported.
            let _ = thread.join();
        }
    }
}
