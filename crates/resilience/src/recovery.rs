//! What can be done to a broken engine, in which order, and what came of it.

use std::collections::VecDeque;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use mlx_engine_core::{Backend, EngineError, EngineStatistics, EngineWrapper, LlmEngine};
use mlx_engine_monitor::{ErrorKind, Monitored, ProbeFailure, probe};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};

use crate::RecoveryConfiguration;

/// Something that may bring an engine back, in the order of what it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RecoveryStep {
    /// Gives back the memory that is held for speed alone.
    ClearCaches,
    /// Makes a new stream on the device, after an error of the device.
    RebuildStream,
    /// Starts a new worker for the model that is loaded.
    RestartWorker,
    /// Loads the model again.
    ReloadModel,
    /// Serves from something else: a smaller model, or the mock.
    FallBack,
}

impl RecoveryStep {
    /// Every step, in the order in which they are taken.
    pub const ALL: [Self; 5] = [
        Self::ClearCaches,
        Self::RebuildStream,
        Self::RestartWorker,
        Self::ReloadModel,
        Self::FallBack,
    ];
}

impl fmt::Display for RecoveryStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ClearCaches => "clear caches",
            Self::RebuildStream => "rebuild stream",
            Self::RestartWorker => "restart worker",
            Self::ReloadModel => "reload model",
            Self::FallBack => "fall back",
        })
    }
}

/// An engine that can do something about its own faults.
pub trait Recover: LlmEngine {
    /// Whether it can take a step now. An engine that was unloaded on purpose can take none.
    fn can(&self, step: RecoveryStep) -> bool;

    /// Takes a step. Requests that run may end with an error. Dropping the future gives the step up.
    ///
    /// # Errors
    ///
    /// Why the step could not be taken.
    fn recover(&self, step: RecoveryStep) -> BoxFuture<'_, Result<(), EngineError>>;

    /// Shows that the engine works: by a token, unless it knows better.
    fn prove(&self) -> BoxFuture<'_, Result<(), ProbeFailure>> {
        Box::pin(probe(self))
    }

    /// How often somebody has put another engine in its place, as by loading a model. What failed before says nothing about the
    /// one that is there now: the circuit of whoever protects it is closed once this has changed.
    fn renewals(&self) -> u64 {
        0
    }
}

impl<R: Recover + ?Sized> Recover for Arc<R> {
    fn can(&self, step: RecoveryStep) -> bool {
        (**self).can(step)
    }

    fn recover(&self, step: RecoveryStep) -> BoxFuture<'_, Result<(), EngineError>> {
        (**self).recover(step)
    }

    fn prove(&self) -> BoxFuture<'_, Result<(), ProbeFailure>> {
        (**self).prove()
    }

    fn renewals(&self) -> u64 {
        (**self).renewals()
    }
}

/// The token that proves is a probe in the metrics, and health hears of it.
impl<R: Recover> Recover for Monitored<R> {
    fn can(&self, step: RecoveryStep) -> bool {
        self.engine().can(step)
    }

    fn recover(&self, step: RecoveryStep) -> BoxFuture<'_, Result<(), EngineError>> {
        self.engine().recover(step)
    }

    fn prove(&self) -> BoxFuture<'_, Result<(), ProbeFailure>> {
        Box::pin(self.probe())
    }

    fn renewals(&self) -> u64 {
        self.engine().renewals()
    }
}

/// An engine that can do nothing about its faults.
pub(crate) struct Unrecoverable<E>(pub(crate) Arc<E>);

impl<E: LlmEngine> EngineWrapper for Unrecoverable<E> {
    type Inner = E;

    fn inner(&self) -> &E {
        &self.0
    }
}

impl<E: LlmEngine> Recover for Unrecoverable<E> {
    fn can(&self, _step: RecoveryStep) -> bool {
        false
    }

    fn recover(&self, step: RecoveryStep) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async move { Err(EngineError::unsupported(format!("the engine cannot {step}"))) })
    }
}

/// What a recovery found, did and achieved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryReport {
    /// Whether the engine works, as it showed by a token.
    pub recovered: bool,
    /// Why it gave no token at first; `None` where it did, and nothing had to be done.
    pub before: Option<ProbeFailure>,
    /// What was done, in order. None where the engine is only busy or can do nothing.
    pub steps: Vec<StepReport>,
    /// What computes the tokens now.
    pub backend: Option<Backend>,
    /// Whether the recovery began by itself.
    pub automatic: bool,
    /// How long it took, in seconds.
    pub took_s: f64,
}

impl RecoveryReport {
    /// A recovery that was ended from outside, with its runtime.
    pub(crate) fn interrupted(backend: Option<Backend>) -> Self {
        Self {
            recovered: false,
            before: None,
            steps: Vec::new(),
            backend,
            automatic: false,
            took_s: 0.0,
        }
    }
}

/// One step of a recovery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// What was done.
    pub step: RecoveryStep,
    /// What came of it.
    pub outcome: StepOutcome,
    /// How long it took, in seconds, the proof included.
    pub took_s: f64,
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum StepOutcome {
    /// A token came after it.
    Recovered,
    /// It was taken, and no token came after it.
    NoToken {
        /// Why.
        failure: ProbeFailure,
    },
    /// It could not be taken.
    Failed {
        /// The kind of the error.
        kind: ErrorKind,
        /// What the error says.
        message: String,
    },
    /// It took longer than it may.
    TimedOut,
}

/// Why a recovery begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Occasion {
    /// Somebody asks for it.
    Asked,
    /// Too many requests failed.
    Failures,
    /// A turn has taken too long so far.
    Hang { turn: Duration },
}

impl RecoveryStep {
    /// Whether it is the worker that takes the step.
    fn needs_worker(self) -> bool {
        matches!(self, Self::ClearCaches | Self::RebuildStream)
    }
}

/// Brings an engine back: the cheapest step first, each followed by a proof, until one succeeds. What a worker would have to
/// do that does not answer is left out. `begins` is called before the first step.
pub(crate) async fn run(
    engine: &dyn Recover,
    configuration: &RecoveryConfiguration,
    occasion: Occasion,
    begins: impl FnOnce(),
) -> RecoveryReport {
    let began = Instant::now();
    let mut report = RecoveryReport {
        recovered: false,
        before: None,
        steps: Vec::new(),
        backend: None,
        automatic: occasion != Occasion::Asked,
        took_s: 0.0,
    };
    let mut busy = false;
    report.before = if let Occasion::Hang { turn } = occasion {
        // What it does not do for those who wait it will not do for us.
        Some(ProbeFailure::Abandoned {
            after_s: turn.as_secs_f64(),
        })
    } else {
        let before = engine.statistics();
        let failure = prove(engine, configuration.proof_timeout).await.err();
        let abandoned = matches!(failure, Some(ProbeFailure::Abandoned { .. }));
        busy = abandoned && went_on(before.as_ref(), engine.statistics().as_ref());
        failure
    };
    let answers = !matches!(report.before, Some(ProbeFailure::Abandoned { .. }));
    match report.before {
        None => report.recovered = true,
        // An engine that is busy is not helped by what would end its requests.
        Some(failure)
            if failure.is_fault() || (matches!(failure, ProbeFailure::Abandoned { .. }) && !busy) =>
        {
            let mut begins = Some(begins);
            for step in RecoveryStep::ALL {
                let allowed = step != RecoveryStep::FallBack || configuration.fall_back;
                if !allowed || !engine.can(step) || (step.needs_worker() && !answers) {
                    continue;
                }
                if let Some(begins) = begins.take() {
                    begins();
                }
                let began = Instant::now();
                let outcome = take(engine, step, configuration).await;
                tracing::info!(%step, ?outcome, "recovery step");
                report.recovered = outcome == StepOutcome::Recovered;
                report.steps.push(StepReport {
                    step,
                    outcome,
                    took_s: began.elapsed().as_secs_f64(),
                });
                if report.recovered {
                    break;
                }
            }
        }
        Some(_) => {}
    }
    report.backend = engine.backend();
    report.took_s = began.elapsed().as_secs_f64();
    report
}

/// Whether an engine has taken turns between two looks at it: it works on what was there before, and a proof waits for its turn.
fn went_on(before: Option<&EngineStatistics>, after: Option<&EngineStatistics>) -> bool {
    before
        .zip(after)
        .is_some_and(|(before, after)| before.load == after.load && before.turns < after.turns)
}

/// Takes one step and proves that it helped.
async fn take(engine: &dyn Recover, step: RecoveryStep, limits: &RecoveryConfiguration) -> StepOutcome {
    // A step that panics has failed like any other.
    let taken = AssertUnwindSafe(async { engine.recover(step).await }).catch_unwind();
    match timeout(limits.step_timeout, taken).await {
        Err(_) => return StepOutcome::TimedOut,
        Ok(Err(_)) => {
            return StepOutcome::Failed {
                kind: ErrorKind::WorkerPanicked,
                message: "the step panicked".to_owned(),
            };
        }
        Ok(Ok(Err(error))) => {
            return StepOutcome::Failed {
                kind: ErrorKind::of(&error),
                message: error.to_string(),
            };
        }
        Ok(Ok(Ok(()))) => {}
    }
    match prove(engine, limits.proof_timeout).await {
        Ok(()) => StepOutcome::Recovered,
        Err(failure) => StepOutcome::NoToken { failure },
    }
}

async fn prove(engine: &dyn Recover, limit: Duration) -> Result<(), ProbeFailure> {
    let proof = AssertUnwindSafe(async { engine.prove().await }).catch_unwind();
    match timeout(limit, proof).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(ProbeFailure::Error {
            kind: ErrorKind::WorkerPanicked,
        }),
        Err(_) => Err(ProbeFailure::Abandoned {
            after_s: limit.as_secs_f64(),
        }),
    }
}

/// How often recovery may begin by itself.
#[derive(Debug)]
pub(crate) struct AutomaticLimit {
    most: u32,
    window: Duration,
    began: VecDeque<Duration>,
}

impl AutomaticLimit {
    pub(crate) fn new(configuration: &RecoveryConfiguration) -> Self {
        Self {
            most: if configuration.automatic {
                configuration.max_automatic
            } else {
                0
            },
            window: configuration.automatic_window,
            began: VecDeque::new(),
        }
    }

    /// Whether one may begin now; it then counts.
    pub(crate) fn begin(&mut self, now: Duration) -> bool {
        self.began
            .retain(|began| now.saturating_sub(*began) < self.window);
        let may = self.began.len() < self.most as usize;
        if may {
            self.began.push_back(now);
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn steps_are_in_their_order_and_written_as_words() {
        assert!(RecoveryStep::ALL.is_sorted());
        assert_eq!(serde_json::to_value(RecoveryStep::FallBack).unwrap(), "fall_back");
        assert_eq!(format!("{:>13}", RecoveryStep::ClearCaches), " clear caches");
    }

    proptest! {
        #[test]
        fn no_window_holds_more_than_may_begin(
            most in 1..5_u32, waits in prop::collection::vec(0..30_u64, 0..100), automatic: bool,
        ) {
            let configuration = RecoveryConfiguration {
                automatic, max_automatic: most, automatic_window: Duration::from_mins(1), ..RecoveryConfiguration::default()
            };
            let mut limit = AutomaticLimit::new(&configuration);
            let mut began: Vec<u64> = Vec::new();
            let mut now = 0;
            for wait in waits {
                now += wait;
                let recent = began.iter().filter(|&&at| now - at < 60).count();
                let may = automatic && recent < most as usize;
                prop_assert_eq!(limit.begin(Duration::from_secs(now)), may);
                if may {
                    began.push(now);
                }
            }
        }
    }
}
