//! What the engine that a program holds and the thread that watches its process have in common.

use std::pin::Pin;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::Stream;
use mlx_engine_core::EngineError;
use tokio::sync::{mpsc, watch};

use super::configuration::SupervisorConfiguration;
use super::frame::{Ready, ToChild, encode};
use super::launch::Process;
use super::requests::{Item, Request, Requests};
use super::status::{ChildState, Stage, gone};

pub(super) struct Shared {
    pub(super) configuration: SupervisorConfiguration,
    pub(super) state: Mutex<State>,
    /// The thread waits on it between two processes, and who ends the engine waits for the thread.
    pub(super) changed: Condvar,
    pub(super) stage: watch::Sender<Stage>,
}

pub(super) struct State {
    pub(super) requests: Requests,
    /// To the thread that writes to the process.
    pub(super) link: Option<Sender<Vec<u8>>>,
    pub(super) process: Option<Box<dyn Process>>,
    /// What the process said when it was ready; none before.
    pub(super) ready: Option<Ready>,
    /// When it said last how the engine is.
    pub(super) told: Instant,
    /// Which load of this program the process is.
    pub(super) load: u64,
    /// The name of the model, also where it is not loaded.
    pub(super) model: String,
    /// Starts so far.
    pub(super) starts: u64,
    pub(super) last_end: Option<String>,
    pub(super) stopping: bool,
    /// No more requests are taken, and the process ends with the last that was.
    pub(super) draining: bool,
    /// Somebody wants a new process.
    pub(super) restart: bool,
    /// The thread is gone.
    pub(super) over: bool,
    /// Since when requests have heard nothing.
    pub(super) silent_since: Instant,
}

impl State {
    pub(super) fn not_loaded(&self) -> EngineError {
        EngineError::NotLoaded {
            model: self.model.clone(),
        }
    }

    pub(super) fn kill(&mut self) {
        if let Some(process) = &mut self.process
            && let Err(error) = process.kill()
        {
            tracing::warn!(%error, "the engine's process could not be killed");
        }
    }

    /// Hands what waits to the process, where one is ready.
    pub(super) fn send(&mut self) {
        if self.ready.is_some()
            && let Some(link) = &self.link
        {
            let frames = self.requests.send(Instant::now());
            if !frames.is_empty() {
                // Where nobody takes it the process has ended, and the next one gets it.
                let _ = link.send(frames);
            }
        }
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn kill(&self) {
        self.lock().kill();
    }

    pub(super) fn stage(&self, state: &State, now: ChildState, error: Option<EngineError>) {
        self.stage.send_replace(Stage {
            start: state.starts,
            state: now,
            error,
        });
    }

    /// Takes a request, for the process that runs or the next.
    pub(super) fn submit(self: &Arc<Self>, request: Request) -> Result<Guard, EngineError> {
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

    pub(super) fn cancel(&self, id: u64) {
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
    pub(super) fn tell_who_drains(&self, state: &State) {
        if state.draining && state.requests.is_empty() {
            self.changed.notify_all();
        }
    }

    /// Takes no more requests, and waits until there are none.
    pub(super) fn drain(&self) {
        let mut state = self.lock();
        state.draining = true;
        while !state.stopping && !state.over && !state.requests.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for no request any longer.
    pub(super) fn hurry(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Ends the process and waits until it has. Asked first, made to where it takes too long.
    pub(super) fn stop(&self) {
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

/// A request that somebody waits for. Dropping it cancels the request, where it is not over.
pub(super) struct Guard {
    pub(super) shared: Arc<Shared>,
    pub(super) id: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shared.cancel(self.id);
    }
}

/// The events of a request.
pub(super) struct Events {
    pub(super) events: mpsc::UnboundedReceiver<Item>,
    pub(super) _guard: Guard,
}

impl Stream for Events {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        self.events.poll_recv(cx)
    }
}
