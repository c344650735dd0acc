//! How an engine ends.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc as blocking;
use std::thread::JoinHandle;
use std::time::Duration;

use mlx_engine_core::EngineError;

use super::Engine;
use crate::worker::panicked;

/// What becomes of the requests of an engine that is unloaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnloadMode {
    /// They end with [`EngineError::NotLoaded`] before their next step. Keys and values that are yet to be written to
    /// [disk](crate::DiskCacheConfig) are not.
    #[default]
    Abort,
    /// They are answered first, those that wait too, and keys and values are written to disk that may be.
    Drain,
}

/// How long the drop of an engine waits for a step that hangs.
const DROP_LIMIT: Duration = Duration::from_mins(1);

/// MLX takes its own state apart when the process ends, and must not be at work on another thread then.
impl Drop for Engine {
    fn drop(&mut self) {
        self.close(UnloadMode::Abort);
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let gone = self.gone.get_mut().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() && gone.recv_timeout(DROP_LIMIT) == Err(blocking::RecvTimeoutError::Timeout) {
            tracing::error!(limit = ?DROP_LIMIT, "the worker does not end and is left behind");
            return;
        }
        join(thread);
    }
}

impl Engine {
    /// Ends the engine and gives the memory back: at once, or after the requests that it has taken. Requests after it are
    /// [`EngineError::NotLoaded`]. Unloading twice is no error: both wait for the end, which [`UnloadMode::Abort`] brings
    /// near for an engine that drains.
    ///
    /// # Errors
    ///
    /// Where the worker panicked.
    pub async fn unload_with(&self, mode: UnloadMode) -> Result<(), EngineError> {
        self.close(mode);
        // The thread ends after the step that runs; only its last moment is waited for here.
        let mut ended = self.ended.clone();
        while ended.changed().await.is_ok() {}
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread.map_or(Ok(()), |thread| thread.join().map_err(|panic| panicked(&*panic)))
    }

    /// Lets no more requests in.
    pub(super) fn close(&self, mode: UnloadMode) {
        if mode == UnloadMode::Abort {
            self.abort.store(true, Ordering::Release);
        }
        drop(
            self.commands
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
    }
}

/// Waits for a thread. A panic of the worker was reported to whom it concerned.
pub(super) fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread {
        let _ = thread.join();
    }
}
