//! What computes the tokens, and when something else may.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What computes the tokens. Every output, metric, health report and log line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Backend {
    /// A real model on MLX.
    Mlx,
    /// The scripted stand-in, which never poses as a model.
    Mock,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Mlx => "mlx",
            Self::Mock => "mock",
        })
    }
}

/// When the mock may stand in for a model. An engine on a fallback reports itself as degraded, with the reason.
///
/// ```
/// use mlx_engine_core::FallbackPolicy;
///
/// // In a file of settings: "never", "when_mlx_unavailable" or "on_load_failure".
/// let policy: FallbackPolicy = serde_json::from_str("\"on_load_failure\"")?;
/// assert_eq!(policy, FallbackPolicy::OnLoadFailure);
/// assert_eq!(FallbackPolicy::default(), FallbackPolicy::WhenMlxUnavailable);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FallbackPolicy {
    /// Never: where MLX cannot be, loading is an error.
    Never,
    /// Where MLX cannot be at all, as in a simulator or a build without it. A model that fails to load is an error.
    #[default]
    WhenMlxUnavailable,
    /// Also where MLX is there and the model fails to load.
    OnLoadFailure,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_written_as_it_is_displayed() {
        for backend in [Backend::Mlx, Backend::Mock] {
            assert_eq!(serde_json::to_value(backend).unwrap(), backend.to_string());
        }
    }

    #[test]
    fn a_load_failure_is_no_reason_to_fall_back_by_default() {
        assert_eq!(FallbackPolicy::default(), FallbackPolicy::WhenMlxUnavailable);
        assert_eq!(
            serde_json::to_value(FallbackPolicy::OnLoadFailure).unwrap(),
            "on_load_failure"
        );
    }
}
