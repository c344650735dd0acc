//! Time, chance and room, handed in, so that a test decides about them and never sleeps.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use futures::future::BoxFuture;

/// What fetching asks of the machine besides files and the network.
pub trait HubSystem: fmt::Debug + Send + Sync {
    /// The time since an origin of its own.
    fn now(&self) -> Duration;

    /// The time of day.
    fn time_of_day(&self) -> SystemTime;

    /// Lets time pass.
    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()>;

    /// A seed, which spreads the waits of many programs.
    fn seed(&self) -> u64;

    /// Bytes that may still be written to the disk of a folder.
    ///
    /// # Errors
    ///
    /// What the disk says.
    fn available_space(&self, folder: &Path) -> io::Result<u64>;
}

/// The machine itself.
#[derive(Clone, Copy, Debug)]
pub struct RealSystem {
    origin: Instant,
}

impl RealSystem {
    /// The machine, whose time begins now.
    pub fn new() -> Self {
        Self {
            origin: Instant::now(),
        }
    }
}

impl Default for RealSystem {
    fn default() -> Self {
        Self::new()
    }
}

impl HubSystem for RealSystem {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn time_of_day(&self) -> SystemTime {
        SystemTime::now()
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(time))
    }

    fn seed(&self) -> u64 {
        use std::hash::{BuildHasher, Hasher, RandomState};
        RandomState::new().build_hasher().finish()
    }

    fn available_space(&self, folder: &Path) -> io::Result<u64> {
        fs4::available_space(folder)
    }
}
