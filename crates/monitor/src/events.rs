//! Changes of health, for whoever listens.

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::{self, error::RecvError};

use crate::{EngineHealth, HealthReason};

/// The health of an engine has changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HealthEvent {
    /// Seconds since monitoring began.
    pub at_s: f64,
    /// How it was.
    pub from: EngineHealth,
    /// How it is.
    pub to: EngineHealth,
    /// Why.
    pub reasons: Vec<HealthReason>,
    /// Events before this one that the subscriber was too slow for.
    pub missed: u64,
}

/// The changes of health since it was made.
///
/// It holds [`CAPACITY`](Self::CAPACITY) events. A subscriber that reads too slowly loses the oldest, and hears how many: the
/// last event is always how the engine is now, and the engine waits for nobody.
#[derive(Debug)]
pub struct HealthEvents {
    receiver: broadcast::Receiver<HealthEvent>,
}

impl HealthEvents {
    /// Events that wait for a slow subscriber.
    pub const CAPACITY: usize = 64;

    /// Waits for the next change; `None` once the monitored engine is gone. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<HealthEvent> {
        let mut missed = 0;
        loop {
            match self.receiver.recv().await {
                Ok(event) => return Some(HealthEvent { missed, ..event }),
                Err(RecvError::Lagged(lost)) => missed += lost,
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

/// Who listens.
#[derive(Debug)]
pub(crate) struct Subscribers {
    sender: broadcast::Sender<HealthEvent>,
}

impl Default for Subscribers {
    fn default() -> Self {
        Self {
            sender: broadcast::Sender::new(HealthEvents::CAPACITY),
        }
    }
}

impl Subscribers {
    pub(crate) fn subscribe(&self) -> HealthEvents {
        HealthEvents {
            receiver: self.sender.subscribe(),
        }
    }

    pub(crate) fn publish(&self, event: HealthEvent) {
        // It fails where nobody listens.
        let _ = self.sender.send(event);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn event(at_s: f64) -> HealthEvent {
        HealthEvent {
            at_s,
            from: EngineHealth::Healthy,
            to: EngineHealth::Degraded,
            reasons: Vec::new(),
            missed: 0,
        }
    }

    #[test]
    fn a_slow_subscriber_loses_the_oldest_and_hears_how_many() {
        let subscribers = Subscribers::default();
        let mut slow = subscribers.subscribe();
        for at in 0..HealthEvents::CAPACITY + 3 {
            subscribers.publish(event(at as f64));
        }
        let mut next = || slow.next().now_or_never().flatten();
        let first = next().unwrap();
        assert_eq!((first.at_s, first.missed), (3.0, 3));
        let second = next().unwrap();
        assert_eq!((second.at_s, second.missed), (4.0, 0));
    }

    #[test]
    fn the_events_end_with_the_monitor() {
        let subscribers = Subscribers::default();
        let mut events = subscribers.subscribe();
        assert_eq!(events.next().now_or_never(), None, "nothing has changed");
        subscribers.publish(event(1.0));
        drop(subscribers);
        assert_eq!(events.next().now_or_never(), Some(Some(event(1.0))));
        assert_eq!(events.next().now_or_never(), Some(None));
    }
}
