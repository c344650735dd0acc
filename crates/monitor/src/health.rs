//! How an engine is, and why.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{ErrorKind, ProbeFailure};

/// How an engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineHealth {
    /// Nothing speaks against it.
    #[default]
    Healthy,
    /// It serves, and not as it should.
    Degraded,
    /// It does not serve, or hardly.
    Unhealthy,
}

impl fmt::Display for EngineHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Unhealthy => "unhealthy",
        })
    }
}

/// A fact that speaks against an engine's health, with the numbers and the thresholds they passed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
#[non_exhaustive]
pub enum HealthReason {
    /// The engine names no model or no backend.
    NotLoaded,
    /// The mock answers, not a model.
    MockInUse {
        /// The name that it answers under.
        model: String,
    },
    /// Something else serves in place of the model that was asked for.
    FallbackInUse {
        /// Why.
        why: String,
    },
    /// The last probe brought no token.
    ProbeFailed {
        /// What came of it.
        failure: ProbeFailure,
        /// Requests that have finished since. With any the engine is degraded; only a probe that passes clears it.
        finished_since: u64,
    },
    /// Faults in a row.
    ConsecutiveFailures {
        /// How many.
        count: u32,
        /// How many make it unhealthy.
        limit: u32,
        /// The kind of the last.
        last: ErrorKind,
    },
    /// Too many of the requests in the window ended in a fault.
    ErrorRate {
        /// Requests that ended in a fault.
        failed: u64,
        /// These, and those that finished.
        ended: u64,
        /// One by the other.
        rate: f64,
        /// Where degraded begins.
        degraded_from: f64,
        /// Where unhealthy begins.
        unhealthy_from: f64,
    },
    /// Requests in the window were refused for want of room or time.
    Saturated {
        /// How many.
        refused: u64,
        /// How many may be.
        limit: u64,
    },
    /// Requests wait and nothing comes.
    Stalled {
        /// Requests that wait at this moment.
        waiting: u64,
        /// Seconds that requests have waited since the engine gave the last sign of life.
        silent_s: f64,
        /// Where degraded begins.
        degraded_from_s: f64,
        /// Where unhealthy begins.
        unhealthy_from_s: f64,
    },
    /// A turn of the engine does not end.
    Hung {
        /// Seconds that it has taken so far.
        turn_s: f64,
        /// Where degraded begins.
        degraded_from_s: f64,
        /// Where unhealthy begins.
        unhealthy_from_s: f64,
    },
    /// Requests in the window found the device out of memory.
    OutOfMemory {
        /// How many.
        count: u64,
    },
    /// Memory in use has reached its limit.
    MemoryPressure {
        /// Whose memory.
        memory: MemoryKind,
        /// Bytes in use.
        used_bytes: u64,
        /// Where degraded begins.
        limit_bytes: u64,
    },
    /// Decoding is slow for this engine.
    SlowDecode {
        /// Tokens a second of one request, in the window.
        tokens_per_second: f64,
        /// The median beside as many other requests, since the model was loaded.
        baseline_tokens_per_second: f64,
        /// One by the other.
        ratio: f64,
        /// Where degraded begins.
        degraded_below: f64,
    },
}

/// Whose memory a reason is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryKind {
    /// Resident memory of the engine's process.
    Process,
    /// What is allocated for models; of an engine that does not say, the most that a request of the window saw.
    Device,
}

impl HealthReason {
    /// How bad it is.
    pub fn severity(&self) -> EngineHealth {
        let from = |unhealthy: bool| {
            if unhealthy {
                EngineHealth::Unhealthy
            } else {
                EngineHealth::Degraded
            }
        };
        match *self {
            Self::NotLoaded | Self::ConsecutiveFailures { .. } => EngineHealth::Unhealthy,
            Self::MockInUse { .. }
            | Self::FallbackInUse { .. }
            | Self::Saturated { .. }
            | Self::OutOfMemory { .. }
            | Self::MemoryPressure { .. }
            | Self::SlowDecode { .. } => EngineHealth::Degraded,
            Self::ProbeFailed {
                failure,
                finished_since,
            } => from(finished_since == 0 && failure.is_fault()),
            Self::ErrorRate {
                rate, unhealthy_from, ..
            } => from(rate >= unhealthy_from),
            Self::Stalled {
                silent_s,
                unhealthy_from_s,
                ..
            } => from(silent_s >= unhealthy_from_s),
            Self::Hung {
                turn_s,
                unhealthy_from_s,
                ..
            } => from(turn_s >= unhealthy_from_s),
        }
    }

    /// Whether the engine is stuck: it has a model and brings no token, so that only starting anew helps.
    pub fn is_stuck(&self) -> bool {
        match self {
            Self::ConsecutiveFailures { .. } => true,
            Self::ProbeFailed { .. } | Self::Stalled { .. } | Self::Hung { .. } => {
                self.severity() == EngineHealth::Unhealthy
            }
            _ => false,
        }
    }
}

impl fmt::Display for HealthReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotLoaded => f.write_str("no model is loaded"),
            Self::MockInUse { model } => write!(f, "the mock answers in the place of `{model}`"),
            Self::FallbackInUse { why } => write!(f, "a fallback serves: {why}"),
            Self::ProbeFailed {
                failure,
                finished_since,
            } => write!(
                f,
                "the last probe failed: {failure}; {finished_since} requests finished since"
            ),
            Self::ConsecutiveFailures { count, limit, last } => {
                write!(
                    f,
                    "{count} faults in a row, {limit} allowed, the last of kind {last}"
                )
            }
            Self::ErrorRate {
                failed, ended, rate, ..
            } => {
                write!(f, "{failed} of {ended} requests failed ({:.1}%)", rate * 100.0)
            }
            Self::Saturated { refused, limit } => {
                write!(
                    f,
                    "{refused} requests refused for want of room or time, {limit} allowed"
                )
            }
            Self::Stalled {
                waiting, silent_s, ..
            } => {
                write!(
                    f,
                    "nothing came in {silent_s:.1} s of waiting, {waiting} requests wait"
                )
            }
            Self::Hung { turn_s, .. } => write!(f, "a turn has taken {turn_s:.1} s so far"),
            Self::OutOfMemory { count } => write!(f, "{count} requests found the device out of memory"),
            Self::MemoryPressure {
                memory,
                used_bytes,
                limit_bytes,
            } => {
                let memory = match memory {
                    MemoryKind::Process => "process",
                    MemoryKind::Device => "device",
                };
                write!(
                    f,
                    "{used_bytes} bytes of {memory} memory in use, limit {limit_bytes}"
                )
            }
            Self::SlowDecode {
                tokens_per_second,
                baseline_tokens_per_second,
                ..
            } => write!(
                f,
                "decoding at {tokens_per_second:.1} tokens a second, usually {baseline_tokens_per_second:.1}"
            ),
        }
    }
}

/// A verdict and everything that it rests on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HealthReport {
    /// How the engine is: as its worst reason says.
    pub status: EngineHealth,
    /// What speaks against it; empty where it is healthy.
    pub reasons: Vec<HealthReason>,
}

impl HealthReport {
    pub(crate) fn new(reasons: Vec<HealthReason>) -> Self {
        let status = reasons
            .iter()
            .map(HealthReason::severity)
            .max()
            .unwrap_or_default();
        Self { status, reasons }
    }

    /// Whether starting the engine anew would be of no use: it is not stuck. An engine without a model is live.
    pub fn is_live(&self) -> bool {
        !self.reasons.iter().any(HealthReason::is_stuck)
    }

    /// Whether requests should come here: there is a model and it is not unhealthy.
    pub fn is_ready(&self) -> bool {
        self.status != EngineHealth::Unhealthy
    }
}
