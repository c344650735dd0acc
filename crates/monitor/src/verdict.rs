//! The verdict on facts, as a pure function.

use crate::{ErrorKind, HealthConfiguration, HealthReason, HealthReport, MemoryKind, ProbeFailure};

/// What was measured, as far as it bears on health.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    pub(crate) loaded: bool,
    /// The name that the mock answers under, where it is the mock that does.
    pub(crate) mock: Option<String>,
    /// Why the engine is not what was asked for.
    pub(crate) fallback: Option<String>,
    pub(crate) probe: Option<(ProbeFailure, u64)>,
    pub(crate) consecutive_failures: u32,
    pub(crate) last_failure: Option<ErrorKind>,
    /// Of the window.
    pub(crate) finished: u64,
    /// Of the window.
    pub(crate) faults: u64,
    /// Of the window.
    pub(crate) refused: u64,
    /// Of the window.
    pub(crate) out_of_memory: u64,
    pub(crate) waiting: u64,
    pub(crate) silent_s: f64,
    /// How long the engine has been at one turn.
    pub(crate) turn_s: f64,
    pub(crate) process_memory_bytes: Option<u64>,
    pub(crate) device_memory_bytes: u64,
    /// Tokens a second in the window and the median: of the level of concurrency where they are furthest apart.
    pub(crate) decode: Option<(f64, f64)>,
}

/// The verdict.
pub(crate) fn assess(facts: &Facts, limits: &HealthConfiguration) -> HealthReport {
    let mut reasons = Vec::new();
    if !facts.loaded {
        reasons.push(HealthReason::NotLoaded);
    }
    if let Some(model) = &facts.mock {
        reasons.push(HealthReason::MockInUse { model: model.clone() });
    }
    if let Some(why) = &facts.fallback {
        reasons.push(HealthReason::FallbackInUse { why: why.clone() });
    }
    if let Some((failure, finished_since)) = facts.probe {
        reasons.push(HealthReason::ProbeFailed {
            failure,
            finished_since,
        });
    }
    if let Some(last) = facts.last_failure
        && facts.consecutive_failures >= limits.max_consecutive_failures
    {
        reasons.push(HealthReason::ConsecutiveFailures {
            count: facts.consecutive_failures,
            limit: limits.max_consecutive_failures,
            last,
        });
    }
    let ended = facts.finished + facts.faults;
    if ended >= u64::from(limits.min_requests) {
        let rate = facts.faults as f64 / ended as f64;
        if rate >= limits.degraded_error_rate {
            reasons.push(HealthReason::ErrorRate {
                failed: facts.faults,
                ended,
                rate,
                degraded_from: limits.degraded_error_rate,
                unhealthy_from: limits.unhealthy_error_rate,
            });
        }
    }
    if facts.refused > limits.max_refusals {
        reasons.push(HealthReason::Saturated {
            refused: facts.refused,
            limit: limits.max_refusals,
        });
    }
    if facts.silent_s >= limits.degraded_stall_s {
        reasons.push(HealthReason::Stalled {
            waiting: facts.waiting,
            silent_s: facts.silent_s,
            degraded_from_s: limits.degraded_stall_s,
            unhealthy_from_s: limits.unhealthy_stall_s,
        });
    }
    if facts.turn_s >= limits.degraded_turn_s {
        reasons.push(HealthReason::Hung {
            turn_s: facts.turn_s,
            degraded_from_s: limits.degraded_turn_s,
            unhealthy_from_s: limits.unhealthy_turn_s,
        });
    }
    if facts.out_of_memory > 0 {
        reasons.push(HealthReason::OutOfMemory {
            count: facts.out_of_memory,
        });
    }
    let memory = [
        (
            MemoryKind::Process,
            facts.process_memory_bytes,
            limits.process_memory_limit_bytes,
        ),
        (
            MemoryKind::Device,
            Some(facts.device_memory_bytes),
            limits.device_memory_limit_bytes,
        ),
    ];
    for (memory, used, limit) in memory {
        if let (Some(used_bytes), Some(limit_bytes)) = (used, limit)
            && used_bytes >= limit_bytes
        {
            reasons.push(HealthReason::MemoryPressure {
                memory,
                used_bytes,
                limit_bytes,
            });
        }
    }
    if let Some((tokens_per_second, baseline_tokens_per_second)) = facts.decode {
        let ratio = tokens_per_second / baseline_tokens_per_second;
        if ratio < limits.slow_decode_ratio {
            reasons.push(HealthReason::SlowDecode {
                tokens_per_second,
                baseline_tokens_per_second,
                ratio,
                degraded_below: limits.slow_decode_ratio,
            });
        }
    }
    HealthReport::new(reasons)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::EngineHealth;
    use EngineHealth::{Degraded, Healthy, Unhealthy};

    fn well() -> Facts {
        Facts {
            loaded: true,
            ..Facts::default()
        }
    }

    /// The verdict on facts: how it is, by what reason, whether live.
    #[track_caller]
    fn check(facts: &Facts, status: EngineHealth, reason: &str, live: bool) {
        let limits = HealthConfiguration {
            process_memory_limit_bytes: Some(100),
            device_memory_limit_bytes: Some(100),
            ..HealthConfiguration::default()
        };
        let report = assess(facts, &limits);
        assert_eq!(report.status, status, "{report:?}");
        assert_eq!(report.is_live(), live, "{report:?}");
        assert_eq!(report.is_ready(), status != Unhealthy);
        let names: Vec<_> = report
            .reasons
            .iter()
            .map(|reason| serde_json::to_value(reason).unwrap()["reason"].clone())
            .collect();
        assert_eq!(names.len(), usize::from(!reason.is_empty()), "{report:?}");
        assert!(names.iter().all(|name| name == reason), "{report:?}");
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<HealthReport>(&json).unwrap(), report);
        assert!(
            report
                .reasons
                .iter()
                .all(|reason| !reason.to_string().ends_with('.'))
        );
    }

    #[test]
    fn every_fact_has_its_verdict() {
        check(&well(), Healthy, "", true);
        check(&Facts::default(), Unhealthy, "not_loaded", true);
        let mock = Facts {
            mock: Some("qwen3".to_owned()),
            ..well()
        };
        check(&mock, Degraded, "mock_in_use", true);
        let row = |consecutive_failures| Facts {
            consecutive_failures,
            last_failure: Some(ErrorKind::Device),
            ..well()
        };
        check(&row(2), Healthy, "", true);
        check(&row(3), Unhealthy, "consecutive_failures", false);
        let rate = |finished, faults| Facts {
            finished,
            faults,
            ..well()
        };
        check(&rate(4, 5), Healthy, "", true);
        check(&rate(96, 4), Healthy, "", true);
        check(&rate(95, 5), Degraded, "error_rate", true);
        check(&rate(5, 5), Unhealthy, "error_rate", true);
        check(&Facts { refused: 1, ..well() }, Degraded, "saturated", true);
        let silent = |silent_s| Facts { silent_s, ..well() };
        check(&silent(29.9), Healthy, "", true);
        check(&silent(30.0), Degraded, "stalled", true);
        check(&silent(300.0), Unhealthy, "stalled", false);
        let out = Facts {
            out_of_memory: 1,
            ..well()
        };
        check(&out, Degraded, "out_of_memory", true);
        let process = |bytes| Facts {
            process_memory_bytes: bytes,
            ..well()
        };
        check(&process(None), Healthy, "", true);
        check(&process(Some(99)), Healthy, "", true);
        check(&process(Some(100)), Degraded, "memory_pressure", true);
        let device = Facts {
            device_memory_bytes: 100,
            ..well()
        };
        check(&device, Degraded, "memory_pressure", true);
        let decode = |now, usual| Facts {
            decode: Some((now, usual)),
            ..well()
        };
        check(&decode(50.0, 100.0), Healthy, "", true);
        check(&decode(49.0, 100.0), Degraded, "slow_decode", true);
    }

    #[test]
    fn a_probe_that_failed_is_never_healthy() {
        let probe = |failure, since| Facts {
            probe: Some((failure, since)),
            ..well()
        };
        let error = |kind| ProbeFailure::Error { kind };
        check(
            &probe(error(ErrorKind::Device), 0),
            Unhealthy,
            "probe_failed",
            false,
        );
        check(
            &probe(error(ErrorKind::Device), 1),
            Degraded,
            "probe_failed",
            true,
        );
        check(
            &probe(error(ErrorKind::QueueFull), 0),
            Degraded,
            "probe_failed",
            true,
        );
        check(&probe(ProbeFailure::NoToken, 0), Unhealthy, "probe_failed", false);
        let abandoned = ProbeFailure::Abandoned { after_s: 9.0 };
        check(&probe(abandoned, 0), Degraded, "probe_failed", true);
    }

    #[test]
    fn reasons_read_as_sentences() {
        let reason = HealthReason::ErrorRate {
            failed: 1,
            ended: 8,
            rate: 0.125,
            degraded_from: 0.05,
            unhealthy_from: 0.5,
        };
        assert_eq!(reason.to_string(), "1 of 8 requests failed (12.5%)");
        let reason = HealthReason::MockInUse {
            model: "qwen3".to_owned(),
        };
        assert_eq!(reason.to_string(), "the mock answers in the place of `qwen3`");
        assert_eq!(format!("{Degraded:>9}"), " degraded");
    }

    proptest! {
        #[test]
        fn an_engine_is_healthy_where_nothing_speaks_against_it_alone(
            loaded: bool, faults in 0..100_u64, finished in 0..100_u64, row in 0..5_u32, refused in 0..3_u64,
            silent_s in 0.0..400.0_f64,
        ) {
            let facts = Facts {
                loaded, faults, finished, refused, silent_s,
                consecutive_failures: row,
                last_failure: Some(ErrorKind::Internal),
                ..Facts::default()
            };
            let report = assess(&facts, &HealthConfiguration::default());
            prop_assert_eq!(report.status == Healthy, report.reasons.is_empty());
            if !loaded || row >= 3 || silent_s >= 300.0 {
                prop_assert_eq!(report.status, Unhealthy);
            }
        }
    }
}
