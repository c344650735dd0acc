//! What all requests of an engine share: the circuit, the places, the budget, and the recovery that runs.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use mlx_engine_core::{EngineError, GenerateParams};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::attempt::{Deadline, Leave, Patience};
use crate::breaker::{CircuitBreaker, Pass, Verdict};
use crate::bulkhead::{Bulkhead, Place};
use crate::recovery::{self, AutomaticLimit, Occasion};
use crate::retry::{Budget, chance, delay};
use crate::{Recover, RecoveryReport, RecoveryStep, ResilienceConfiguration, ResilienceCounts};

pub(crate) struct Control {
    pub(crate) configuration: ResilienceConfiguration,
    pub(crate) bulkhead: Bulkhead,
    /// Whether a recovery runs.
    pub(crate) recovering: watch::Sender<bool>,
    recoverer: Arc<dyn Recover>,
    origin: Instant,
    state: Mutex<State>,
    /// Recoveries that took a step.
    recoveries: AtomicU64,
    one_recovery: tokio::sync::Mutex<()>,
    /// Whether somebody looks for a hang.
    watched: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) breaker: CircuitBreaker,
    pub(crate) budget: Budget,
    pub(crate) last_recovery: Option<RecoveryReport>,
    pub(crate) counts: ResilienceCounts,
    automatic: AutomaticLimit,
    /// Which engine the breaker knows, by how often another one was put in its place.
    renewals: u64,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("configuration", &self.configuration)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Control {
    pub(crate) fn new(recoverer: Arc<dyn Recover>, configuration: ResilienceConfiguration) -> Self {
        Self {
            bulkhead: Bulkhead::new(configuration.bulkhead.clone()),
            recovering: watch::Sender::new(false),
            origin: Instant::now(),
            state: Mutex::new(State {
                breaker: CircuitBreaker::new(configuration.breaker.clone()),
                budget: Budget::new(&configuration.retry.budget),
                last_recovery: None,
                counts: ResilienceCounts::default(),
                automatic: AutomaticLimit::new(&configuration.recovery),
                renewals: recoverer.renewals(),
            }),
            recoveries: AtomicU64::new(0),
            one_recovery: tokio::sync::Mutex::default(),
            watched: AtomicBool::new(false),
            recoverer,
            configuration,
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state for the engine that is there now: what failed before another one was put in its place says nothing about it.
    pub(crate) fn current(&self) -> MutexGuard<'_, State> {
        let renewals = self.recoverer.renewals();
        let mut state = self.lock();
        // One who asked before another did may come after it.
        if renewals > state.renewals {
            state.renewals = renewals;
            state.breaker.reset();
        }
        state
    }

    pub(crate) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    pub(crate) fn recoveries(&self) -> u64 {
        self.recoveries.load(Ordering::Acquire)
    }

    /// How long a request that comes now may take.
    pub(crate) fn patience(&self, params: &GenerateParams) -> Patience {
        Patience::new(self.configuration.timeouts.total, params)
    }

    /// Waits while a recovery runs.
    pub(crate) async fn recovered(&self) {
        // It fails where the sender is gone, which is here.
        let _ = self
            .recovering
            .subscribe()
            .wait_for(|recovering| !recovering)
            .await;
    }

    /// Whether there is anything that a recovery could do.
    pub(crate) fn can_recover(&self) -> bool {
        RecoveryStep::ALL.into_iter().any(|step| self.recoverer.can(step))
    }

    /// Counts what became of a request.
    pub(crate) fn count(&self, which: impl FnOnce(&mut ResilienceCounts) -> &mut u64) {
        *which(&mut self.lock().counts) += 1;
    }

    /// Waits for a place at the engine.
    pub(crate) async fn place(&self) -> Result<Place, EngineError> {
        let place = self.bulkhead.enter().await;
        if let Err(EngineError::QueueFull { .. }) = &place {
            self.count(|counts| &mut counts.refused_by_bulkhead);
        }
        place
    }

    /// Asks the breaker for leave to send a request.
    pub(crate) fn leave(self: &Arc<Self>) -> Result<Leave, EngineError> {
        let admitted = self.current().breaker.admit(self.now());
        let pass = admitted.map_err(|retry_after| {
            self.count(|counts| &mut counts.refused_by_breaker);
            EngineError::Unavailable {
                reason: "too many requests failed lately".to_owned(),
                retry_after,
            }
        })?;
        Ok(Leave::new(Arc::clone(self), pass))
    }

    /// Hears what came of a request.
    pub(crate) fn record(self: &Arc<Self>, pass: Pass, verdict: Verdict) {
        let now = self.now();
        let begin = {
            let mut state = self.lock();
            let opened = state.breaker.record(now, pass, verdict);
            opened && state.automatic.begin(now)
        };
        // A request may be dropped where no runtime is.
        if begin && let Ok(runtime) = tokio::runtime::Handle::try_current() {
            tracing::warn!("too many requests failed, recovery begins");
            let control = Arc::clone(self);
            // Before anybody is told that the circuit is open: requests wait for the recovery instead.
            let gate = Gate::close(self);
            runtime.spawn(async move {
                control.recover(Occasion::Failures).await;
                drop(gate);
            });
        }
    }

    /// Runs a request until it succeeds or nothing speaks for another try.
    pub(crate) async fn with_retry<'a, T>(
        &self,
        total: Option<Deadline>,
        run: impl Fn() -> BoxFuture<'a, Result<T, EngineError>> + Send + Sync,
    ) -> Result<T, EngineError> {
        self.lock().budget.deposit();
        let mut retries = 0;
        loop {
            let error = match run().await {
                Ok(result) => return Ok(result),
                Err(error) => error,
            };
            let Some(wait) = self.wait(&error, retries, total) else {
                return Err(error);
            };
            tracing::debug!(%error, ?wait, retries, "request is tried again");
            sleep(wait).await;
            retries += 1;
            self.count(|counts| &mut counts.retried);
        }
    }

    /// How long to wait before another try; `None` where there is to be none.
    fn wait(&self, error: &EngineError, retries: u32, total: Option<Deadline>) -> Option<Duration> {
        let configuration = &self.configuration.retry;
        if !error.is_retryable() || retries >= configuration.max_retries {
            return None;
        }
        let wait = delay(configuration, retries, chance(), error.retry_after());
        let again = Instant::now().checked_add(wait)?;
        let in_time = total.is_none_or(|total| again < total.at);
        (in_time && self.lock().budget.withdraw()).then_some(wait)
    }

    /// Looks for a hang from now on, as long as there are requests.
    pub(crate) fn watch(self: &Arc<Self>) {
        let recovery = &self.configuration.recovery;
        let Some(limit) = recovery.hang_limit.filter(|_| recovery.automatic) else {
            return;
        };
        if !self.watched.swap(true, Ordering::AcqRel)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let watch = Watch {
                control: Arc::downgrade(self),
                looks: true,
            };
            runtime.spawn(watch.run(limit));
        }
    }

    /// Looks for a hang no longer; false where one more look is needed.
    ///
    /// A request takes its place and then asks whether somebody looks. One that came before this has said yes here has its place, which is
    /// seen after that; one that comes later finds nobody, and begins to look itself.
    fn look_away(&self) -> bool {
        // Reading what the request wrote is what makes its place seen.
        self.watched.swap(false, Ordering::AcqRel);
        self.bulkhead.running() == 0 || self.watched.swap(true, Ordering::AcqRel)
    }

    pub(crate) async fn recover(self: &Arc<Self>, occasion: Occasion) -> RecoveryReport {
        let _one = self.one_recovery.lock().await;
        let _gate = Gate::close(self);
        let begins = || {
            self.recoveries.fetch_add(1, Ordering::AcqRel);
        };
        let configuration = &self.configuration.recovery;
        let report = recovery::run(&*self.recoverer, configuration, occasion, begins).await;
        let mut state = self.lock();
        if report.recovered {
            state.breaker.reset();
        }
        state.last_recovery = Some(report.clone());
        report
    }
}

/// Looks for a hang. It ends with the last request, or with its runtime, and begins anew with the next request. It keeps no
/// engine alive.
struct Watch {
    control: Weak<Control>,
    /// Whether it is the one that looks.
    looks: bool,
}

impl Watch {
    async fn run(mut self, limit: Duration) {
        // A hang is found within a quarter of its limit.
        let tick = (limit / 4).max(Duration::from_millis(1));
        loop {
            sleep(tick).await;
            let Some(control) = self.control.upgrade() else {
                return;
            };
            if control.bulkhead.running() == 0 && control.look_away() {
                self.looks = false;
                return;
            }
            let statistics = control.recoverer.statistics();
            let turn = statistics
                .and_then(|statistics| statistics.turn_s)
                .unwrap_or_default();
            let turn = Duration::try_from_secs_f64(turn).unwrap_or(Duration::MAX);
            if turn < limit || *control.recovering.borrow() {
                continue;
            }
            if control.lock().automatic.begin(control.now()) {
                tracing::error!(?turn, "the engine hangs, recovery begins");
                control.recover(Occasion::Hang { turn }).await;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Its runtime has ended.
        if self.looks
            && let Some(control) = self.control.upgrade()
        {
            control.watched.store(false, Ordering::Release);
        }
    }
}

/// Holds new requests back until it is dropped.
struct Gate(Arc<Control>);

impl Gate {
    fn close(control: &Arc<Control>) -> Self {
        control.recovering.send_replace(true);
        Self(Arc::clone(control))
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.0.recovering.send_replace(false);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use futures::future::BoxFuture;
    use mlx_engine_core::{Backend, EventStream, LlmEngine, ModelConfiguration, Prompt};

    use super::*;
    use crate::recovery::Unrecoverable;

    struct Nothing;

    impl LlmEngine for Nothing {
        fn stream(&self, _: Prompt, _: GenerateParams) -> BoxFuture<'_, Result<EventStream, EngineError>> {
            Box::pin(async { Err(EngineError::EmptyPrompt) })
        }

        fn backend(&self) -> Option<Backend> {
            None
        }

        fn model(&self) -> Option<Arc<ModelConfiguration>> {
            None
        }

        fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
            Box::pin(async { Ok(()) })
        }
    }

    #[tokio::test]
    async fn who_looks_for_a_hang_looks_away_only_where_nobody_came_meanwhile() {
        let recoverer = Arc::new(Unrecoverable(Arc::new(Nothing)));
        let control = Control::new(recoverer, ResilienceConfiguration::default());
        control.watched.store(true, Ordering::Release);
        // One came after the last look, and heard that somebody looks.
        let place = control
            .bulkhead
            .enter()
            .now_or_never()
            .expect("at once")
            .expect("a place");
        assert!(!control.look_away());
        assert!(control.watched.load(Ordering::Acquire), "it goes on");
        drop(place);
        assert!(control.look_away());
        assert!(!control.watched.load(Ordering::Acquire), "the next begins anew");
    }
}
