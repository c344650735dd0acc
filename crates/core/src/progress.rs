//! How far the loading of a model has come.

use serde::{Deserialize, Serialize};

/// How far the loading of a model has come: first fetched, then read layer by layer, then ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
#[non_exhaustive]
pub enum LoadProgress {
    /// Bytes of the model's files that have come from the hub.
    Fetching {
        /// Bytes that are here.
        done: u64,
        /// Bytes of all files.
        total: u64,
        /// Bytes a second that came of late; 0 while that is not known.
        bytes_per_second: u64,
        /// Seconds that are left at this rate.
        remaining_s: Option<u64>,
    },
    /// Bytes of the model's files on disk.
    Bytes {
        /// Bytes so far.
        done: u64,
        /// Bytes of the whole model.
        total: u64,
    },
    /// Layers whose weights are in memory.
    Layers {
        /// Layers so far.
        done: u32,
        /// Layers of the whole model.
        total: u32,
    },
    /// The model answers requests.
    Ready,
}

/// Hears how far a load has come, on the thread that loads.
pub type ProgressFn = Box<dyn FnMut(LoadProgress) + Send>;

impl LoadProgress {
    /// The part of this stage that is done, 0 to 1. A stage with nothing to do is done.
    pub fn fraction(self) -> f64 {
        let (done, total) = match self {
            Self::Fetching { done, total, .. } | Self::Bytes { done, total } => (done, total),
            Self::Layers { done, total } => (done.into(), total.into()),
            Self::Ready => return 1.0,
        };
        if total == 0 {
            1.0
        } else {
            (done as f64 / total as f64).min(1.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fractions_stay_between_zero_and_one() {
        let check = |progress: LoadProgress, expect: f64| {
            assert!((progress.fraction() - expect).abs() < 1e-12, "{progress:?}");
        };
        let fetching = LoadProgress::Fetching {
            done: 3,
            total: 4,
            bytes_per_second: 1,
            remaining_s: Some(1),
        };
        check(fetching, 0.75);
        check(LoadProgress::Bytes { done: 0, total: 8 }, 0.0);
        check(LoadProgress::Bytes { done: 2, total: 8 }, 0.25);
        check(LoadProgress::Bytes { done: 9, total: 8 }, 1.0);
        check(LoadProgress::Bytes { done: 0, total: 0 }, 1.0);
        check(LoadProgress::Layers { done: 12, total: 24 }, 0.5);
        check(LoadProgress::Ready, 1.0);
    }

    #[test]
    fn a_stage_is_written_by_name() {
        assert_eq!(
            serde_json::to_value(LoadProgress::Layers { done: 1, total: 2 }).unwrap(),
            json!({"stage": "layers", "done": 1, "total": 2})
        );
    }
}
