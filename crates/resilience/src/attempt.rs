//! One attempt at a request: its place, its leave, and its limits in time.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use mlx_engine_core::{EngineError, EventStream, GenerateParams, GenerationEvent, LlmEngine, Prompt};
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

/// A request as the engine gets it. One that a recovery ends before it has begun is handed over again.
#[derive(Clone)]
pub(crate) struct Submission {
    engine: Arc<dyn LlmEngine>,
    control: Arc<Control>,
    prompt: Prompt,
    params: GenerateParams,
    /// Recoveries when it was handed over last.
    recoveries: Arc<AtomicU64>,
}

impl Submission {
    pub(crate) fn new(
        engine: Arc<dyn LlmEngine>,
        control: Arc<Control>,
        prompt: Prompt,
        params: GenerateParams,
    ) -> Self {
        let recoveries = Arc::new(AtomicU64::new(control.recoveries()));
        Self {
            engine,
            control,
            prompt,
            params,
            recoveries,
        }
    }

    /// Hands it over, and again as long as recoveries take the engine away.
    pub(crate) async fn submit(&self) -> Result<EventStream, EngineError> {
        loop {
            self.control.recovered().await;
            self.recoveries
                .store(self.control.recoveries(), Ordering::Relaxed);
            match self.engine.stream(self.prompt.clone(), self.params.clone()).await {
                Err(error) if self.was_taken(&error) => {}
                submitted => return submitted,
            }
        }
    }

    /// Whether it was a recovery that took the engine away.
    fn was_taken(&self, error: &EngineError) -> bool {
        let since = self.recoveries.load(Ordering::Relaxed);
        self.control.recoveries() != since && ErrorKind::of(error).class() == ErrorClass::Fault
    }
}

/// The events of an attempt, within their limits.
pub(crate) struct Guarded {
    /// None once the attempt is over: dropping it cancels what runs.
    running: Option<(Running, Place)>,
    submission: Submission,
    /// Whether the engine has begun with it.
    started: bool,
    leave: Leave,
    total: Option<Timer>,
    /// Until the first token, and between two of them after that.
    phase: Option<Timer>,
    between: Option<Duration>,
    begun: bool,
}

enum Running {
    Events(EventStream),
    /// It is handed over again.
    Again(BoxFuture<'static, Result<EventStream, EngineError>>),
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
        submission: Submission,
        place: Place,
        leave: Leave,
        [total, first_token]: [Option<Deadline>; 2],
    ) -> Self {
        let between = submission.control.configuration.timeouts.between_tokens;
        Self {
            running: Some((Running::Events(events), place)),
            submission,
            started: false,
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

    /// Hands the request over again, where a recovery ended it before it had begun.
    fn again(&mut self, error: &EngineError) -> bool {
        let Some((running, _)) = self.running.as_mut().filter(|_| !self.started) else {
            return false;
        };
        let taken = self.submission.was_taken(error);
        if taken {
            let submission = self.submission.clone();
            *running = Running::Again(Box::pin(async move { submission.submit().await }));
        }
        taken
    }

    fn fail(&mut self, error: EngineError) -> Poll<Option<Result<GenerationEvent, EngineError>>> {
        self.running = None;
        Poll::Ready(Some(Err(self.leave.failed(error))))
    }
}

impl Stream for Guarded {
    type Item = Result<GenerationEvent, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = loop {
            let polled = match &mut self.running {
                None => return Poll::Ready(None),
                Some((running, _)) => match running {
                    Running::Events(events) => events.poll_next_unpin(cx),
                    Running::Again(submitted) => match submitted.as_mut().poll(cx) {
                        Poll::Pending => Poll::Pending,
                        Poll::Ready(Err(error)) => Poll::Ready(Some(Err(error))),
                        Poll::Ready(Ok(events)) => {
                            *running = Running::Events(events);
                            continue;
                        }
                    },
                },
            };
            match &polled {
                Poll::Ready(Some(Err(error))) if self.again(error) => {}
                _ => break polled,
            }
        };
        match polled {
            Poll::Pending => self.wait(cx),
            Poll::Ready(Some(Ok(event))) => {
                self.started = true;
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
