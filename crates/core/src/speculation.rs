//! What guessing ahead did for an answer.

use serde::{Deserialize, Serialize};

/// What speculation did for an answer: tokens are guessed, and one step of the model verifies several of them. The answer is
/// the same either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SpeculationReport {
    /// Steps that verified guesses.
    pub steps: u32,
    /// Tokens that were guessed and verified.
    pub drafted_tokens: u32,
    /// Those of them that the model chose too.
    pub accepted_tokens: u32,
    /// Steps before which nothing was guessed as it would not have paid, by the acceptance and the times measured so far.
    pub paused_steps: u32,
    /// Why nothing was guessed, or nothing any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub off: Option<SpeculationOff>,
}

/// Why nothing is guessed for a request, or nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SpeculationOff {
    /// The answer is held to a grammar, whose tokens without a choice are fed at once already.
    Constraint,
    /// The model's sequences cannot be cut, so that a wrong guess could not be taken back.
    Uncuttable,
    /// The draft model failed at it; the answer went on without.
    DraftFailed,
}

impl SpeculationReport {
    /// The part of the guesses that was right, from 0 to 1; `None` where nothing was verified.
    pub fn acceptance(&self) -> Option<f64> {
        (self.drafted_tokens > 0).then(|| f64::from(self.accepted_tokens) / f64::from(self.drafted_tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acceptance_is_the_part_that_was_right() {
        let of = |accepted_tokens, drafted_tokens| {
            let report = SpeculationReport {
                drafted_tokens,
                accepted_tokens,
                ..SpeculationReport::default()
            };
            report.acceptance()
        };
        assert_eq!((of(3, 4), of(0, 4), of(1, 1)), (Some(0.75), Some(0.0), Some(1.0)));
        assert_eq!(of(0, 0), None);
    }
}
