//! Finds the configuration that serves a goal best on this machine and model, by measuring.

mod knobs;
mod live;
mod search;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mlx_engine_core::{EngineError, LlmEngine, ParamError};
use mlx_engine_engine::EngineConfig;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::slot::Slot;

use live::Live;
use search::{Bench, search};

/// What an engine is to be good at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OptimizeGoal {
    /// One request at a time is answered soon.
    #[default]
    Latency,
    /// Many requests at once are answered soon, all together.
    Throughput,
    /// Little memory is used, while one request takes no more than a tenth longer.
    Memory,
}

/// What is measured, and for how long.
///
/// ```
/// use mlx_engine::{OptimizeGoal, OptimizeOptions};
///
/// let options = OptimizeOptions {
///     time_limit_s: 30.0,
///     concurrency: 16,
///     ..OptimizeOptions::new(OptimizeGoal::Throughput)
/// };
/// options.validate()?;
/// let none = OptimizeOptions { concurrency: 0, ..options };
/// assert_eq!(none.validate().unwrap_err().to_string(), "`concurrency` is 0, allowed: 1 or more");
/// # Ok::<(), mlx_engine::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizeOptions {
    /// What the engine is to be good at.
    pub goal: OptimizeGoal,
    /// How long it may take in all, in seconds, the last measurement that was begun aside.
    pub time_limit_s: f64,
    /// Tokens of a prompt; at least 1.
    pub prompt_tokens: u32,
    /// Tokens of an answer; at least 2.
    pub answer_tokens: u32,
    /// Requests at once, where the goal is throughput; at least 1.
    pub concurrency: u32,
    /// A question of the kind that the engine will get, which is asked in place of `prompt_tokens` that mean nothing. Guessing ahead
    /// is tried with one alone: what it gains is in what is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<String>,
    /// Whether keys and values may become integers of 8 or 4 bits, which changes answers a little. They stay as they are
    /// otherwise.
    pub kv_integers: bool,
}

impl Default for OptimizeOptions {
    fn default() -> Self {
        Self {
            goal: OptimizeGoal::default(),
            time_limit_s: 60.0,
            prompt_tokens: 1024,
            answer_tokens: 32,
            concurrency: 8,
            sample: None,
            kv_integers: false,
        }
    }
}

impl OptimizeOptions {
    /// Options for a goal.
    pub fn new(goal: OptimizeGoal) -> Self {
        Self {
            goal,
            ..Self::default()
        }
    }

    /// Checks every range.
    ///
    /// # Errors
    ///
    /// The first field that is out of its range.
    pub fn validate(&self) -> Result<(), ParamError> {
        ParamError::between("time_limit_s", self.time_limit_s, 0.0..=86_400.0)?;
        ParamError::at_least("prompt_tokens", self.prompt_tokens, 1)?;
        ParamError::at_least("answer_tokens", self.answer_tokens, 2)?;
        ParamError::at_least("concurrency", self.concurrency, 1)
    }

    pub(crate) fn time_limit(&self) -> Duration {
        Duration::try_from_secs_f64(self.time_limit_s).unwrap_or_default()
    }
}

/// The figures of one measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// From the submission of all requests to the end of the last, in seconds.
    pub seconds: f64,
    /// Tokens of prompts and answers a second, of all requests together.
    pub tokens_per_second: f64,
    /// Mean time to the first token, in seconds.
    pub first_token_s: f64,
    /// The most memory in use, in bytes; 0 on a backend that uses none.
    pub peak_memory_bytes: u64,
}

/// A value that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// The field of [`EngineConfig`].
    pub knob: String,
    /// Its value.
    pub value: Value,
    /// What was measured; `None` where it failed.
    pub measured: Option<Measured>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How much better it is than the best before it, as a part of that; below 0 where it is worse.
    pub gain: f64,
    /// Whether it became the best.
    pub kept: bool,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizeOutcome {
    /// The new configuration is in use: measured in turn with the old one it was better.
    Improved,
    /// Nothing that was tried is better. The old configuration is in use.
    NoGain,
    /// What looked better did not prove so against the old configuration, which is in use.
    NotConfirmed,
    /// There was no time to compare. The old configuration is in use.
    OutOfTime,
}

/// What was tried, what it gained, and the configuration to keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizeReport {
    /// What the engine was to be good at.
    pub goal: OptimizeGoal,
    /// What came of it.
    pub outcome: OptimizeOutcome,
    /// The configuration in use now. It can be written to a file and given to the engine at its next start.
    pub config: EngineConfig,
    /// With the configuration that was found: the median of the rounds in which both were measured, or the first measurement.
    pub before: Measured,
    /// With the one in use now, in the same rounds.
    pub after: Measured,
    /// How much better that is, as a part of what was; 0 where the configuration stayed.
    pub gain: f64,
    /// What was tried, in order.
    pub trials: Vec<Trial>,
    /// Values that there was no time for.
    pub skipped: u32,
    /// How long it took, in seconds.
    pub took_s: f64,
}

/// Tells the search that nobody waits for it any more.
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Measures on the engine that is loaded, and leaves it with the configuration of the report, or with the one that it had.
pub(crate) async fn optimize(
    slot: &Arc<Slot>,
    options: OptimizeOptions,
) -> Result<OptimizeReport, EngineError> {
    options.validate()?;
    let engine = slot.engine()?;
    let config = slot.config().unwrap_or_default();
    let needed = u64::from(options.prompt_tokens) + u64::from(options.answer_tokens);
    let context_length = engine.model().map_or(0, |model| u64::from(model.context_length));
    if needed > context_length {
        return Err(EngineError::PromptTooLong {
            prompt_tokens: needed,
            context_length,
        });
    }
    if engine
        .statistics()
        .is_some_and(|engine| engine.running + engine.queued > 0)
    {
        return Err(EngineError::Unavailable {
            reason: "requests run, beside which nothing can be measured".to_owned(),
            retry_after: Duration::from_secs(1),
        });
    }
    let cancelled = Arc::new(AtomicBool::new(false));
    let _given_up = GivenUp(Arc::clone(&cancelled));
    let slot = Arc::clone(slot);
    // On a task of its own: where the caller gives up, the engine still gets its configuration back.
    let found = tokio::spawn(async move {
        let mut bench = Live::new(
            Arc::clone(&slot),
            engine,
            config.clone(),
            options.clone(),
            cancelled,
        );
        let found = search(&mut bench, &config, &options).await;
        let keep = found.as_ref().map_or(&config, |report| &report.config);
        bench.apply(keep).await?;
        if let Ok(report) = &found {
            slot.keep_config(&report.config);
        }
        found
    });
    found
        .await
        .unwrap_or_else(|_| Err(EngineError::internal("the search was not finished")))
}
