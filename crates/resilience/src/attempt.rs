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

    /// What is left of it.
    fn left(self) -> Result<Duration, EngineError> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.exceeded());
        }
        Ok(left)
    }

    pub(crate) fn exceeded(self) -> EngineError {
        EngineError::DeadlineExceeded { limit: self.limit }
    }

    /// Waits for a future until the deadline.
    pub(crate) async fn enforce<T>(
        deadline: Option<Self>,
        work: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        Self::enforce_or(deadline, || {}, work).await
    }

    /// The same, telling where the future did not come to its end.
    pub(crate) async fn enforce_or<T>(
        deadline: Option<Self>,
        late: impl FnOnce(),
        work: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        match deadline {
            Some(deadline) => {
                let done = tokio::time::timeout_at(deadline.at, work).await;
                done.unwrap_or_else(|_| {
                    late();
                    Err(deadline.exceeded())
                })
            }
            None => work.await,
        }
    }
}

/// How long a caller waits for an answer, from when it asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// When the answer has to be over: as the caller or the configuration says, whichever is sooner.
    pub(crate) total: Option<Deadline>,
    /// What the caller says of it.
    own: Option<Deadline>,
}

impl Patience {
    pub(crate) fn new(total: Option<Duration>, params: &GenerateParams) -> Self {
        let own = Deadline::after(seconds(params.timeout_s));
        let total = Deadline::after(total);
        Self {
            total: sooner(own, total),
            own,
        }
    }

    /// One attempt begins to wait for its turn.
    pub(crate) fn attempt(self, params: &GenerateParams) -> AttemptLimits {
        AttemptLimits {
            patience: self,
            queue: Deadline::after(seconds(params.queue_timeout_s)),
        }
    }
}

/// Until when one attempt may wait for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttemptLimits {
    patience: Patience,
    /// When it has to have begun, as the caller says.
    queue: Option<Deadline>,
}

impl AttemptLimits {
    /// Until when it may wait for its turn.
    pub(crate) fn turn(self) -> Option<Deadline> {
        sooner(self.patience.total, self.queue)
    }

    /// What the engine is asked: what the caller asks, in what is left of its time.
    fn left(self, params: &GenerateParams) -> Result<GenerateParams, EngineError> {
        let mut params = params.clone();
        if let Some(own) = self.patience.own {
            params.timeout_s = Some(own.left()?.as_secs_f64());
        }
        if let Some(queue) = self.queue {
            params.queue_timeout_s = Some(queue.left()?.as_secs_f64());
        }
        Ok(params)
    }

    /// An error of the engine's in the caller's words: it was handed less time than the caller gave.
    fn of_caller(self, error: EngineError) -> EngineError {
        let over = |deadline: &Deadline| Instant::now() >= deadline.at;
        match error {
            EngineError::DeadlineExceeded { .. } => {
                let own = self.patience.own.filter(over);
                let deadline = own.or(self.queue.filter(over));
                deadline.map_or(error, Deadline::exceeded)
            }
            error => error,
        }
    }
}

/// A time of the caller's; none where it is no time, which the engine refuses.
fn seconds(seconds: Option<f64>) -> Option<Duration> {
    let limit = Duration::try_from_secs_f64(seconds?).ok()?;
    (!limit.is_zero()).then_some(limit)
}

fn sooner(one: Option<Deadline>, other: Option<Deadline>) -> Option<Deadline> {
    one.into_iter().chain(other).min_by_key(|deadline| deadline.at)
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
        // Where nothing was loaded there is nothing that could be broken.
        let absent = kind == ErrorKind::NotLoaded && !self.control.can_recover();
        self.settle(if kind.class() == ErrorClass::Fault && !absent {
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
    limits: AttemptLimits,
    /// Recoveries when it was handed over last.
    recoveries: Arc<AtomicU64>,
}

impl Submission {
    pub(crate) fn new(
        engine: Arc<dyn LlmEngine>,
        control: Arc<Control>,
        prompt: Prompt,
        params: GenerateParams,
        limits: AttemptLimits,
    ) -> Self {
        let recoveries = Arc::new(AtomicU64::new(control.recoveries()));
        Self {
            engine,
            control,
            prompt,
            params,
            limits,
            recoveries,
        }
    }

    /// Hands it over, and again as long as recoveries take the engine away.
    pub(crate) async fn submit(&self) -> Result<EventStream, EngineError> {
        let submit = async {
            loop {
                self.control.recovered().await;
                self.recoveries
                    .store(self.control.recoveries(), Ordering::Relaxed);
                let params = self.limits.left(&self.params)?;
                match self.engine.stream(self.prompt.clone(), params).await {
                    Err(error) if self.was_taken(&error) => self.count_again(),
                    submitted => return submitted.map_err(|error| self.limits.of_caller(error)),
                }
            }
        };
        let late = || self.control.count(|counts| &mut counts.timed_out);
        Deadline::enforce_or(self.limits.turn(), late, submit).await
    }

    fn count_again(&self) {
        self.control.count(|counts| &mut counts.handed_over_again);
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
    /// Until the engine has begun with it.
    queue: Option<Timer>,
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
        first_token: Option<Deadline>,
    ) -> Self {
        let between = submission.control.configuration.timeouts.between_tokens;
        let AttemptLimits { patience, queue } = submission.limits;
        Self {
            running: Some((Running::Events(events), place)),
            submission,
            started: false,
            leave,
            total: patience.total.map(Timer::until),
            queue: queue.map(Timer::until),
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
        } else if let Some(limit) = Timer::poll(self.queue.as_mut(), cx) {
            // Nor is a long queue.
            self.leave.gave_up();
            limit
        } else {
            return Poll::Pending;
        };
        self.running = None;
        self.submission.control.count(|counts| &mut counts.timed_out);
        Poll::Ready(Some(Err(EngineError::DeadlineExceeded { limit })))
    }

    /// Hands the request over again, where a recovery ended it before it had begun.
    fn again(&mut self, error: &EngineError) -> bool {
        let Some((running, _)) = self.running.as_mut().filter(|_| !self.started) else {
            return false;
        };
        let taken = self.submission.was_taken(error);
        if taken {
            self.submission.count_again();
            let submission = self.submission.clone();
            *running = Running::Again(Box::pin(async move { submission.submit().await }));
        }
        taken
    }

    fn fail(&mut self, error: EngineError) -> Poll<Option<Result<GenerationEvent, EngineError>>> {
        self.running = None;
        let error = self.submission.limits.of_caller(error);
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
                self.queue = None;
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
