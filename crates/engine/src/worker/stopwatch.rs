//! What the steps take that a turn reads.

use std::time::Duration;

use crate::scheduler::Steps;

/// Measures steps. A turn waits for those that the turn before began, and begins the next: on one device they run while the
/// next turn waits, on another while they are fed. So what they took is the time in which they were fed, and that of the
/// next turn without the time in which it feeds others.
#[derive(Debug, Default)]
pub(super) struct Stopwatch {
    /// What this turn has fed, and how long that took.
    begun: Steps,
    /// The same of the turn before.
    before: Steps,
}

impl Stopwatch {
    /// A step was begun for rows of so many tokens of prompts, and of so many answers.
    pub(super) fn begun(&mut self, prompt_tokens: usize, answers: usize) {
        self.begun.prompt_tokens += prompt_tokens;
        self.begun.answers += answers;
    }

    /// Feeding steps took so long.
    pub(super) fn fed(&mut self, spent: Duration) {
        self.begun.spent += spent;
    }

    /// A turn took so long, of which `other` was neither feeding nor waiting. Gives the steps that it read.
    pub(super) fn turned(&mut self, spent: Duration, other: Duration) -> Steps {
        let begun = std::mem::take(&mut self.begun);
        let read = std::mem::replace(&mut self.before, begun);
        Steps {
            spent: read.spent + spent.saturating_sub(begun.spent + other),
            ..read
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prompt of 100 tokens takes 5 seconds and a step of an answer 1, on devices that run them at once and later.
    #[test]
    fn a_step_counts_for_the_turn_that_reads_it() {
        let seconds = Duration::from_secs;
        for eager in [true, false] {
            let mut stopwatch = Stopwatch::default();
            let mut turn = |prompt_tokens, answers, before: u64, takes: u64| {
                stopwatch.begun(prompt_tokens, answers);
                let feeding = if eager { takes } else { 0 };
                stopwatch.fed(seconds(feeding));
                // A draft model takes 2 seconds.
                stopwatch.turned(seconds(2 + if eager { takes } else { before }), seconds(2))
            };
            assert_eq!(turn(0, 1, 0, 1), Steps::default());
            let answers = |answers, spent| Steps {
                prompt_tokens: 0,
                answers,
                spent: seconds(spent),
            };
            assert_eq!(turn(100, 1, 1, 6), answers(1, 1));
            let mixed = Steps {
                prompt_tokens: 100,
                ..answers(1, 6)
            };
            assert_eq!(turn(0, 2, 6, 1), mixed);
            assert_eq!(turn(0, 2, 1, 1), answers(2, 1));
        }
    }
}
