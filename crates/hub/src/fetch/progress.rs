//! What is told while files are fetched.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use super::HubSystem;
use crate::RepoPath;

/// Something that happened while files were fetched.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum FetchEvent {
    /// It is known what is to be fetched.
    Planned {
        /// How many files are wanted.
        files: usize,
        /// The bytes of them all.
        bytes: u64,
        /// Bytes of them that are here already, from an earlier try too.
        present: u64,
    },
    /// Bytes have come.
    Progress(FetchProgress),
    /// Bytes that are here already are compared with their hash.
    Checking {
        /// The file, or the repository where all its files are compared.
        file: String,
        /// Bytes that were read.
        done: u64,
        /// Bytes to read.
        bytes: u64,
    },
    /// Another program is at the same file.
    Waiting {
        /// What it is at.
        file: String,
        /// Who it is, as far as is known.
        holder: String,
    },
    /// A try failed, and another will be made.
    Retrying {
        /// What failed.
        file: String,
        /// Why.
        reason: String,
        /// How long is waited first.
        after: Duration,
    },
    /// A file is here whole, with the right length and hash.
    Fetched {
        /// The file.
        file: RepoPath,
    },
    /// The hub could not be asked, and what the cache has is taken.
    FromCache {
        /// Why.
        reason: String,
    },
}

/// How far the fetching has come.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct FetchProgress {
    /// The file that bytes came of.
    pub file: RepoPath,
    /// Its bytes that are here.
    pub file_done: u64,
    /// All its bytes.
    pub file_bytes: u64,
    /// Bytes of all files that are here.
    pub done: u64,
    /// The bytes of all files.
    pub bytes: u64,
    /// Bytes a second that came of late; 0 before the first second is over.
    pub bytes_per_second: u64,
    /// What is left, at this rate.
    pub remaining: Option<Duration>,
}

/// So much of the past says how fast it goes.
const WINDOW: Duration = Duration::from_secs(10);
/// Before so much time is over, a rate is chance.
const SHORTEST: Duration = Duration::from_secs(1);
/// So often is told how far it has come.
const EVERY: Duration = Duration::from_millis(100);

/// Whom events are told.
pub(super) type Listener<'a> = &'a (dyn Fn(FetchEvent) + Send + Sync);

/// Counts what comes.
pub(super) struct Meter<'a> {
    tell: Listener<'a>,
    system: Arc<dyn HubSystem>,
    state: Mutex<State>,
}

struct State {
    done: u64,
    total: u64,
    /// Bytes that came over the network, in all.
    received: u64,
    /// When so many had been received.
    window: VecDeque<(Duration, u64)>,
    told: Option<Duration>,
}

impl<'a> Meter<'a> {
    /// A meter of files with `total` bytes, of which none is here until [`correct`](Self::correct) says so.
    pub(super) fn new(tell: Listener<'a>, system: Arc<dyn HubSystem>, total: u64) -> Self {
        let state = State {
            done: 0,
            total,
            received: 0,
            window: VecDeque::from([(system.now(), 0)]),
            told: None,
        };
        Self {
            tell,
            system,
            state: Mutex::new(state),
        }
    }

    pub(super) fn tell(&self, event: FetchEvent) {
        (self.tell)(event);
    }

    /// Bytes of a file have come.
    pub(super) fn add(&self, file: &RepoPath, file_done: u64, file_bytes: u64, count: u64) {
        let mut state = self.state();
        state.done += count;
        state.received += count;
        let now = self.system.now();
        let due = state.told.is_none_or(|told| now.saturating_sub(told) >= EVERY);
        if !due && file_done < file_bytes {
            return;
        }
        state.told = Some(now);
        let bytes_per_second = state.rate(now);
        let left = state.total.saturating_sub(state.done);
        let progress = FetchProgress {
            file: file.clone(),
            file_done,
            file_bytes,
            done: state.done,
            bytes: state.total,
            bytes_per_second,
            remaining: (bytes_per_second > 0).then(|| Duration::from_secs(left.div_ceil(bytes_per_second))),
        };
        drop(state);
        self.tell(FetchEvent::Progress(progress));
    }

    /// Bytes that were counted are not here after all, or are here without having come.
    pub(super) fn correct(&self, by: i64) {
        let mut state = self.state();
        state.done = state.done.saturating_add_signed(by);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Bytes a second over the window.
    fn rate(&mut self, now: Duration) -> u64 {
        self.window.push_back((now, self.received));
        while self.window.len() > 2 && now.saturating_sub(self.window[1].0) >= WINDOW {
            self.window.pop_front();
        }
        let (then, received) = self.window[0];
        let span = now.saturating_sub(then);
        if span < SHORTEST {
            return 0;
        }
        ((self.received - received) as f64 / span.as_secs_f64()) as u64
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::SystemTime;

    use futures::future::BoxFuture;

    use super::*;

    /// A system whose time is set by hand, in milliseconds.
    #[derive(Debug, Default)]
    struct ByHand(AtomicU64);

    impl HubSystem for ByHand {
        fn now(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::Relaxed))
        }

        fn time_of_day(&self) -> SystemTime {
            SystemTime::UNIX_EPOCH
        }

        fn sleep(&self, _time: Duration) -> BoxFuture<'static, ()> {
            Box::pin(futures::future::ready(()))
        }

        fn seed(&self) -> u64 {
            1
        }

        fn available_space(&self, _folder: &Path) -> io::Result<u64> {
            Ok(0)
        }
    }

    #[test]
    fn the_rate_is_that_of_late_and_without_what_was_here() {
        let system = Arc::new(ByHand::default());
        let told = Mutex::new(Vec::new());
        let listen = |event| {
            if let FetchEvent::Progress(progress) = event {
                told.lock().unwrap().push(progress);
            }
        };
        let meter = Meter::new(&listen, Arc::clone(&system) as Arc<dyn HubSystem>, 2_000_000);
        meter.correct(1_000_000);
        let file: RepoPath = "x".parse().unwrap();
        // 10 kB each 100 ms, then 1 kB each.
        for step in 1..=300 {
            system.0.store(step * 100, Ordering::Relaxed);
            let count = if step <= 50 { 10_000 } else { 1_000 };
            meter.add(&file, step, 1_000_000, count);
        }
        let told = told.lock().unwrap();
        assert_eq!(told.len(), 300);
        assert_eq!((told[5].bytes_per_second, told[5].remaining), (0, None));
        assert_eq!(told[40].bytes_per_second, 100_000);
        assert_eq!(told[40].remaining, Some(Duration::from_secs(6)));
        assert_eq!((told[299].done, told[299].bytes), (1_750_000, 2_000_000));
        assert_eq!(told[299].bytes_per_second, 10_000);
        assert_eq!(told[299].remaining, Some(Duration::from_secs(25)));
    }

    #[test]
    fn a_file_that_ends_is_told_at_once() {
        let system = Arc::new(ByHand::default());
        let told = Mutex::new(0);
        let listen = |_| *told.lock().unwrap() += 1;
        let meter = Meter::new(&listen, system, 100);
        let file: RepoPath = "x".parse().unwrap();
        for done in 1..=10 {
            meter.add(&file, done, 10, 1);
        }
        meter.correct(-3);
        assert_eq!(meter.state().done, 7);
        assert_eq!(*told.lock().unwrap(), 2, "the first and the last");
    }
}
