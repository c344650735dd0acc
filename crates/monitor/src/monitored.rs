//! The wrapper.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use mlx_engine_core::{
    EngineError, EngineWrapper, EventStream, GenerateParams, LlmEngine, ParamError, Prompt,
};

use crate::emit::Telemetry;
use crate::request::{Observed, Ticket};
use crate::shared::{Seen, Shared};
use crate::{
    Clock, DetailedStatus, HealthConfiguration, HealthEvents, HealthReport, InferenceMetrics, ProbeFailure,
    SystemClock, probe,
};

/// An engine that is watched. It answers as the engine in it does, and counts every request once.
///
/// A request begins with the first poll of the future that [`stream`](LlmEngine::stream) or
/// [`generate`](LlmEngine::generate) returns, because a future that nobody polls submits nothing. It ends with
/// `Finished`, an error, a stream that breaks off, or by being dropped. `generate` is always `stream` collected, even
/// where the engine has a way of its own.
///
/// Health is a verdict on what was seen. It is looked at when a request begins or ends, when
/// [`health`](Self::health) is asked for, and after a probe. No thread or timer of its own does so: a program that wants to hear
/// that time has run out on something asks for the health now and then.
#[derive(Debug)]
pub struct Monitored<E> {
    engine: E,
    shared: Arc<Shared>,
}

impl<E: LlmEngine> Monitored<E> {
    /// Watches an engine, with [default thresholds](HealthConfiguration::default).
    pub fn new(engine: E) -> Self {
        MonitoredBuilder::new(engine).finish()
    }

    /// Watches an engine as told.
    pub fn builder(engine: E) -> MonitoredBuilder<E> {
        MonitoredBuilder::new(engine)
    }

    /// The engine itself. What is asked of it directly is not seen here.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    /// What was measured so far.
    pub fn metrics(&self) -> InferenceMetrics {
        self.shared.metrics(&self.seen())
    }

    /// How the engine is, from what is known. Nothing is generated and nobody is waited for.
    pub fn health(&self) -> HealthReport {
        self.shared.health(&self.seen())
    }

    /// How the engine is after it was asked for one token.
    ///
    /// It waits as long as the engine takes; whoever drops it after
    /// [`probe_patience_s`](HealthConfiguration::probe_patience_s) has found the engine degraded. An engine without a
    /// model is not asked.
    pub async fn check_health(&self) -> HealthReport {
        if self.backend().is_some() {
            // What the report says of the probe is in its reasons.
            let _ = self.probe().await;
        }
        self.health()
    }

    /// Asks the engine for one token, which is no request in the [metrics](Self::metrics): it counts as a probe, and health
    /// remembers what came of it.
    ///
    /// # Errors
    ///
    /// Why no token came.
    pub async fn probe(&self) -> Result<(), ProbeFailure> {
        let mut running = RunningProbe {
            monitored: self,
            began: self.shared.now(),
            over: false,
        };
        let result = probe(&self.engine).await;
        running.conclude(result.err());
        result
    }

    /// Whether the engine is not stuck: [`HealthReport::is_live`].
    pub fn is_live(&self) -> bool {
        self.health().is_live()
    }

    /// Whether requests should come here: [`HealthReport::is_ready`].
    pub fn is_ready(&self) -> bool {
        self.health().is_ready()
    }

    /// The changes of health from now on.
    pub fn subscribe(&self) -> HealthEvents {
        self.shared.subscribe()
    }

    /// Everything in one report.
    pub fn detailed_status(&self) -> DetailedStatus {
        let health = self.health();
        let history = self.shared.history();
        DetailedStatus {
            live: health.is_live(),
            ready: health.is_ready(),
            health,
            backend: self.backend(),
            model: self.model().map(Arc::unwrap_or_clone),
            consecutive_failures: history.consecutive_failures,
            last_success_s_ago: history.last_success_s_ago,
            last_failure: history.last_failure,
            last_probe: history.last_probe,
            metrics: self.metrics(),
            configuration: self.shared.limits().clone(),
        }
    }

    /// Metrics and health in Prometheus' text format, version 0.0.4 (`text/plain; version=0.0.4`).
    pub fn prometheus(&self) -> String {
        self.metrics().prometheus(&self.health())
    }

    fn seen(&self) -> Seen {
        Seen::of(&self.engine)
    }
}

/// A probe that runs. Dropping it is giving it up.
struct RunningProbe<'a, E: LlmEngine> {
    monitored: &'a Monitored<E>,
    began: Duration,
    over: bool,
}

impl<E: LlmEngine> RunningProbe<'_, E> {
    fn conclude(&mut self, failure: Option<ProbeFailure>) {
        self.over = true;
        let Monitored { engine, shared } = self.monitored;
        let now = shared.now();
        shared.probed(now, now.saturating_sub(self.began), failure, Seen::of(engine));
    }
}

impl<E: LlmEngine> Drop for RunningProbe<'_, E> {
    fn drop(&mut self) {
        if !self.over {
            let after_s = self
                .monitored
                .shared
                .now()
                .saturating_sub(self.began)
                .as_secs_f64();
            self.conclude(Some(ProbeFailure::Abandoned { after_s }));
        }
    }
}

impl<E: LlmEngine> EngineWrapper for Monitored<E> {
    type Inner = E;

    fn inner(&self) -> &E {
        &self.engine
    }

    fn wrapped_stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        Box::pin(async move {
            let seen = self.seen();
            let telemetry = Telemetry::begin(&prompt, &params, &seen);
            let mut ticket = Ticket::submit(&self.shared, &seen, telemetry);
            let mut admission = self.engine.stream(prompt, params);
            let admitted = poll_fn(|cx| {
                let poll = ticket.scope(|| admission.as_mut().poll(cx));
                match &poll {
                    Poll::Pending => ticket.wait(),
                    Poll::Ready(Ok(_)) => _ = ticket.hear(),
                    Poll::Ready(Err(error)) => ticket.refuse(error),
                }
                poll
            });
            let events = admitted.await?;
            Ok(Observed { events, ticket }.boxed())
        })
    }

    fn wrapped_unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async move {
            let unloaded = self.engine.unload().await;
            self.health();
            unloaded
        })
    }
}

/// How an engine is to be watched.
///
/// ```
/// use std::time::Duration;
/// use mlx_engine_core::{LlmEngine, ParamError};
/// use mlx_engine_monitor::{HealthConfiguration, Monitored};
///
/// fn watch<E: LlmEngine>(engine: E, loading_took: Duration) -> Result<Monitored<E>, ParamError> {
///     let health = HealthConfiguration { window_s: 300.0, ..HealthConfiguration::default() };
///     Monitored::builder(engine).health(health).load_time(loading_took).build()
/// }
/// ```
#[derive(Debug)]
#[must_use]
pub struct MonitoredBuilder<E> {
    engine: E,
    clock: Arc<dyn Clock>,
    health: HealthConfiguration,
    load_time: Option<Duration>,
}

impl<E: LlmEngine> MonitoredBuilder<E> {
    fn new(engine: E) -> Self {
        Self {
            engine,
            clock: Arc::new(SystemClock::new()),
            health: HealthConfiguration::default(),
            load_time: None,
        }
    }

    /// Takes the time from this clock instead of the system's.
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Takes these thresholds.
    pub fn health(mut self, health: HealthConfiguration) -> Self {
        self.health = health;
        self
    }

    /// Says how long loading took. Without it that is known once a request has finished.
    pub fn load_time(mut self, load_time: Duration) -> Self {
        self.load_time = Some(load_time);
        self
    }

    /// Begins to watch.
    ///
    /// # Errors
    ///
    /// The threshold that is out of its range.
    pub fn build(self) -> Result<Monitored<E>, ParamError> {
        self.health.validate()?;
        Ok(self.finish())
    }

    fn finish(self) -> Monitored<E> {
        let seen = Seen::of(&self.engine);
        Monitored {
            shared: Arc::new(Shared::new(self.clock, self.health, self.load_time, seen)),
            engine: self.engine,
        }
    }
}
