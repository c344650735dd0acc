//! How the engine's process is watched and started again.

use std::collections::VecDeque;
use std::time::Duration;

use mlx_engine_core::ParamError;
use serde::{Deserialize, Serialize};

use crate::configuration::above_zero;
use crate::seconds;

/// How the engine's process is watched and started again. Durations are written as numbers of seconds.
///
/// A process that ends is started again at once. Where that happens again within
/// [`restart_window`](Self::restart_window), restart number n in it, from 1, waits for
/// `base_delay * backoff_multiplier^(n - 1)`, at most `max_delay`; after [`max_restarts`](Self::max_restarts) it stays ended until it
/// is [started by hand](super::Supervised::restart).
///
/// ```
/// use mlx_engine_resilience::SupervisorConfiguration;
///
/// let patient = SupervisorConfiguration { max_restarts: 20, ..SupervisorConfiguration::default() };
/// patient.validate()?;
/// # Ok::<(), mlx_engine_core::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SupervisorConfiguration {
    /// Restarts within [`restart_window`](Self::restart_window); 0 starts no process again.
    pub max_restarts: u32,
    /// See [`max_restarts`](Self::max_restarts); above 0.
    #[serde(with = "seconds")]
    pub restart_window: Duration,
    /// The wait before the second restart in the window.
    #[serde(with = "seconds")]
    pub base_delay: Duration,
    /// What each further wait is longer by; 1 to 100.
    pub backoff_multiplier: f64,
    /// The longest wait; at least `base_delay`.
    #[serde(with = "seconds")]
    pub max_delay: Duration,
    /// How long a process that loads may say nothing, before it is ended; above 0. Each layer that it loads is something.
    #[serde(with = "seconds")]
    pub start_limit: Duration,
    /// How long a process may say nothing to requests that wait for it, before it is ended as hanging; above 0. Prefill of
    /// a long prompt is such a silence, and so nothing is limited unless it is told. What a caller did wrong is no answer.
    #[serde(with = "seconds::option", skip_serializing_if = "Option::is_none")]
    pub silence_limit: Option<Duration>,
    /// How long a process that serves may say nothing at all, before it is ended as one that stands still; at least 2 seconds. It
    /// says four times a second that it runs, whatever its engine does.
    #[serde(with = "seconds")]
    pub standstill_limit: Duration,
    /// How long a process may take to end when it is asked to, before it is ended; above 0.
    #[serde(with = "seconds")]
    pub exit_limit: Duration,
    /// Requests that wait for a process that is being started; one more is refused with
    /// [`QueueFull`](mlx_engine_core::EngineError::QueueFull).
    pub max_waiting: usize,
}

/// A busy machine may hold a process up for longer than one of its signs of life takes.
const LEAST_STANDSTILL: Duration = Duration::from_secs(2);

impl Default for SupervisorConfiguration {
    fn default() -> Self {
        Self {
            max_restarts: 5,
            restart_window: Duration::from_mins(10),
            base_delay: Duration::from_millis(500),
            backoff_multiplier: 2.0,
            max_delay: Duration::from_secs(30),
            start_limit: Duration::from_mins(5),
            silence_limit: None,
            standstill_limit: Duration::from_secs(30),
            exit_limit: Duration::from_secs(10),
            max_waiting: 256,
        }
    }
}

impl SupervisorConfiguration {
    /// Checks every range.
    ///
    /// # Errors
    ///
    /// The first field that is out of its range.
    pub fn validate(&self) -> Result<(), ParamError> {
        above_zero("restart_window", self.restart_window)?;
        ParamError::between("backoff_multiplier", self.backoff_multiplier, 1.0..=100.0)?;
        let enough = self.max_delay >= self.base_delay;
        let seconds = self.max_delay.as_secs_f64();
        ParamError::check("max_delay", seconds, enough, "at least base_delay")?;
        above_zero("start_limit", self.start_limit)?;
        if let Some(limit) = self.silence_limit {
            above_zero("silence_limit", limit)?;
        }
        let (standstill, least) = (
            self.standstill_limit.as_secs_f64(),
            LEAST_STANDSTILL.as_secs_f64(),
        );
        ParamError::at_least("standstill_limit", standstill, least)?;
        above_zero("exit_limit", self.exit_limit)
    }
}

/// When an ended process is started again, as a function of times.
#[derive(Debug)]
pub(super) struct RestartPolicy {
    configuration: SupervisorConfiguration,
    restarts: VecDeque<Duration>,
}

impl RestartPolicy {
    pub(super) fn new(configuration: SupervisorConfiguration) -> Self {
        Self {
            configuration,
            restarts: VecDeque::new(),
        }
    }

    /// A process has ended. How long to wait before the next is started, which then counts; `None` where there is to be
    /// none.
    pub(super) fn ended(&mut self, now: Duration) -> Option<Duration> {
        let Self {
            configuration,
            restarts,
        } = self;
        restarts.retain(|&at| now.saturating_sub(at) < configuration.restart_window);
        if restarts.len() >= configuration.max_restarts as usize {
            return None;
        }
        let wait = match i32::try_from(restarts.len()) {
            Ok(0) => Duration::ZERO,
            nth => {
                let exponent = nth.unwrap_or(i32::MAX) - 1;
                let growth = configuration.backoff_multiplier.powi(exponent);
                let full = configuration.base_delay.as_secs_f64() * growth;
                Duration::try_from_secs_f64(full)
                    .map_or(configuration.max_delay, |full| full.min(configuration.max_delay))
            }
        };
        restarts.push_back(now.saturating_add(wait));
        Some(wait)
    }

    /// Somebody looked after it: the record is clean.
    pub(super) fn forgive(&mut self) {
        self.restarts.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_restart_is_at_once_and_later_ones_wait_longer() {
        let configuration = SupervisorConfiguration {
            max_restarts: 5,
            max_delay: Duration::from_secs(3),
            base_delay: Duration::from_secs(1),
            ..SupervisorConfiguration::default()
        };
        let mut policy = RestartPolicy::new(configuration);
        let waits: Vec<_> = (0..6)
            .map(|second| {
                policy
                    .ended(Duration::from_secs(second * 10))
                    .map(|wait| wait.as_secs())
            })
            .collect();
        assert_eq!(waits, [Some(0), Some(1), Some(2), Some(3), Some(3), None]);
        policy.forgive();
        assert_eq!(policy.ended(Duration::from_mins(1)), Some(Duration::ZERO));
    }

    #[test]
    fn ranges_are_checked_by_name() {
        let valid = SupervisorConfiguration::default();
        assert_eq!(valid.validate(), Ok(()));
        let refuse = |change: fn(&mut SupervisorConfiguration), field: &str| {
            let mut configuration = SupervisorConfiguration::default();
            change(&mut configuration);
            assert_eq!(configuration.validate().unwrap_err().field(), field);
        };
        refuse(|it| it.restart_window = Duration::ZERO, "restart_window");
        refuse(|it| it.backoff_multiplier = f64::NAN, "backoff_multiplier");
        refuse(|it| it.max_delay = Duration::ZERO, "max_delay");
        refuse(|it| it.start_limit = Duration::ZERO, "start_limit");
        refuse(|it| it.silence_limit = Some(Duration::ZERO), "silence_limit");
        refuse(
            |it| it.standstill_limit = Duration::from_millis(1999),
            "standstill_limit",
        );
        refuse(|it| it.exit_limit = Duration::ZERO, "exit_limit");
        let json = serde_json::to_value(&valid).unwrap();
        assert_eq!(
            serde_json::from_value::<SupervisorConfiguration>(json).unwrap(),
            valid
        );
    }

    proptest! {
        #[test]
        fn no_window_holds_more_restarts_than_may_be(most in 0..6_u32, ends in prop::collection::vec(0..40_u64, 0..200)) {
            let configuration = SupervisorConfiguration {
                max_restarts: most,
                restart_window: Duration::from_mins(1),
                base_delay: Duration::from_secs(1),
                max_delay: Duration::from_secs(5),
                ..SupervisorConfiguration::default()
            };
            let mut policy = RestartPolicy::new(configuration);
            let mut restarts: Vec<Duration> = Vec::new();
            let mut now = Duration::ZERO;
            for lived in ends {
                now += Duration::from_secs(lived);
                match policy.ended(now) {
                    Some(wait) => {
                        prop_assert!(wait <= Duration::from_secs(5));
                        now += wait;
                        restarts.push(now);
                    }
                    // Somebody comes a while later and starts it by hand.
                    None => now += Duration::from_mins(1),
                }
                let recent = restarts.iter().filter(|&&at| now.saturating_sub(at) < Duration::from_mins(1)).count();
                prop_assert!(recent <= most as usize);
            }
        }
    }
}
