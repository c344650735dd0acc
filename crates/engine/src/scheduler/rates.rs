//! How fast the engine is, as it was measured.

use std::time::Duration;

/// The weight of the latest value in a mean that forgets.
const LATEST: f64 = 0.2;

/// What a turn is thought to take before any was measured.
const FIRST_GUESS: f64 = 0.1;

/// Means of what was measured, the latest counting most.
#[derive(Debug, Default)]
pub(super) struct Rates {
    /// Seconds for a token of a prompt.
    prompt_token: Option<f64>,
    /// Seconds for a turn that feeds no prompt.
    turn: Option<f64>,
    /// Tokens of an answer that ended by itself.
    answer: Option<f64>,
}

fn note(mean: &mut Option<f64>, value: f64) {
    *mean = Some(mean.map_or(value, |mean| mean + LATEST * (value - mean)));
}

impl Rates {
    /// A turn that fed so many tokens of a prompt took so long.
    pub(super) fn turned(&mut self, fed: usize, spent: Duration) {
        if fed == 0 {
            note(&mut self.turn, spent.as_secs_f64());
        } else {
            note(&mut self.prompt_token, spent.as_secs_f64() / fed as f64);
        }
    }

    /// An answer ended that has so many tokens.
    pub(super) fn answered(&mut self, tokens: usize) {
        note(&mut self.answer, tokens as f64);
    }

    /// How long it takes to feed so many tokens of prompts and then to end an answer that has `generated` tokens and may
    /// have `most`. An answer is thought to be as long as others were, or as it may be where none has ended.
    pub(super) fn remaining(&self, prompt: usize, generated: usize, most: usize) -> Duration {
        let most = most as f64;
        let length = self.answer.map_or(most, |answer| answer.min(most));
        let left = (length - generated as f64).max(1.0);
        let turn = self.turn.or(self.prompt_token).unwrap_or(FIRST_GUESS);
        let seconds = prompt as f64 * self.prompt_token.unwrap_or(turn) + left * turn;
        // A hint in milliseconds, which is never "at once".
        Duration::from_millis(
            Duration::try_from_secs_f64(seconds)
                .map_or(u64::MAX, |wait| wait.as_millis() as u64)
                .max(1),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(tenths: u64) -> Duration {
        Duration::from_millis(tenths * 100)
    }

    #[test]
    fn what_was_measured_decides() {
        let mut rates = Rates::default();
        rates.turned(0, seconds(5));
        rates.turned(100, seconds(20));
        // 50 tokens of a prompt at 0.02 s, 8 turns of half a second.
        assert_eq!(rates.remaining(50, 2, 10), seconds(10 + 40));
        rates.answered(4);
        assert_eq!(
            rates.remaining(0, 2, 10),
            seconds(10),
            "answers end after 4 tokens"
        );
        assert_eq!(
            rates.remaining(0, 9, 10),
            seconds(5),
            "one token is left at least"
        );
        rates.turned(0, seconds(10));
        assert_eq!(rates.remaining(0, 9, 10), seconds(6), "the latest moves the mean");
    }

    #[test]
    fn there_is_a_hint_before_anything_was_measured_and_none_is_zero() {
        let mut rates = Rates::default();
        assert_eq!(rates.remaining(0, 0, 1), seconds(1));
        rates.turned(0, Duration::ZERO);
        rates.turned(1, Duration::ZERO);
        assert_eq!(rates.remaining(1, 0, 1), Duration::from_millis(1));
    }
}
