//! One process, from its start to its end.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use mlx_engine_core::{EngineError, ProgressFn, next_load};
use serde_json::Value;

use super::frame::{FrameError, Frames, FromChild, ToChild, VERSION, encode};
use super::launch::Launch;
use super::shared::Shared;
use super::status::ChildState;

/// Frames that wait are written together, up to about as many bytes.
const WRITTEN_AT_ONCE: usize = 64 << 10;

/// How a process ended.
pub(super) struct End {
    pub(super) how: String,
    /// Why it could not load.
    pub(super) failure: Option<EngineError>,
    pub(super) was_ready: bool,
}

impl Shared {
    /// Runs one process to its end.
    pub(super) fn run(&self, launch: &mut dyn Launch, setup: &Value, progress: Option<ProgressFn>) -> End {
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
        let standstill = self.configuration.standstill_limit;
        let mut frames = Frames::new(connection);
        loop {
            // A silence is found within a quarter of its limit.
            let limits = limit.into_iter().chain(end.was_ready.then_some(standstill));
            let tick = limits.min().unwrap_or(standstill) / 4;
            let tick = tick.max(Duration::from_millis(1));
            if let Err(error) = connection.set_read_timeout(Some(tick)) {
                return Some(format!("its connection cannot be waited for: {error}"));
            }
            // By the waits and not by the clock: a program that was stopped itself has not waited.
            let mut waited = Duration::ZERO;
            let frame = loop {
                match frames.next::<FromChild>() {
                    Ok(Some(frame)) => break frame,
                    // A process that ended in the middle of a word has ended all the same.
                    Ok(None) | Err(FrameError::Cut | FrameError::Io(_)) => return None,
                    Err(FrameError::Silent) => {
                        waited += tick;
                        if end.was_ready && waited >= standstill {
                            let waited = waited.as_secs_f64();
                            return Some(format!("it stood still: no sign of life for {waited:.1} s"));
                        }
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
            if frame.is_answer() {
                state.silent_since = Instant::now();
            }
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
                        state.told = Instant::now();
                    }
                    drop(state);
                    // It comes from a process whose engine hangs, too.
                    if let Some(silent) = self.silent(limit, end.was_ready) {
                        return Some(silent);
                    }
                }
                FromChild::Alive => {
                    drop(state);
                    if let Some(silent) = self.silent(limit, end.was_ready) {
                        return Some(silent);
                    }
                }
                FromChild::Ready(ready) => {
                    if let Some(model) = &ready.model {
                        state.model.clone_from(&model.id);
                    }
                    state.ready = Some(*ready);
                    state.told = Instant::now();
                    state.load = next_load();
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
