//! Where the worker has the time from.

use std::time::Instant;

/// A monotonic clock. It is handed in, so that a test decides what time it is.
pub(crate) trait Clock: Send {
    fn now(&self) -> Instant;
}

/// The clock of the system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}
