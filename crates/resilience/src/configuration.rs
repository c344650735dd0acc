//! What is tried again, when, and how much of it.

use std::time::Duration;

use mlx_engine_core::ParamError;
use serde::{Deserialize, Serialize};

use crate::seconds;

/// Everything that [`Resilient`](crate::Resilient) is told. Durations are written as numbers of seconds.
///
/// ```
/// use mlx_engine_resilience::ResilienceConfiguration;
///
/// let mut configuration = ResilienceConfiguration::default();
/// configuration.retry.max_retries = 5;
/// configuration.validate()?;
///
/// configuration.breaker.failure_rate = 2.0;
/// let error = configuration.validate().unwrap_err();
/// assert_eq!(error.to_string(), "`breaker.failure_rate` is 2, allowed: above 0 and at most 1");
/// # Ok::<(), mlx_engine_core::ParamError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResilienceConfiguration {
    /// What is tried again.
    pub retry: RetryConfiguration,
    /// When an engine that fails is left alone.
    pub breaker: BreakerConfiguration,
    /// How many requests the engine gets at the same time.
    pub bulkhead: BulkheadConfiguration,
    /// How long a request may take.
    pub timeouts: TimeoutConfiguration,
    /// How an engine is brought back.
    pub recovery: RecoveryConfiguration,
}

/// What is tried again, and after how long.
///
/// Retry number n, from 0, waits for `base_delay * backoff_multiplier^n`, at most `max_delay`, less a random part of it.
/// Where an error says [when to come back](mlx_engine_core::EngineError::retry_after), it waits at least as long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryConfiguration {
    /// Retries of one request; 0 tries once.
    pub max_retries: u32,
    /// The wait before the first retry.
    #[serde(with = "seconds")]
    pub base_delay: Duration,
    /// What each wait is longer by; 1 to 100.
    pub backoff_multiplier: f64,
    /// The longest wait; at least `base_delay`.
    #[serde(with = "seconds")]
    pub max_delay: Duration,
    /// The part of a wait that chance may take off, 0 to 1, so that requests that failed together do not come back
    /// together.
    pub jitter: f64,
    /// Retries of all requests together.
    pub budget: BudgetConfiguration,
}

impl Default for RetryConfiguration {
    fn default() -> Self {
        Self {
            max_retries: 3,
            base_delay: Duration::from_millis(250),
            backoff_multiplier: 2.0,
            max_delay: Duration::from_secs(10),
            jitter: 0.5,
            budget: BudgetConfiguration::default(),
        }
    }
}

/// How many retries all requests have together, so that retries do not multiply the load on an engine that fails for all:
/// there are never more than `reserve + ratio * requests`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetConfiguration {
    /// Retries that each request adds, 0 to 10.
    pub ratio: f64,
    /// Retries that are there at the beginning, and the most that are ever saved up.
    pub reserve: u32,
}

impl Default for BudgetConfiguration {
    fn default() -> Self {
        Self {
            ratio: 0.2,
            reserve: 10,
        }
    }
}

/// When an engine that fails is left alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerConfiguration {
    /// How far back outcomes count; above 0.
    #[serde(with = "seconds")]
    pub window: Duration,
    /// Fewer outcomes in the window than this say nothing; 1 to 1024, as the latest 1024 are remembered.
    pub min_requests: u32,
    /// The part of the outcomes that are faults from which on the circuit opens, above 0 and at most 1.
    pub failure_rate: f64,
    /// How long the circuit stays open; above 0.
    #[serde(with = "seconds")]
    pub open_for: Duration,
    /// Requests that are let through after that; so many have to succeed for the circuit to close. At least 1.
    pub trials: u32,
}

impl Default for BreakerConfiguration {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(30),
            min_requests: 5,
            failure_rate: 0.5,
            open_for: Duration::from_secs(10),
            trials: 1,
        }
    }
}

/// How many requests the engine gets at the same time.
///
/// Nothing is held back unless it is told: the engine has a queue of its own, which knows priorities and what fits in the memory and has
/// its own limit. What waits here the engine does not see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BulkheadConfiguration {
    /// Requests that the engine has at the same time, those in its queue included; 1 to 1,000,000. The default bounds nothing.
    pub max_concurrent: usize,
    /// Requests that wait for a place; one more is refused with
    /// [`QueueFull`](mlx_engine_core::EngineError::QueueFull).
    pub max_waiting: usize,
}

/// The most requests that an engine can be given.
const MOST_CONCURRENT: usize = 1_000_000;

impl Default for BulkheadConfiguration {
    fn default() -> Self {
        Self {
            max_concurrent: MOST_CONCURRENT,
            max_waiting: 256,
        }
    }
}

/// How long a request may take. What takes longer is [`DeadlineExceeded`](mlx_engine_core::EngineError::DeadlineExceeded).
/// Nothing is limited unless it is told: prefill of a long prompt takes minutes on a small machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TimeoutConfiguration {
    /// From the submission to the engine to the first text or token, for each attempt; above 0.
    #[serde(with = "seconds::option", skip_serializing_if = "Option::is_none")]
    pub first_token: Option<Duration>,
    /// From one event to the next after that, as far as the caller waits for it; above 0.
    #[serde(with = "seconds::option", skip_serializing_if = "Option::is_none")]
    pub between_tokens: Option<Duration>,
    /// From the call to the end of the answer, with every wait and retry; above 0.
    #[serde(with = "seconds::option", skip_serializing_if = "Option::is_none")]
    pub total: Option<Duration>,
}

/// How an engine is brought back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecoveryConfiguration {
    /// Whether recovery begins by itself when the circuit opens, and when the engine hangs.
    pub automatic: bool,
    /// How long one turn of the engine, a chunk of a prompt and a token of each answer, may take before it counts as hanging;
    /// above 0, never where none. An engine that [tells](mlx_engine_core::EngineStatistics::turn_s) how long it has been at one is
    /// looked at while requests run.
    #[serde(with = "seconds::option", skip_serializing_if = "Option::is_none")]
    pub hang_limit: Option<Duration>,
    /// Recoveries that begin by themselves within [`automatic_window`](Self::automatic_window); at least 1. One that
    /// is asked for is never refused.
    pub max_automatic: u32,
    /// See [`max_automatic`](Self::max_automatic); above 0.
    #[serde(with = "seconds")]
    pub automatic_window: Duration,
    /// Whether an engine may fall back to what it falls back to: a smaller model or the mock.
    pub fall_back: bool,
    /// How long a step may take; above 0.
    #[serde(with = "seconds")]
    pub step_timeout: Duration,
    /// How long the token may take that proves that the engine works; above 0.
    #[serde(with = "seconds")]
    pub proof_timeout: Duration,
}

impl Default for RecoveryConfiguration {
    fn default() -> Self {
        Self {
            automatic: true,
            hang_limit: Some(Duration::from_mins(2)),
            max_automatic: 3,
            automatic_window: Duration::from_mins(10),
            fall_back: false,
            step_timeout: Duration::from_mins(5),
            proof_timeout: Duration::from_secs(30),
        }
    }
}

impl ResilienceConfiguration {
    /// Checks every range.
    ///
    /// # Errors
    ///
    /// The first field that is out of its range, such as `retry.jitter`.
    pub fn validate(&self) -> Result<(), ParamError> {
        let Self {
            retry,
            breaker,
            bulkhead,
            timeouts,
            recovery,
        } = self;
        retry.validate()?;
        above_zero("breaker.window", breaker.window)?;
        ParamError::between("breaker.min_requests", breaker.min_requests, 1..=1024)?;
        let rate = breaker.failure_rate;
        let within = rate > 0.0 && rate <= 1.0;
        ParamError::check("breaker.failure_rate", rate, within, "above 0 and at most 1")?;
        above_zero("breaker.open_for", breaker.open_for)?;
        ParamError::at_least("breaker.trials", breaker.trials, 1)?;
        let most = bulkhead.max_concurrent;
        ParamError::between("bulkhead.max_concurrent", most, 1..=MOST_CONCURRENT)?;
        let limits = [
            ("timeouts.first_token", timeouts.first_token),
            ("timeouts.between_tokens", timeouts.between_tokens),
            ("timeouts.total", timeouts.total),
            ("recovery.hang_limit", recovery.hang_limit),
        ];
        for (field, limit) in limits {
            above_zero(field, limit.unwrap_or(Duration::MAX))?;
        }
        ParamError::at_least("recovery.max_automatic", recovery.max_automatic, 1)?;
        above_zero("recovery.automatic_window", recovery.automatic_window)?;
        above_zero("recovery.step_timeout", recovery.step_timeout)?;
        above_zero("recovery.proof_timeout", recovery.proof_timeout)
    }
}

impl RetryConfiguration {
    /// Checks every range.
    ///
    /// # Errors
    ///
    /// The first field that is out of its range.
    pub fn validate(&self) -> Result<(), ParamError> {
        ParamError::between("retry.backoff_multiplier", self.backoff_multiplier, 1.0..=100.0)?;
        let enough = self.max_delay >= self.base_delay;
        let seconds = self.max_delay.as_secs_f64();
        ParamError::check("retry.max_delay", seconds, enough, "at least base_delay")?;
        ParamError::between("retry.jitter", self.jitter, 0.0..=1.0)?;
        ParamError::between("retry.budget.ratio", self.budget.ratio, 0.0..=10.0)
    }
}

pub(crate) fn above_zero(field: &str, value: Duration) -> Result<(), ParamError> {
    ParamError::check(field, value.as_secs_f64(), !value.is_zero(), "above 0")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_written_is_the_default() {
        let read = |value| serde_json::from_value::<ResilienceConfiguration>(value);
        assert_eq!(read(json!({})).unwrap(), ResilienceConfiguration::default());
        ResilienceConfiguration::default().validate().unwrap();
        let mut configuration = ResilienceConfiguration::default();
        configuration.timeouts.total = Some(Duration::from_millis(2500));
        let json = serde_json::to_value(&configuration).unwrap();
        assert_eq!(
            (&json["retry"]["base_delay"], &json["timeouts"]),
            (&json!(0.25), &json!({"total": 2.5}))
        );
        assert_eq!(read(json).unwrap(), configuration);
        assert!(read(json!({"retries": {}})).is_err());
        assert!(read(json!({"retry": {"base_delay": -1.0}})).is_err());
        assert!(read(json!({"timeouts": {"total": 1e300}})).is_err());
    }

    #[test]
    fn every_field_has_its_range() {
        let check = |part: &str, field: &str, value: serde_json::Value| {
            let configuration: ResilienceConfiguration =
                serde_json::from_value(json!({part: {field: value}})).unwrap();
            let error = configuration.validate().unwrap_err();
            assert!(error.field().starts_with(&format!("{part}.{field}")), "{error}");
        };
        check("retry", "backoff_multiplier", json!(0.5));
        check("retry", "max_delay", json!(0.1));
        check("retry", "jitter", json!(1.5));
        check("retry", "budget", json!({"ratio": -1.0}));
        check("breaker", "window", json!(0));
        check("breaker", "min_requests", json!(0));
        check("breaker", "min_requests", json!(1025));
        check("breaker", "failure_rate", json!(0));
        check("breaker", "open_for", json!(0));
        check("breaker", "trials", json!(0));
        check("bulkhead", "max_concurrent", json!(0));
        check("timeouts", "first_token", json!(0));
        check("timeouts", "between_tokens", json!(0));
        check("timeouts", "total", json!(0));
        check("recovery", "hang_limit", json!(0));
        check("recovery", "max_automatic", json!(0));
        check("recovery", "automatic_window", json!(0));
        check("recovery", "step_timeout", json!(0));
        check("recovery", "proof_timeout", json!(0));
        let not_a_number = RetryConfiguration {
            jitter: f64::NAN,
            ..RetryConfiguration::default()
        };
        assert_eq!(not_a_number.validate().unwrap_err().field(), "retry.jitter");
    }
}
