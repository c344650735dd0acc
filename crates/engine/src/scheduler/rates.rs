//! How fast the engine is, as it was measured.

use std::time::Duration;

/// The weight of the latest value in a mean that forgets.
const LATEST: f64 = 0.2;

/// Seconds that a step is thought to take before any was measured, and those for each token of a prompt.
const FIRST_GUESS: f64 = 0.1;
const FIRST_GUESS_PROMPT: f64 = 0.01;

/// Steps, and how long they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Steps {
    /// Tokens of prompts that they were fed.
    pub(crate) prompt_tokens: usize,
    /// Answers that they took further.
    pub(crate) answers: usize,
    pub(crate) spent: Duration,
}

/// Means of what was measured, the latest counting most.
#[derive(Debug, Default)]
pub(super) struct Rates {
    /// Tokens of prompts that were fed and the seconds that they took, what was before counting less each time.
    prompts: Option<(f64, f64)>,
    /// Seconds for a step that feeds no prompt.
    step: Option<f64>,
    /// Tokens of an answer that ended by itself.
    answer: Option<f64>,
}

fn note(mean: &mut Option<f64>, value: f64) {
    *mean = Some(mean.map_or(value, |mean| mean + LATEST * (value - mean)));
}

impl Rates {
    /// Steps took so long. Of those that took answers further and fed prompts, what a step without prompts takes is not the
    /// prompts'.
    pub(super) fn took(&mut self, steps: Steps) {
        let seconds = steps.spent.as_secs_f64();
        if steps.prompt_tokens == 0 {
            if steps.answers > 0 {
                note(&mut self.step, seconds);
            }
            return;
        }
        let answers = self.step.filter(|_| steps.answers > 0).unwrap_or(0.0);
        let (tokens, before) = self.prompts.unwrap_or_default();
        self.prompts = Some((
            tokens * (1.0 - LATEST) + steps.prompt_tokens as f64,
            before * (1.0 - LATEST) + (seconds - answers).max(0.0),
        ));
    }

    /// Seconds for a token of a prompt.
    fn prompt_token(&self) -> Option<f64> {
        self.prompts.map(|(tokens, seconds)| seconds / tokens)
    }

    /// How long it takes to feed so many tokens of a prompt.
    pub(super) fn prefill(&self, tokens: usize) -> Duration {
        let each = self.prompt_token().unwrap_or(FIRST_GUESS_PROMPT);
        Duration::try_from_secs_f64(tokens as f64 * each).unwrap_or(Duration::MAX)
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
        let step = self.step.or(self.prompt_token()).unwrap_or(FIRST_GUESS);
        let seconds = prompt as f64 * self.prompt_token().unwrap_or(step) + left * step;
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

    /// Steps that took so many tenths of a second.
    fn steps(prompt_tokens: usize, answers: usize, tenths: u64) -> Steps {
        Steps {
            prompt_tokens,
            answers,
            spent: seconds(tenths),
        }
    }

    #[test]
    fn what_was_measured_decides() {
        let mut rates = Rates::default();
        rates.took(steps(0, 1, 5));
        rates.took(steps(100, 0, 20));
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
        rates.took(steps(0, 2, 10));
        assert_eq!(rates.remaining(0, 9, 10), seconds(6), "the latest moves the mean");
    }

    #[test]
    fn there_is_a_hint_before_anything_was_measured_and_none_is_zero() {
        let mut rates = Rates::default();
        assert_eq!(rates.remaining(0, 0, 1), seconds(1));
        rates.took(steps(0, 0, 70));
        assert_eq!(rates.remaining(0, 0, 1), seconds(1), "nothing was fed");
        rates.took(steps(0, 1, 0));
        rates.took(steps(1, 0, 0));
        assert_eq!(rates.remaining(1, 0, 1), Duration::from_millis(1));
    }

    /// What answers take of a step is not the prompts', and a prompt of few tokens says little of what one takes.
    #[test]
    fn a_prompt_takes_what_it_adds_to_a_step() {
        let mut rates = Rates::default();
        assert_eq!(rates.prefill(50), seconds(5), "nothing was measured");
        rates.took(steps(0, 3, 10));
        rates.took(steps(100, 3, 30));
        assert_eq!(rates.prefill(50), seconds(10));
        // 2 seconds more for 5 tokens: 3.6 for 85.
        rates.took(steps(5, 3, 30));
        assert_eq!(rates.prefill(170), seconds(72));
    }
}
