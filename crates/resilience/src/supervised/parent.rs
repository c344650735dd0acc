//! The engine that a program holds, whose work a process does.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use futures::StreamExt;
use futures::future::BoxFuture;
use mlx_engine_core::{
    Backend, EngineError, EngineStatistics, EventStream, GenerateParams, LlmEngine, ModelConfiguration,
    ProgressFn, Prompt,
};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use super::configuration::SupervisorConfiguration;
use super::frame::Ready;
use super::launch::Launch;
use super::requests::{Request, Requests};
use super::shared::{Events, Shared, State};
use super::status::{ChildState, Stage, SupervisedStatus, gone, outcome};
use super::watch::Over;
use crate::{Recover, RecoveryStep};

/// An engine in a process of its own, behind the same trait.
///
/// Whatever ends that process, an abort in a driver, the kernel's killer of processes or `kill -9`, costs the requests
/// that run there, and they get an error that may be retried ([`WorkerLost`](mlx_engine_core::EngineError::WorkerLost)). The
/// process is started again under a policy with limits, and requests that had not started are sent to the new one.
///
/// The other half is [`serve`](super::serve), which the process runs around the real engine. They speak over one Unix socket,
/// whose other end the process finds as its standard input: frames of a length and JSON, events in the order of their
/// requests. The process ends when its socket does, and so with the program however that ends.
///
/// While the process is being started, requests wait and [`backend`](LlmEngine::backend) is `None`, so that health says that no
/// model is loaded. Dropping it ends the process, and waits for that.
///
/// ```no_run
/// use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
/// use mlx_engine_resilience::{Program, Supervised, SupervisorConfiguration};
///
/// async fn ask() -> Result<String, EngineError> {
///     // A program that calls `serve` when it is started with this argument.
///     let program = Program::new("my-program").arg("engine");
///     let setup = serde_json::json!({"model": "tiny"});
///     let engine = Supervised::start(program, setup, SupervisorConfiguration::default(), None).await?;
///     let output = engine.generate(Prompt::user("Why is the sky blue?"), GenerateParams::default()).await?;
///     Ok(output.text)
/// }
/// ```
pub struct Supervised {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
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
                told: Instant::now(),
                load: 0,
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
                since: Instant::now(),
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

    fn is_apart(&self) -> bool {
        true
    }

    fn abandon(&self) {
        // It cannot hang: a process that does not end is killed.
        self.shared.kill();
    }

    fn statistics(&self) -> Option<EngineStatistics> {
        let state = self.shared.lock();
        let statistics = state.ready.as_ref()?.statistics?;
        Some(EngineStatistics {
            // A turn goes on while nothing is said.
            turn_s: statistics
                .turn_s
                .map(|turn_s| turn_s + state.told.elapsed().as_secs_f64()),
            // Over there it is the first, every time.
            load: state.load,
            ..statistics
        })
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
                _ => Err(EngineError::unsupported(format!("the engine cannot {step}"))),
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
