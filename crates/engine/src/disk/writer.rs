//! Files that are written on a thread of their own: no answer waits for a disk.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::chain::Name;
use super::store::Store;

/// Files that may be written and wait to be; each is held in memory.
const WAITING: usize = 3;

/// A file that is to be written.
pub(super) struct Job {
    pub(super) name: Name,
    pub(super) file: Vec<u8>,
}

/// The thread, which ends with this.
pub(super) struct Writer {
    jobs: Option<Sender<Job>>,
    /// A permit for each file that may be handed over.
    room: Arc<Semaphore>,
    /// Closed when the thread has written all.
    ended: Receiver<()>,
    /// How long who ends waits for what was handed over.
    patience: Duration,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(store: Arc<Store>, patience: Duration) -> io::Result<Self> {
        let (jobs, receiver) = channel();
        let (ends, ended) = channel::<()>();
        let room = Arc::new(Semaphore::new(WAITING));
        let given = Arc::clone(&room);
        let thread = std::thread::Builder::new()
            .name("mlx-engine-disk".to_owned())
            .spawn(move || {
                let _ends = ends;
                serve(&store, &given, &receiver);
            })?;
        Ok(Self {
            jobs: Some(jobs),
            room,
            ended,
            patience,
            thread: Some(thread),
        })
    }

    pub(super) fn has_room(&self) -> bool {
        self.room.available_permits() > 0
    }

    /// Ends when there is room.
    pub(super) fn room(&self) -> impl Future<Output = ()> + use<> {
        let room = Arc::clone(&self.room);
        async move {
            // It is never closed, and the permit is given back at once.
            drop(room.acquire().await);
        }
    }

    /// `false` where there is no room.
    pub(super) fn write(&self, job: Job) -> bool {
        let Ok(permit) = self.room.try_acquire() else {
            return false;
        };
        permit.forget();
        if let Some(jobs) = &self.jobs {
            // Where the thread is gone nothing is written, which is a miss.
            let _ = jobs.send(job);
        }
        true
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // What was handed over is written, and nothing else.
        drop(self.jobs.take());
        if matches!(
            self.ended.recv_timeout(self.patience),
            Err(RecvTimeoutError::Timeout)
        ) {
            // A disk that does not answer holds up nobody: the thread ends when it does, and has nothing but the folder.
            tracing::warn!("the disk does not answer; what was computed may not be found again");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // It has no result, and nobody to tell of a panic.
            let _ = thread.join();
        }
    }
}

/// Writes files until nobody hands any over.
fn serve(store: &Store, room: &Semaphore, jobs: &Receiver<Job>) {
    for Job { name, file } in jobs {
        match store.write(&name, &file) {
            Ok(true) => {}
            Ok(false) => tracing::debug!(file = %name, "no room on disk for a prefix"),
            Err(error) => tracing::warn!(file = %name, %error, "a prefix could not be written"),
        }
        room.add_permits(1);
    }
}
