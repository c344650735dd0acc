//! An engine that comes back: retry, circuit breaker, limits and recovery, as a wrapper over any
//! [`LlmEngine`](mlx_engine_core::LlmEngine).
//!
//! [`Resilient`] is an engine itself. Every request passes a bulkhead, a circuit breaker and time limits;
//! [`generate_with_retry`](Resilient::generate_with_retry) and [`stream_with_retry`](Resilient::stream_with_retry) try
//! again what may succeed later, never what a caller has seen; [`attempt_recovery`](Resilient::attempt_recovery) brings a
//! broken engine back and proves it by a token. What recovery can do to an engine the engine says itself ([`Recover`]);
//! [`Reloadable`] is one that can be loaded again.
//!
//! ```
//! use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
//! use mlx_engine_resilience::{Recover, Reloadable, Resilient};
//!
//! async fn ask<E: LlmEngine + 'static>(engine: Resilient<Reloadable<E>>) -> Result<(), EngineError> {
//!     let output = engine.generate_with_retry(Prompt::user("Why is the sky blue?"), GenerateParams::default()).await?;
//!     println!("{}", output.text);
//!
//!     let report = engine.attempt_recovery().await;
//!     println!("works: {}, steps taken: {}", report.recovered, report.steps.len());
//!     Ok(())
//! }
//! ```
//!
//! Monitoring belongs inside, as `Resilient<Monitored<Reloadable<E>>>`: metrics then count every attempt, and health is
//! that of the engine.
//!
//! [`Supervised`] is an engine in a process of its own, so that an abort or a kill costs only what runs there.
//!
//! Times are tokio's, so that a test can pause and move them: waits, limits and recovery need a tokio runtime with its
//! timer. Whether to try again is decided by the type of the error, [`is_retryable`](mlx_engine_core::EngineError::is_retryable).

mod configuration;
mod seconds;

mod breaker;
mod bulkhead;
mod retry;

mod recovery;
mod reloadable;

mod attempt;
mod control;
mod resilient;

#[cfg(unix)]
mod supervised;

pub use breaker::BreakerState;
pub use configuration::{
    BreakerConfiguration, BudgetConfiguration, BulkheadConfiguration, RecoveryConfiguration,
    ResilienceConfiguration, RetryConfiguration, TimeoutConfiguration,
};
pub use recovery::{Recover, RecoveryReport, RecoveryStep, StepOutcome, StepReport};
pub use reloadable::Reloadable;
pub use resilient::{ResilienceCounts, ResilienceStatus, Resilient, ResilientBuilder};
#[cfg(unix)]
pub use supervised::{
    ChildState, Launch, Process, Program, Service, Supervised, SupervisedStatus, SupervisorConfiguration,
    connection, serve,
};
