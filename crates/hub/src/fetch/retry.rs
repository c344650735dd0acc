//! When to try again.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use crate::HubError;

const FIRST_DELAY: Duration = Duration::from_millis(500);
const LONGEST_DELAY: Duration = Duration::from_secs(30);
/// Whoever wants to be left alone for longer is told to the user instead.
const LONGEST_RETRY_AFTER: Duration = Duration::from_mins(5);

/// The waits between tries: they double, are spread by chance, and are as long as the server wants at least.
#[derive(Debug)]
pub(super) struct Backoff {
    builder: ExponentialBuilder,
    delays: ExponentialBackoff,
}

impl Backoff {
    pub(super) fn new(retries: usize, seed: u64) -> Self {
        let builder = ExponentialBuilder::default()
            .with_min_delay(FIRST_DELAY)
            .with_max_delay(LONGEST_DELAY)
            .with_max_times(retries)
            .with_jitter()
            .with_jitter_seed(seed);
        Self {
            delays: builder.build(),
            builder,
        }
    }

    /// How long to wait after an error; `None` where trying again is no use, or has been tried enough.
    pub(super) fn next(&mut self, error: &HubError) -> Option<Duration> {
        if !error.is_retryable() {
            return None;
        }
        let wanted = error.retry_after().unwrap_or_default();
        if wanted > LONGEST_RETRY_AFTER {
            return None;
        }
        Some(self.delays.next()?.max(wanted))
    }

    /// Begins anew: the last try got on.
    pub(super) fn reset(&mut self) {
        self.delays = self.builder.build();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(seconds: u64) -> HubError {
        HubError::RateLimited {
            retry_after: Some(Duration::from_secs(seconds)),
            message: String::new(),
        }
    }

    #[test]
    fn waits_grow_and_end() {
        let mut backoff = Backoff::new(3, 7);
        let mut delays = || std::iter::from_fn(|| backoff.next(&limited(0))).collect::<Vec<_>>();
        let first = delays();
        assert_eq!(first.len(), 3);
        assert!(
            first[0] >= FIRST_DELAY && first.windows(2).all(|pair| pair[0] < pair[1]),
            "{first:?}"
        );
        assert_eq!(delays(), []);
        backoff.reset();
        assert!(backoff.next(&limited(0)).is_some());
    }

    #[test]
    fn the_server_is_waited_for_within_reason() {
        let mut backoff = Backoff::new(3, 7);
        assert_eq!(backoff.next(&limited(60)), Some(Duration::from_mins(1)));
        assert_eq!(backoff.next(&limited(3600)), None);
        assert_eq!(backoff.next(&HubError::NoCache), None);
    }
}
