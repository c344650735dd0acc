//! One attempt at a request: its place, its leave, and its limits in time.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use mlx_engine_core::{EngineError, EventStream, GenerationEvent};
use mlx_engine_monitor::{ErrorClass, ErrorKind};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use crate::breaker::{Pass, Verdict};
use crate::bulkhead::Place;
use crate::control::Control;

/// When something has to be over, and the time that was given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    pub(crate) limit: Duration,
}

impl Deadline {
    /// As long after now. A limit beyond what the clock holds is none.
    pub(crate) fn after(limit: Option<Duration>) -> Option<Self> {
        let limit = limit?;
        let at = Instant::now().checked_add(limit)?;
        Some(Self { at, limit })
    }

    pub(crate) fn exceeded(self) -> EngineError {
        EngineError::DeadlineExceeded { limit: self.limit }
    }

    /// Waits for a future until the deadline.
    pub(crate) async fn enforce<T>(
        deadline: Option<Self>,
        work: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        match deadline {
            Some(deadline) => {
                let done = tokio::time::timeout_at(deadline.at, work).await;
                done.unwrap_or_else(|_| Err(deadline.exceeded()))
            }
            None => work.await,
        }
    }
}

/// Leave from the breaker that has to be answered for. Dropping it says nothing about the engine.
pub(crate) struct Leave {
    control: Arc<Control>,
    pass: Option<Pass>,
    /// Recoveries when it was given.
    recoveries: u64,
}

impl Leave {
    pub(crate) fn new(control: Arc<Control>, pass: Pass) -> Self {
        let recoveries = control.recoveries();
        Self {
            control,
            pass: Some(pass),
            recoveries,
        }
    }

    pub(crate) fn succeeded(&mut self) {
        self.settle(Verdict::Success);
    }

    /// The attempt ended in an error. It is returned, or what it really says.
    pub(crate) fn failed(&mut self, error: EngineError) -> EngineError {
        let kind = ErrorKind::of(&error);
        if self.control.recoveries() != self.recoveries && kind.class() == ErrorClass::Fault {
            // Recovery took the engine away under it.
            self.settle(Verdict::Nothing);
            return EngineError::Unavailable {
                reason: "it was recovered while the request ran".to_owned(),
                retry_after: Duration::ZERO,
            };
        }
        self.settle(if kind.class() == ErrorClass::Fault {
            Verdict::Fault
        } else {
            Verdict::Nothing
        });
        error
    }

    /// The engine took longer than it may, which is a fault of the engine and not of the caller.
    pub(crate) fn timed_out(&mut self) {
        self.settle(Verdict::Fault);
    }

    /// The time of the caller is over, which says nothing about the engine.
    pub(crate) fn gave_up(&mut self) {
        self.settle(Verdict::Nothing);
    }

    fn settle(&mut self, verdict: Verdict) {
        if let Some(pass) = self.pass.take() {
            self.control.record(pass, verdict);
        }
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.settle(Verdict::Nothing);
    }
}

/// The events of an attempt, within their limits.
pub(crate) struct Guarded {
    /// None once the attempt is over: dropping it cancels what runs.
    running: Option<(EventStream, Place)>,
    leave: Leave,
    total: Option<Timer>,
    /// Until the first token, and between two of them after that.
    phase: Option<Timer>,
    between: Option<Duration>,
    begun: bool,
}

struct Timer {
    sleep: Pin<Box<Sleep>>,
    limit: Duration,
}

impl Timer {
    fn until(deadline: Deadline) -> Self {
        Self {
            sleep: Box::pin(sleep_until(deadline.at)),
            limit: deadline.limit,
        }
    }

    /// The limit, where it is over.
    fn poll(timer: Option<&mut Self>, cx: &mut Context<'_>) -> Option<Duration> {
        let timer = timer?;
        timer.sleep.as_mut().poll(cx).is_ready().then_some(timer.limit)
    }
}

impl Guarded {
    pub(crate) fn new(
        events: EventStream,
        place: Place,
        leave: Leave,
        total: Option<Deadline>,
        first_token: Option<Deadline>,
        between: Option<Duration>,
    ) -> Self {
        Self {
            running: Some((events, place)),
            leave,
            total: total.map(Timer::until),
            phase: first_token.map(Timer::until),
            between,
            begun: false,
        }
    }

    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<GenerationEvent, EngineError>>> {
        if self.begun && self.phase.is_none() {
            // From when the caller waits: how long it takes over an event is its own affair.
            self.phase = self.between.map(|limit| Timer {
                sleep: Box::pin(sleep(limit)),
                limit,
            });
        }
        let limit = if let Some(limit) = Timer::poll(self.phase.as_mut(), cx) {
            self.leave.timed_out();
            limit
        } else if let Some(limit) = Timer::poll(self.total.as_mut(), cx) {
            // A long answer is no fault.
            self.leave.gave_up();
            limit
        } else {
            return Poll::Pending;
        };
        self.running = None;
        Poll::Ready(Some(Err(EngineError::DeadlineExceeded { limit })))
    }

    fn fail(&mut self, error: EngineError) -> Poll<Option<Result<GenerationEvent, EngineError>>> {
        self.running = None;
        Poll::Ready(Some(Err(self.leave.failed(error))))
    }
}

impl Stream for Guarded {
    type Item = Result<GenerationEvent, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some((events, _)) = &mut self.running else {
            return Poll::Ready(None);
        };
        match events.poll_next_unpin(cx) {
            Poll::Pending => self.wait(cx),
            Poll::Ready(Some(Ok(event))) => {
                match event {
                    GenerationEvent::Started { .. } => {}
                    GenerationEvent::Finished(_) => {
                        self.running = None;
                        self.leave.succeeded();
                    }
                    _ => {
                        self.begun = true;
                        self.phase = None;
                    }
                }
                Poll::Ready(Some(Ok(event)))
            }
            Poll::Ready(Some(Err(error))) => self.fail(error),
            Poll::Ready(None) => self.fail(EngineError::internal(
                "event stream ended without a finished event",
            )),
        }
    }
}
