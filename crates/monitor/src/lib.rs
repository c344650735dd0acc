//! Metrics and health of an engine, as a wrapper over any [`LlmEngine`](mlx_engine_core::LlmEngine).
//!
//! [`Monitored`] is an engine itself. It sees every request from its submission to its end and says what it saw:
//! [`metrics`](Monitored::metrics) as numbers, [`prometheus`](Monitored::prometheus) as text,
//! [`health`](Monitored::health) as a verdict with its reasons, [`check_health`](Monitored::check_health) after a token
//! from the model, [`subscribe`](Monitored::subscribe) as events, and
//! [`detailed_status`](Monitored::detailed_status) as one report.
//!
//! ```
//! use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
//! use mlx_engine_monitor::{EngineHealth, Monitored};
//!
//! async fn ask(engine: &Monitored<impl LlmEngine>) -> Result<(), EngineError> {
//!     let output = engine.generate(Prompt::user("Why is the sky blue?"), GenerateParams::default()).await?;
//!     println!("{}", output.text);
//!
//!     let metrics = engine.metrics();
//!     println!("{} tokens", metrics.total.generated_tokens);
//!     if let Some(rate) = metrics.window.decode.tokens_per_second {
//!         println!("{rate:.1} tokens a second");
//!     }
//!
//!     let health = engine.check_health().await;
//!     if health.status != EngineHealth::Healthy {
//!         for reason in &health.reasons {
//!             println!("{}: {reason}", reason.severity());
//!         }
//!     }
//!     Ok(())
//! }
//! ```
//!
//! What only the inside of an engine knows, such as the size of its batches, how often a guess was right and the memory of its
//! caches, the engine says itself ([`EngineStatistics`](mlx_engine_core::EngineStatistics)), and it is here as far as it does. There is no runtime, thread or timer either. Times come from a [`Clock`] that can be handed in.
//!
//! For each piece of text the price is two readings of the clock and five atomic operations at most; a lock is taken
//! when a request begins, starts and ends.
//!
//! The feature `metrics` hands every request that ends to the facade of that name, under OpenTelemetry's names
//! (`gen_ai.server.request.duration`, `gen_ai.server.time_to_first_token`, `gen_ai.server.time_per_output_token`,
//! `gen_ai.client.token.usage`); the feature `tracing` opens a span `gen_ai.request` with
//! OpenTelemetry's fields for it, and writes an event for every change of health.

mod clock;
mod histogram;
mod kind;
mod metrics;

mod tally;

mod request;
mod shared;

mod configuration;
mod events;
mod health;
mod memory;
mod probe;
mod verdict;

mod report;

mod emit;
mod prometheus;

mod monitored;

pub use clock::{Clock, ManualClock, SystemClock};
pub use configuration::HealthConfiguration;
pub use events::{HealthEvent, HealthEvents};
pub use health::{EngineHealth, HealthReason, HealthReport, MemoryKind};
pub use histogram::Distribution;
pub use kind::{ErrorClass, ErrorKind};
pub use memory::resident_bytes;
pub use metrics::{FinishCounts, InferenceMetrics, LastGeneration, ProbeCounts, Statistics, Throughput};
pub use monitored::{Monitored, MonitoredBuilder};
pub use probe::{ProbeFailure, probe};
pub use report::{DetailedStatus, LastFailure, LastProbe};
