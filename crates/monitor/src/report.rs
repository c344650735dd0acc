//! Everything about an engine in one report.

use mlx_engine_core::{Backend, ModelConfiguration};
use serde::{Deserialize, Serialize};

use crate::{ErrorKind, HealthConfiguration, HealthReport, InferenceMetrics, ProbeFailure};

/// Everything about an engine, at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DetailedStatus {
    /// How it is, and why.
    pub health: HealthReport,
    /// [`HealthReport::is_live`].
    pub live: bool,
    /// [`HealthReport::is_ready`].
    pub ready: bool,
    /// What computes the tokens.
    pub backend: Option<Backend>,
    /// The model that is loaded, if one is.
    pub model: Option<ModelConfiguration>,
    /// Faults since a request finished or a probe passed.
    pub consecutive_failures: u32,
    /// Seconds since a request finished or a probe passed.
    pub last_success_s_ago: Option<f64>,
    /// The request that failed last, for whatever reason.
    pub last_failure: Option<LastFailure>,
    /// The last probe that came to a conclusion, for the model that is loaded.
    pub last_probe: Option<LastProbe>,
    /// What was measured.
    pub metrics: InferenceMetrics,
    /// The thresholds of health.
    pub configuration: HealthConfiguration,
}

/// A request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastFailure {
    /// Seconds since.
    pub s_ago: f64,
    /// Why.
    pub kind: ErrorKind,
}

/// A check of health by a token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastProbe {
    /// Seconds since.
    pub s_ago: f64,
    /// Why it did not pass, if so.
    pub failure: Option<ProbeFailure>,
}
