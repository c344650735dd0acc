//! The wrapper.

use std::fmt::{self, Write};
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{StreamExt, stream};
use mlx_engine_core::{
    EngineError, EngineWrapper, EventStream, GenerateOutput, GenerateParams, GenerationEvent, LlmEngine,
    ParamError, Prompt, collect_events,
};
use serde::{Deserialize, Serialize};

use crate::attempt::{Deadline, Guarded, Patience, Submission};
use crate::control::Control;
use crate::recovery::{Occasion, Unrecoverable};
use crate::{BreakerState, Recover, RecoveryReport, ResilienceConfiguration};

/// An engine that is protected from too much at once and from being asked when it cannot answer, whose requests can be tried
/// again, and that can be brought back.
///
/// [`stream`](LlmEngine::stream) and [`generate`](LlmEngine::generate) try once. Clones are the same engine.
///
/// A request waits while a recovery runs, then for a place in the bulkhead. Its own
/// [`timeout_s`](GenerateParams::timeout_s) holds for all of it together, waits and retries included, and its
/// [`queue_timeout_s`](GenerateParams::queue_timeout_s) for the wait of each attempt; the engine gets what is left of them. The breaker counts what finishes as a
/// success, and as a fault what fails by a [fault of the engine](mlx_engine_monitor::ErrorClass::Fault) or takes longer than it
/// may; an error of the caller's and an engine that is full say nothing. A request that a recovery ends is
/// [`Unavailable`](EngineError::Unavailable) and may be tried again; one that had not begun is handed over again by itself.
#[derive(Debug)]
pub struct Resilient<E> {
    engine: Arc<E>,
    control: Arc<Control>,
}

impl<E> Clone for Resilient<E> {
    fn clone(&self) -> Self {
        Self {
            engine: Arc::clone(&self.engine),
            control: Arc::clone(&self.control),
        }
    }
}

impl<E: LlmEngine + 'static> Resilient<E> {
    /// Protects an engine that cannot be recovered, with the [defaults](ResilienceConfiguration::default).
    pub fn new(engine: E) -> Self {
        Self::builder(engine).finish()
    }

    /// Protects an engine as told.
    pub fn builder(engine: E) -> ResilientBuilder<E> {
        ResilientBuilder {
            engine: Arc::new(engine),
            recoverer: None,
            configuration: ResilienceConfiguration::default(),
        }
    }

    /// The engine itself. What is asked of it directly is not limited here.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    /// Runs a request to its end, and again from its beginning where that may help: the caller sees the whole answer or
    /// none of it.
    ///
    /// Dropping the future cancels what runs, and the wait. Where the wait would last beyond
    /// [`timeouts.total`](crate::TimeoutConfiguration::total) or the request's own
    /// [`timeout_s`](GenerateParams::timeout_s), the last error is returned at once.
    ///
    /// # Errors
    ///
    /// The error of the last attempt.
    pub async fn generate_with_retry(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> Result<GenerateOutput, EngineError> {
        let patience = self.control.patience(&params);
        let run = || -> BoxFuture<'_, Result<GenerateOutput, EngineError>> {
            let attempt = self.attempt(prompt.clone(), params.clone(), patience);
            Box::pin(async move { collect_events(attempt.await?).await })
        };
        self.control.with_retry(patience.total, run).await
    }

    /// Submits a request, and again where that may help, until the first text or token comes. The future resolves then,
    /// and nothing is tried again after it: the caller never sees a part of an answer twice.
    ///
    /// # Errors
    ///
    /// The error of the last attempt.
    pub async fn stream_with_retry(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> Result<EventStream, EngineError> {
        let patience = self.control.patience(&params);
        let run = || -> BoxFuture<'_, Result<EventStream, EngineError>> {
            let attempt = self.attempt(prompt.clone(), params.clone(), patience);
            Box::pin(async move {
                let mut events = attempt.await?;
                let mut head = Vec::new();
                while let Some(event) = events.next().await {
                    let event = event?;
                    let begun = !matches!(event, GenerationEvent::Started { .. });
                    head.push(Ok(event));
                    if begun {
                        break;
                    }
                }
                Ok(stream::iter(head).chain(events).boxed())
            })
        };
        self.control.with_retry(patience.total, run).await
    }

    /// Brings the engine back, if it gives no token: takes the steps that it can take, the cheapest first, each followed
    /// by a proof. An engine that works, or is only busy, is left alone.
    ///
    /// New requests wait meanwhile. One recovery runs at a time, and it goes on where the future is dropped.
    pub async fn attempt_recovery(&self) -> RecoveryReport {
        let control = Arc::clone(&self.control);
        let report = tokio::spawn(async move { control.recover(Occasion::Asked).await }).await;
        report.unwrap_or_else(|_| RecoveryReport::interrupted(self.backend()))
    }

    /// How it stands: the circuit, the places, the budget, the last recovery.
    pub fn status(&self) -> ResilienceStatus {
        let control = &self.control;
        let now = control.now();
        let mut state = control.current();
        ResilienceStatus {
            breaker: state.breaker.state(now),
            running: control.bulkhead.running(),
            waiting: control.bulkhead.waiting(),
            retries_left: state.budget.left(),
            recovering: *control.recovering.borrow(),
            recoveries: control.recoveries(),
            last_recovery: state.last_recovery.clone(),
            counts: state.counts,
        }
    }

    /// What it was told.
    pub fn configuration(&self) -> &ResilienceConfiguration {
        &self.control.configuration
    }

    /// Sends a request once.
    async fn attempt(
        &self,
        prompt: Prompt,
        params: GenerateParams,
        patience: Patience,
    ) -> Result<Guarded, EngineError> {
        let control = &self.control;
        let timeouts = &control.configuration.timeouts;
        let limits = patience.attempt(&params);
        let late = || control.count(|counts| &mut counts.timed_out);
        Deadline::enforce_or(limits.turn(), late, async {
            control.recovered().await;
            let place = control.place().await?;
            // One may have begun while a place was waited for.
            control.recovered().await;
            let mut leave = control.leave()?;
            control.watch();
            let first_token = Deadline::after(timeouts.first_token);
            let engine: Arc<dyn LlmEngine> = Arc::clone(&self.engine) as _;
            let submission = Submission::new(engine, Arc::clone(control), prompt, params, limits);
            let admitted = Deadline::enforce(first_token, async {
                Ok(submission.submit().await.map_err(|error| leave.failed(error)))
            });
            let admitted = match admitted.await {
                Ok(admitted) => admitted,
                Err(late) => {
                    leave.timed_out();
                    control.count(|counts| &mut counts.timed_out);
                    return Err(late);
                }
            };
            let events = admitted?;
            Ok(Guarded::new(events, submission, place, leave, first_token))
        })
        .await
    }
}

impl<E: LlmEngine + 'static> EngineWrapper for Resilient<E> {
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
            let patience = self.control.patience(&params);
            Ok(self.attempt(prompt, params, patience).await?.boxed())
        })
    }
}

/// How [`Resilient`] stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResilienceStatus {
    /// The state of the circuit.
    pub breaker: BreakerState,
    /// Requests that the engine has.
    pub running: usize,
    /// Requests that wait for a place.
    pub waiting: usize,
    /// Retries that the budget has left; a whole one is needed.
    pub retries_left: f64,
    /// Whether a recovery runs.
    pub recovering: bool,
    /// Recoveries that took a step.
    pub recoveries: u64,
    /// The last recovery that came to its end.
    pub last_recovery: Option<RecoveryReport>,
    /// What became of requests here.
    #[serde(default)]
    pub counts: ResilienceCounts,
}

/// How often something became of requests that the engine itself does not see, since it is protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResilienceCounts {
    /// Attempts that were refused because the circuit was open.
    pub refused_by_breaker: u64,
    /// Attempts that were refused because too many waited for a place.
    pub refused_by_bulkhead: u64,
    /// Attempts whose time was over before the engine had answered.
    pub timed_out: u64,
    /// Requests that were tried again, each time.
    pub retried: u64,
    /// Requests that were handed over again, each time, as a recovery had taken the engine away before they had begun.
    pub handed_over_again: u64,
}

impl ResilienceStatus {
    /// The same in Prometheus' text format, version 0.0.4, to be put behind the
    /// [metrics](mlx_engine_monitor::Monitored::prometheus) of the engine.
    pub fn prometheus(&self) -> String {
        let counts = &self.counts;
        let open = u8::from(self.breaker != BreakerState::Closed);
        let recovering = u8::from(self.recovering);
        let families: [(&str, &str, &str, &dyn fmt::Display); 10] = [
            (
                "circuit_open",
                "gauge",
                "Whether the circuit is open or half open.",
                &open,
            ),
            (
                "bulkhead_waiting",
                "gauge",
                "Requests that wait for a place at the engine.",
                &self.waiting,
            ),
            (
                "retries_left",
                "gauge",
                "Retries that the budget has left.",
                &self.retries_left,
            ),
            ("recovering", "gauge", "Whether a recovery runs.", &recovering),
            (
                "recoveries_total",
                "counter",
                "Recoveries that took a step.",
                &self.recoveries,
            ),
            (
                "refused_by_breaker_total",
                "counter",
                "Attempts that were refused because the circuit was open.",
                &counts.refused_by_breaker,
            ),
            (
                "refused_by_bulkhead_total",
                "counter",
                "Attempts that were refused because too many waited for a place.",
                &counts.refused_by_bulkhead,
            ),
            (
                "timed_out_total",
                "counter",
                "Attempts whose time was over before the engine had answered.",
                &counts.timed_out,
            ),
            (
                "retried_total",
                "counter",
                "Requests that were tried again.",
                &counts.retried,
            ),
            (
                "handed_over_again_total",
                "counter",
                "Requests that were handed over again after a recovery.",
                &counts.handed_over_again,
            ),
        ];
        let mut page = String::new();
        for (name, kind, help, value) in families {
            // Writing to a string cannot fail.
            let _ = write!(
                page,
                "# HELP mlx_engine_{name} {help}\n# TYPE mlx_engine_{name} {kind}\nmlx_engine_{name} {value}\n"
            );
        }
        page
    }
}

/// How an engine is to be protected.
#[must_use]
pub struct ResilientBuilder<E> {
    engine: Arc<E>,
    recoverer: Option<Arc<dyn Recover>>,
    configuration: ResilienceConfiguration,
}

impl<E> fmt::Debug for ResilientBuilder<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResilientBuilder")
            .field("configuration", &self.configuration)
            .finish_non_exhaustive()
    }
}

impl<E: LlmEngine + 'static> ResilientBuilder<E> {
    /// Takes these limits.
    pub fn configuration(mut self, configuration: ResilienceConfiguration) -> Self {
        self.configuration = configuration;
        self
    }

    /// Uses what the engine can do about its own faults. Without it recovery looks whether the engine works, and no more.
    pub fn recoverable(mut self) -> Self
    where
        E: Recover,
    {
        let engine = Arc::clone(&self.engine);
        self.recoverer = Some(engine);
        self
    }

    /// Begins to protect it.
    ///
    /// # Errors
    ///
    /// The field of the configuration that is out of its range.
    pub fn build(self) -> Result<Resilient<E>, ParamError> {
        self.configuration.validate()?;
        Ok(self.finish())
    }

    fn finish(self) -> Resilient<E> {
        let Self {
            engine,
            recoverer,
            configuration,
        } = self;
        let recoverer = recoverer.unwrap_or_else(|| Arc::new(Unrecoverable(Arc::clone(&engine))));
        Resilient {
            control: Arc::new(Control::new(recoverer, configuration)),
            engine,
        }
    }
}
