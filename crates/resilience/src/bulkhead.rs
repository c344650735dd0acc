//! How many requests the engine has at the same time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mlx_engine_core::EngineError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::BulkheadConfiguration;

/// When a place may be free.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Places at the engine, and in the queue for them. Who waits longest is served first.
#[derive(Debug)]
pub(crate) struct Bulkhead {
    places: Arc<Semaphore>,
    waiting: AtomicUsize,
    configuration: BulkheadConfiguration,
}

/// A place at the engine, free again when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Bulkhead {
    pub(crate) fn new(configuration: BulkheadConfiguration) -> Self {
        let places = configuration.max_concurrent.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            places: Arc::new(Semaphore::new(places)),
            waiting: AtomicUsize::new(0),
            configuration,
        }
    }

    /// Waits for a place. Dropping the future gives the wait up.
    ///
    /// # Errors
    ///
    /// [`EngineError::QueueFull`] where as many wait as may.
    pub(crate) async fn enter(&self) -> Result<Place, EngineError> {
        if let Ok(permit) = Arc::clone(&self.places).try_acquire_owned() {
            return Ok(Place { _permit: permit });
        }
        let one_more = |waiting: usize| (waiting < self.configuration.max_waiting).then_some(waiting + 1);
        self.waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .map_err(|_| EngineError::QueueFull {
                retry_after: RETRY_AFTER,
            })?;
        let _waits = Waits(&self.waiting);
        let permit = Arc::clone(&self.places).acquire_owned().await;
        let permit = permit.map_err(|_| EngineError::internal("the bulkhead was closed"))?;
        Ok(Place { _permit: permit })
    }

    /// Requests that the engine has.
    pub(crate) fn running(&self) -> usize {
        self.configuration
            .max_concurrent
            .saturating_sub(self.places.available_permits())
    }

    /// Requests that wait for a place.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// One who waits.
struct Waits<'a>(&'a AtomicUsize);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn places_are_given_in_turn_and_given_back() {
        let bulkhead = Bulkhead::new(BulkheadConfiguration {
            max_concurrent: 1,
            max_waiting: 2,
        });
        let first = bulkhead.enter().now_or_never().unwrap().unwrap();
        let mut second = Box::pin(bulkhead.enter());
        let mut third = Box::pin(bulkhead.enter());
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        assert_eq!((bulkhead.running(), bulkhead.waiting()), (1, 2));
        let refused = bulkhead.enter().now_or_never().unwrap().unwrap_err();
        assert!(matches!(refused, EngineError::QueueFull { .. }));
        drop(first);
        assert!((&mut third).now_or_never().is_none(), "the second is first");
        drop(second);
        let place = third.now_or_never().unwrap().unwrap();
        assert_eq!((bulkhead.running(), bulkhead.waiting()), (1, 0));
        drop(place);
        assert_eq!(bulkhead.running(), 0);
    }
}
