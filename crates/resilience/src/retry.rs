//! When to try again: the wait and the budget, as functions of numbers.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use crate::{BudgetConfiguration, RetryConfiguration};

/// The wait before retry number `retry`, from 0. `chance` is 0 to 1; 0 takes nothing off.
pub(crate) fn delay(
    configuration: &RetryConfiguration,
    retry: u32,
    chance: f64,
    retry_after: Option<Duration>,
) -> Duration {
    let most = configuration.max_delay.as_secs_f64();
    let exponent = i32::try_from(retry).unwrap_or(i32::MAX);
    // It may be infinite, or, where there is no base delay, not a number.
    let growth = configuration.backoff_multiplier.powi(exponent);
    let full = (configuration.base_delay.as_secs_f64() * growth).min(most);
    let full = if configuration.base_delay.is_zero() {
        0.0
    } else {
        full
    };
    let wait = Duration::try_from_secs_f64(full * (1.0 - configuration.jitter * chance));
    let wait = wait
        .unwrap_or(configuration.max_delay)
        .min(configuration.max_delay);
    wait.max(retry_after.unwrap_or_default())
}

/// A number from 0 to 1 that differs from call to call: spreading waits needs no better chance.
pub(crate) fn chance() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    (random >> 11) as f64 / (1_u64 << 53) as f64
}

/// Retries that all requests have together.
#[derive(Debug)]
pub(crate) struct Budget {
    ratio: f64,
    reserve: f64,
    left: f64,
}

impl Budget {
    pub(crate) fn new(configuration: &BudgetConfiguration) -> Self {
        let reserve = f64::from(configuration.reserve);
        Self {
            ratio: configuration.ratio,
            reserve,
            left: reserve,
        }
    }

    /// A request comes.
    pub(crate) fn deposit(&mut self) {
        // A retry costs 1, and at a reserve of 0 each request may still earn it.
        self.left = (self.left + self.ratio).min(self.reserve.max(1.0));
    }

    /// Takes a retry out, if one is there.
    pub(crate) fn withdraw(&mut self) -> bool {
        // A ratio of 0.1 adds up to a whole retry in ten requests, whatever float thinks.
        let enough = self.left + 1e-9 >= 1.0;
        if enough {
            self.left = (self.left - 1.0).max(0.0);
        }
        enough
    }

    /// Retries that are left.
    pub(crate) fn left(&self) -> f64 {
        self.left
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn milliseconds(most: u64) -> impl Strategy<Value = Duration> {
        (0..=most).prop_map(Duration::from_millis)
    }

    #[test]
    fn waits_double_to_the_longest() {
        let configuration = RetryConfiguration::default();
        let waits =
            [0, 1, 2, 5, 6, u32::MAX].map(|retry| delay(&configuration, retry, 0.0, None).as_secs_f64());
        assert_eq!(waits, [0.25, 0.5, 1.0, 8.0, 10.0, 10.0]);
        assert_eq!(delay(&configuration, 0, 1.0, None).as_secs_f64(), 0.125);
        let come_back = Some(Duration::from_mins(1));
        assert_eq!(delay(&configuration, 0, 0.0, come_back).as_secs_f64(), 60.0);
        let at_once = RetryConfiguration {
            base_delay: Duration::ZERO,
            ..configuration
        };
        assert_eq!(delay(&at_once, u32::MAX, 0.5, None), Duration::ZERO);
    }

    #[test]
    fn chance_is_between_0_and_1_and_differs() {
        let chances: Vec<f64> = (0..64).map(|_| chance()).collect();
        assert!(chances.iter().all(|chance| (0.0..=1.0).contains(chance)));
        assert!(chances.iter().any(|&chance| chance != chances[0]));
    }

    proptest! {
        #[test]
        fn a_wait_keeps_its_bounds(
            base in milliseconds(5_000), more in milliseconds(60_000), multiplier in 1.0..100.0_f64, jitter in 0.0..=1.0_f64,
            retry: u32, chance in 0.0..=1.0_f64, after in prop::option::of(milliseconds(100_000)),
        ) {
            let configuration = RetryConfiguration {
                base_delay: base, backoff_multiplier: multiplier, max_delay: base + more, jitter,
                ..RetryConfiguration::default()
            };
            let wait = delay(&configuration, retry, chance, after);
            let full = delay(&configuration, retry, 0.0, None);
            prop_assert!(full >= base && full <= base + more);
            prop_assert!(wait >= after.unwrap_or_default());
            prop_assert!(wait <= full.max(after.unwrap_or_default()));
            prop_assert!(wait.as_secs_f64() >= full.as_secs_f64() * (1.0 - jitter) - 1e-6);
            let next = delay(&configuration, retry.saturating_add(1), 0.0, None);
            prop_assert!(next >= full);
        }

        /// Whatever comes in whatever order.
        #[test]
        fn retries_are_never_more_than_the_budget(
            ratio in 0.0..3.0_f64, reserve in 0..20_u32, requests in prop::collection::vec(any::<bool>(), 0..500),
        ) {
            let mut budget = Budget::new(&BudgetConfiguration { ratio, reserve });
            let (mut came, mut retried) = (0_u32, 0_u32);
            for request in requests {
                if request {
                    budget.deposit();
                    came += 1;
                } else if budget.withdraw() {
                    retried += 1;
                }
                prop_assert!(f64::from(retried) <= f64::from(reserve) + ratio * f64::from(came) + 1e-6);
                prop_assert!(budget.left() <= f64::from(reserve.max(1)));
            }
        }

        /// Nothing is withheld either: while the reserve is not full, all that was put in can be taken out.
        #[test]
        fn a_retry_that_was_saved_is_there(reserve in 1..20_u32, ratio in 0.01..1.0_f64) {
            let mut budget = Budget::new(&BudgetConfiguration { ratio, reserve });
            for _ in 0..reserve {
                prop_assert!(budget.withdraw());
            }
            prop_assert!(!budget.withdraw());
            for _ in 0..(1.0 / ratio).ceil() as u32 {
                budget.deposit();
            }
            prop_assert!(budget.withdraw());
        }
    }
}
