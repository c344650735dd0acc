//! Which of the requests that wait comes first.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How urgent a request is beside others that wait. Within a priority, who came first is first. One that waits long
/// enough overtakes what is more urgent and came later, so that none waits for ever; one that runs is not interrupted.
///
/// ```
/// use mlx_engine_core::{GenerateParams, Priority};
///
/// let params = GenerateParams::default().with_priority(Priority::Low);
/// assert_eq!(serde_json::to_value(&params)?["priority"], "low");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Work that nobody waits for, such as a batch over many documents.
    Low,
    /// What most requests are.
    #[default]
    Normal,
    /// Somebody looks at the screen.
    High,
}

impl Priority {
    /// All there are, the least urgent first.
    pub const ALL: [Self; 3] = [Self::Low, Self::Normal, Self::High];
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_is_written_as_it_is_displayed_and_they_are_in_order() {
        for priority in Priority::ALL {
            assert_eq!(serde_json::to_value(priority).unwrap(), priority.to_string());
        }
        assert!(Priority::ALL.is_sorted());
    }
}
