//! Whether guesses pay: by what steps were measured to take, and by how often guesses were right.

/// The weight of the latest value in a mean that forgets.
const LATEST: f64 = 0.2;

/// What an outcome counts after each later verification.
const KEPT: f64 = 0.9;

/// Outcomes that are thought before any was seen: right ones of all.
const PRIOR: (f64, f64) = (1.5, 2.0);

/// Steps without a guess after which one is tried again though it does not seem to pay; twice as many each time it does
/// not, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: u32 = 32;
const LONGEST_PAUSE: u32 = 1024;

/// Measurements after which one is out of date: sequences grow, and a machine has other things to do.
const VALID: u64 = 256;

/// Seconds that steps were measured to take.
#[derive(Clone, Debug, Default)]
pub(crate) struct Costs {
    /// By the number of tokens that were fed, from 1 on: how long, and the number of the last measurement.
    steps: Vec<(Option<f64>, u64)>,
    /// Measurements so far.
    measured: u64,
}

impl Costs {
    /// A step that was fed so many tokens, those of all its sequences, took so long.
    pub(crate) fn note(&mut self, rows: usize, seconds: f64) {
        if rows == 0 {
            return;
        }
        if self.steps.len() < rows {
            self.steps.resize(rows, (None, 0));
        }
        self.measured += 1;
        let (mean, at) = &mut self.steps[rows - 1];
        note(mean, seconds);
        *at = self.measured;
    }

    /// What a step of so many tokens was measured to take, lately.
    fn lately(&self, rows: usize) -> Option<f64> {
        let &(seconds, at) = self.steps.get(rows.checked_sub(1)?)?;
        seconds.filter(|_| self.measured - at < VALID)
    }

    /// What a step of so many tokens takes: as measured, between the next smaller and larger that were, or as the nearest of
    /// them. `None` where none was measured.
    fn step(&self, rows: usize) -> Option<f64> {
        let measured = |rows: usize| Some((rows as f64, self.steps.get(rows - 1)?.0?));
        let below = (1..=rows).rev().find_map(measured);
        let above = (rows + 1..=self.steps.len()).find_map(measured);
        match (below, above) {
            (Some((less, short)), Some((more, long))) => {
                Some(short + (long - short) * (rows as f64 - less) / (more - less))
            }
            (Some((_, seconds)), None) | (None, Some((_, seconds))) => Some(seconds),
            (None, None) => None,
        }
    }
}

/// Moves a mean that forgets.
pub(super) fn note(mean: &mut Option<f64>, value: f64) {
    *mean = Some(mean.map_or(value, |mean| mean + LATEST * (value - mean)));
}

/// How often guesses for a request were right.
#[derive(Clone, Debug)]
pub(crate) struct Acceptance {
    right: f64,
    seen: f64,
    /// Steps without a guess that are left until one is tried again.
    left: u32,
    /// How many these were.
    pause: u32,
}

impl Default for Acceptance {
    fn default() -> Self {
        Self {
            right: 0.0,
            seen: 0.0,
            left: FIRST_PAUSE,
            pause: FIRST_PAUSE,
        }
    }
}

impl Acceptance {
    /// Of some guesses the first so many were right. Those behind one that was wrong say nothing.
    pub(crate) fn verified(&mut self, drafted: usize, accepted: usize) {
        let wrong = usize::from(accepted < drafted);
        self.right = self.right * KEPT + accepted as f64;
        self.seen = self.seen * KEPT + (accepted + wrong) as f64;
    }

    /// How likely the next guess is to be right.
    pub(crate) fn rate(&self) -> f64 {
        (self.right + PRIOR.0) / (self.seen + PRIOR.1)
    }

    /// How many of `most` tokens are worth guessing for one sequence of a step that is fed `rows` tokens without them and is
    /// expected to give `tokens`: as many as give most tokens for the time, a guess taking `guess` seconds. `None` where the
    /// step without was not measured lately: then it has to be.
    ///
    /// The goodput of Liu et al., "Optimizing speculative decoding for serving large language models" (2024).
    pub(crate) fn worth(
        &self,
        most: usize,
        (rows, tokens): (usize, f64),
        costs: &Costs,
        guess: f64,
    ) -> Option<usize> {
        let (mut best, mut time, mut gives) = (0, costs.lately(rows)?, tokens);
        for count in 1..=most {
            let step = costs.step(rows + count)? + guess * count as f64;
            let expected = tokens + self.expected(count);
            // The quotients compared, so that no time at all is all the better.
            if expected * time > gives * step || expected > gives && step <= time {
                (best, time, gives) = (count, step, expected);
            }
        }
        Some(best)
    }

    /// How many of so many guesses are likely to be right.
    pub(crate) fn expected(&self, count: usize) -> f64 {
        let rate = self.rate();
        let rates = std::iter::successors(Some(rate), |power| Some(power * rate));
        rates.take(count).sum()
    }

    /// A step goes without a guess that there was, and says whether it is time to try one all the same.
    pub(crate) fn pause(&mut self) -> bool {
        self.left -= 1;
        if self.left == 0 {
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.left = self.pause;
            return true;
        }
        false
    }

    /// Guesses pay, so that the next pause begins short.
    pub(crate) fn pays(&mut self) {
        (self.left, self.pause) = (FIRST_PAUSE, FIRST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(measured: &[(usize, f64)]) -> Costs {
        let mut costs = Costs::default();
        for &(rows, seconds) in measured {
            costs.note(rows, seconds);
        }
        costs
    }

    #[test]
    fn what_was_not_measured_is_taken_from_what_is_nearest() {
        let costs = costs(&[(2, 1.0), (6, 3.0)]);
        let read: Vec<Option<f64>> = [1, 2, 3, 5, 6, 9].map(|rows| costs.step(rows)).into();
        let expected = [1.0, 1.0, 1.5, 2.5, 3.0, 3.0].map(Some);
        assert_eq!(read, expected);
        assert_eq!(Costs::default().step(1), None);
        let mut costs = costs;
        costs.note(2, 2.0);
        assert_eq!(costs.step(2), Some(1.2), "the latest moves the mean");
    }

    #[test]
    fn guesses_are_made_while_they_pay() {
        let mut acceptance = Acceptance::default();
        let one = (1, 1.0);
        assert_eq!(
            acceptance.worth(8, one, &Costs::default(), 0.0),
            None,
            "nothing is known"
        );
        // A step of nine tokens costs as much as one: all are free.
        let free = costs(&[(1, 1.0), (9, 1.0)]);
        assert_eq!(acceptance.worth(8, one, &free, 0.0), Some(8));
        let no_time = costs(&[(1, 0.0), (9, 0.0)]);
        assert_eq!(acceptance.worth(8, one, &no_time, 0.0), Some(8));
        // What was only measured with guesses, or long ago, has to be measured without.
        let mut late = costs(&[(9, 1.0)]);
        assert_eq!(acceptance.worth(8, one, &late, 0.0), None);
        late.note(1, 1.0);
        assert_eq!(acceptance.worth(8, one, &late, 0.0), Some(8));
        (0..256).for_each(|_| late.note(9, 1.0));
        assert_eq!(acceptance.worth(8, one, &late, 0.0), None);
        // Each token costs a whole step: a guess gains less than it costs, however often it is right.
        let dear = costs(&[(1, 1.0), (9, 9.0)]);
        assert_eq!(acceptance.worth(8, one, &dear, 0.0), Some(0));
        // A token costs a fifth: 0.75 right is worth some, and 0.1 none.
        let some = costs(&[(1, 1.0), (9, 2.6)]);
        let worth = acceptance.worth(8, one, &some, 0.0);
        // 1.75 / 1.2, 2.3125 / 1.4, 2.734 / 1.6, 3.051 / 1.8, ...: the third is best.
        assert_eq!(worth, Some(3));
        // What guessing itself costs counts too.
        assert_eq!(acceptance.worth(8, one, &some, 0.6), Some(0));
        for _ in 0..50 {
            acceptance.verified(4, 0);
        }
        assert!(acceptance.rate() < 0.2, "{}", acceptance.rate());
        assert_eq!(acceptance.worth(8, one, &some, 0.0), Some(0));
        for _ in 0..50 {
            acceptance.verified(4, 4);
        }
        assert!(acceptance.rate() > 0.95, "{}", acceptance.rate());
        assert_eq!(acceptance.worth(8, one, &some, 0.0), Some(8));
    }

    #[test]
    fn a_pause_ends_in_a_trial_and_each_is_longer() {
        let mut acceptance = Acceptance::default();
        let trials: Vec<usize> = (1..4000).filter(|_| acceptance.pause()).collect();
        let expected = [32, 64, 128, 256, 512, 1024, 1024];
        let sums: Vec<usize> = expected
            .iter()
            .scan(0, |sum, pause| {
                *sum += pause;
                Some(*sum)
            })
            .collect();
        assert_eq!(trials, sums);
        acceptance.pays();
        assert_eq!((1..100).find(|_| acceptance.pause()), Some(32));
    }

    #[test]
    fn guesses_behind_a_wrong_one_say_nothing() {
        let mut acceptance = Acceptance::default();
        acceptance.verified(8, 2);
        assert!((acceptance.rate() - (2.0 + 1.5) / (3.0 + 2.0)).abs() < 1e-12);
        acceptance.verified(1, 1);
        let (right, seen) = (2.0 * 0.9 + 1.0, 3.0 * 0.9 + 1.0);
        assert!((acceptance.rate() - (right + 1.5) / (seen + 2.0)).abs() < 1e-12);
        let rate = acceptance.rate();
        assert!((acceptance.expected(2) - (rate + rate * rate)).abs() < 1e-12);
    }
}
