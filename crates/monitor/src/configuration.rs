//! From where on an engine is not well.

use mlx_engine_core::ParamError;
use serde::{Deserialize, Serialize};

/// The thresholds of health.
///
/// ```
/// use mlx_engine_monitor::HealthConfiguration;
///
/// let strict = HealthConfiguration { max_consecutive_failures: 1, ..HealthConfiguration::default() };
/// strict.validate()?;
///
/// let error = HealthConfiguration { degraded_error_rate: 2.0, ..strict }.validate().unwrap_err();
/// assert_eq!(error.to_string(), "`degraded_error_rate` is 2, allowed: above 0 and at most 1");
/// # Ok::<(), mlx_engine_core::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HealthConfiguration {
    /// The length of the rolling window in seconds, 0.001 to a day. Health looks back as far, and so does
    /// [`InferenceMetrics::window`](crate::InferenceMetrics::window).
    pub window_s: f64,
    /// As many faults in a row, with no request finished between them, are unhealthy; at least 1.
    pub max_consecutive_failures: u32,
    /// Fewer requests in the window than this, finished and failed, say nothing about a rate; at least 1. Nor do they
    /// about the speed of decoding.
    pub min_requests: u32,
    /// The part of the requests in the window that may end in a fault, above 0 and at most 1. From it on the engine
    /// is degraded.
    pub degraded_error_rate: f64,
    /// The same for unhealthy; at least [`degraded_error_rate`](Self::degraded_error_rate).
    pub unhealthy_error_rate: f64,
    /// Requests in the window that may be refused for want of room or time; one more is degraded.
    pub max_refusals: u64,
    /// Seconds that requests may wait while nothing comes from the engine, above 0. Prefill of a long prompt is such
    /// a wait. From it on the engine is degraded.
    pub degraded_stall_s: f64,
    /// The same for unhealthy; at least [`degraded_stall_s`](Self::degraded_stall_s).
    pub unhealthy_stall_s: f64,
    /// Seconds that one turn of the engine may take, a chunk of a prompt and a token of each answer, where the engine says how
    /// long it has been at it; above 0. From it on the engine is degraded.
    pub degraded_turn_s: f64,
    /// The same for unhealthy; at least [`degraded_turn_s`](Self::degraded_turn_s).
    pub unhealthy_turn_s: f64,
    /// Decoding in the window at less than this part of its own median speed, beside as many other requests, is
    /// degraded; 0 to 1, where 0 never is.
    pub slow_decode_ratio: f64,
    /// Requests that the median needs before anything is compared with it; at least 1.
    pub baseline_requests: u32,
    /// Resident memory of the process, in bytes, from which on the engine is degraded; at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_memory_limit_bytes: Option<u64>,
    /// Memory that is allocated for models, in bytes, from which on the engine is degraded; at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory_limit_bytes: Option<u64>,
    /// A probe that was given up sooner, in seconds, says nothing; 0 or more.
    pub probe_patience_s: f64,
}

impl Default for HealthConfiguration {
    fn default() -> Self {
        Self {
            window_s: 60.0,
            max_consecutive_failures: 3,
            min_requests: 10,
            degraded_error_rate: 0.05,
            unhealthy_error_rate: 0.5,
            max_refusals: 0,
            degraded_stall_s: 30.0,
            unhealthy_stall_s: 300.0,
            degraded_turn_s: 30.0,
            unhealthy_turn_s: 120.0,
            slow_decode_ratio: 0.5,
            baseline_requests: 20,
            process_memory_limit_bytes: None,
            device_memory_limit_bytes: None,
            probe_patience_s: 5.0,
        }
    }
}

/// A day, the longest window.
const DAY_S: f64 = 86_400.0;

impl HealthConfiguration {
    /// Checks every range.
    ///
    /// # Errors
    ///
    /// The first field that is out of its range.
    pub fn validate(&self) -> Result<(), ParamError> {
        let finite = |field, value: f64, least: f64, allowed: &str| {
            ParamError::check(field, value, value.is_finite() && value >= least, allowed)
        };
        let rate = |field, value: f64| {
            ParamError::check(field, value, value > 0.0 && value <= 1.0, "above 0 and at most 1")
        };
        let some = |field, value: u64| ParamError::at_least(field, value, 1);

        ParamError::between("window_s", self.window_s, 0.001..=DAY_S)?;
        some("max_consecutive_failures", self.max_consecutive_failures.into())?;
        some("min_requests", self.min_requests.into())?;
        rate("degraded_error_rate", self.degraded_error_rate)?;
        rate("unhealthy_error_rate", self.unhealthy_error_rate)?;
        let least = self.degraded_error_rate;
        finite(
            "unhealthy_error_rate",
            self.unhealthy_error_rate,
            least,
            "at least degraded_error_rate",
        )?;
        finite(
            "degraded_stall_s",
            self.degraded_stall_s,
            f64::MIN_POSITIVE,
            "above 0",
        )?;
        let least = self.degraded_stall_s;
        finite(
            "unhealthy_stall_s",
            self.unhealthy_stall_s,
            least,
            "at least degraded_stall_s",
        )?;
        finite(
            "degraded_turn_s",
            self.degraded_turn_s,
            f64::MIN_POSITIVE,
            "above 0",
        )?;
        let least = self.degraded_turn_s;
        finite(
            "unhealthy_turn_s",
            self.unhealthy_turn_s,
            least,
            "at least degraded_turn_s",
        )?;
        ParamError::between("slow_decode_ratio", self.slow_decode_ratio, 0.0..=1.0)?;
        some("baseline_requests", self.baseline_requests.into())?;
        some(
            "process_memory_limit_bytes",
            self.process_memory_limit_bytes.unwrap_or(1),
        )?;
        some(
            "device_memory_limit_bytes",
            self.device_memory_limit_bytes.unwrap_or(1),
        )?;
        finite("probe_patience_s", self.probe_patience_s, 0.0, "0 or more")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: serde_json::Value) -> HealthConfiguration {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_is_not_written_is_the_default() {
        assert_eq!(read(json!({})), HealthConfiguration::default());
        HealthConfiguration::default().validate().unwrap();
        let json = serde_json::to_value(HealthConfiguration::default()).unwrap();
        assert_eq!(read(json), HealthConfiguration::default());
        assert!(serde_json::from_value::<HealthConfiguration>(json!({"windows": 1})).is_err());
    }

    #[test]
    fn every_field_has_its_range() {
        let check = |value: serde_json::Value| {
            let field = value.as_object().unwrap().keys().next().unwrap().clone();
            let error = read(value).validate().unwrap_err();
            assert_eq!(error.field(), field);
        };
        check(json!({"window_s": 0.0}));
        check(json!({"window_s": 1e9}));
        check(json!({"max_consecutive_failures": 0}));
        check(json!({"min_requests": 0}));
        check(json!({"degraded_error_rate": 0.0}));
        check(json!({"unhealthy_error_rate": 1.5}));
        check(json!({"unhealthy_error_rate": 0.01}));
        check(json!({"degraded_stall_s": 0.0}));
        check(json!({"unhealthy_stall_s": 1.0}));
        check(json!({"slow_decode_ratio": -0.5}));
        check(json!({"baseline_requests": 0}));
        check(json!({"process_memory_limit_bytes": 0}));
        check(json!({"device_memory_limit_bytes": 0}));
        check(json!({"probe_patience_s": -1.0}));
        let not_a_number = HealthConfiguration {
            window_s: f64::NAN,
            ..HealthConfiguration::default()
        };
        assert_eq!(not_a_number.validate().unwrap_err().field(), "window_s");
    }
}
