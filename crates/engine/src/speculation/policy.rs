//! Whether guesses pay: by what steps were measured to take, and by how often guesses were right.

use super::Account;

/// The weight of the latest value in a mean that forgets.
const LATEST: f64 = 0.2;

/// What an outcome counts after each later verification.
const KEPT: f64 = 0.9;

/// Outcomes that are thought before any was seen, and how many of these are right until some were seen for other requests.
const PRIOR: f64 = 2.0;
const PRIOR_RATE: f64 = 0.75;

/// The weight of the latest outcome in what is thought of later requests.
const LATEST_OUTCOME: f64 = 0.05;

/// Tokens that are guessed while none was right: what is tried costs little.
const FIRST_REACH: usize = 2;

/// How much of what was seen before a pause counts after it.
const KEPT_IN_PAUSE: f64 = 0.5;

/// Guesses have to give this many times the tokens for the time that a plain step gives: what was measured is not exact, and
/// a step that is begun before the last one is read hides what happens in between.
const GAIN: f64 = 1.03;

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

    /// What a step of so many tokens takes at most: where neither it nor a larger one was measured, it takes no more for each of
    /// its tokens than the largest that was.
    fn most(&self, rows: usize) -> Option<f64> {
        let largest = self.steps.iter().rposition(|(seconds, _)| seconds.is_some())? + 1;
        Some(self.step(rows)? * (rows as f64 / largest as f64).max(1.0))
    }

    /// How much longer a step of so many sequences has taken than one without guesses, if it took `seconds`: in such steps of
    /// all of them together. Less where it was faster.
    pub(crate) fn more(&self, sequences: usize, seconds: f64) -> f64 {
        match self.step(sequences) {
            Some(plain) if plain > 0.0 => (seconds / plain - 1.0) * sequences as f64,
            _ => 0.0,
        }
    }
}

/// Moves a mean that forgets.
pub(super) fn note(mean: &mut Option<f64>, value: f64) {
    *mean = Some(mean.map_or(value, |mean| mean + LATEST * (value - mean)));
}

/// A step before something is guessed for one more of its sequences.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Base {
    /// Tokens that it would be fed without any guess.
    plain: usize,
    /// Tokens that it is fed.
    rows: usize,
    /// Tokens that it is expected to give.
    tokens: f64,
}

impl Base {
    /// A step of so many sequences without a guess.
    pub(crate) fn new(sequences: usize) -> Self {
        Self {
            plain: sequences,
            rows: sequences,
            tokens: sequences as f64,
        }
    }

    /// The same step with so many guesses more, of which so many are expected to be right.
    pub(crate) fn with(self, guesses: usize, expected: f64) -> Self {
        Self {
            rows: self.rows + guesses,
            tokens: self.tokens + expected,
            ..self
        }
    }

    /// How many steps so many guesses more take at most, a guess taking `guess` seconds. `None` where no step was measured.
    pub(crate) fn risk(&self, guesses: usize, costs: &Costs, guess: f64) -> Option<f64> {
        let least = costs.step(self.rows)?;
        let added = costs.most(self.rows + guesses)? + guess * guesses as f64 - least;
        Some(costs.more(self.plain, costs.step(self.plain)? + added.max(0.0)))
    }

    /// How many of so many guesses more an answer can afford to lose.
    pub(crate) fn affordable(&self, guesses: usize, account: &Account, costs: &Costs, guess: f64) -> usize {
        let covers = |&count: &usize| {
            let risk = self.risk(count, costs, guess);
            risk.is_some_and(|risk| account.covers(risk))
        };
        (1..=guesses).rev().find(covers).unwrap_or(0)
    }
}

/// How often guesses were right for all requests so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usual(f64);

impl Default for Usual {
    fn default() -> Self {
        Self(PRIOR_RATE)
    }
}

impl Usual {
    /// Of some guesses the first so many were right.
    pub(crate) fn verified(&mut self, drafted: usize, accepted: usize) {
        let seen = accepted + usize::from(accepted < drafted);
        for right in (0..seen).map(|at| at < accepted) {
            self.0 += LATEST_OUTCOME * (f64::from(u8::from(right)) - self.0);
        }
    }
}

/// How often guesses for a request were right, and whether they rest.
#[derive(Clone, Debug)]
pub(crate) struct Acceptance {
    usual: Usual,
    right: f64,
    seen: f64,
    /// Steps of a pause that are left.
    left: u32,
    /// How many the next one has.
    pause: u32,
    /// Whether a pause is over and nothing was guessed since.
    trial: bool,
}

impl Default for Acceptance {
    fn default() -> Self {
        Self::new(Usual::default())
    }
}

impl Acceptance {
    /// For a request whose guesses are thought to be right as often as is usual.
    pub(crate) fn new(usual: Usual) -> Self {
        Self {
            usual,
            right: 0.0,
            seen: 0.0,
            left: 0,
            pause: FIRST_PAUSE,
            trial: false,
        }
    }

    /// Of some guesses the first so many were right. Those behind one that was wrong say nothing.
    pub(crate) fn verified(&mut self, drafted: usize, accepted: usize) {
        let wrong = usize::from(accepted < drafted);
        self.trial = false;
        if accepted * 2 > drafted {
            self.pause = FIRST_PAUSE;
        }
        self.right = self.right * KEPT + accepted as f64;
        self.seen = self.seen * KEPT + (accepted + wrong) as f64;
    }

    /// How likely the next guess is to be right.
    pub(crate) fn rate(&self) -> f64 {
        (self.right + PRIOR * self.usual.0) / (self.seen + PRIOR)
    }

    /// The most tokens that are guessed at once: few until some were right.
    pub(crate) fn reach(&self) -> usize {
        FIRST_REACH + (2.0 * self.right) as usize
    }

    /// How many of `most` tokens are worth guessing for one sequence of a step: as many as give most tokens for the time, a
    /// guess taking `guess` seconds. `None` where a step without guesses was not measured lately: then it has to be.
    ///
    /// The goodput of Liu et al., "Optimizing speculative decoding for serving large language models" (2024).
    pub(crate) fn worth(
        &self,
        most: usize,
        Base { plain, rows, tokens }: Base,
        costs: &Costs,
        guess: f64,
    ) -> Option<usize> {
        costs.lately(plain)?;
        let plain = costs.step(rows)?;
        let (mut best, mut time, mut gives) = (0, plain, tokens);
        for count in 1..=most {
            let step = costs.step(rows + count)? + guess * count as f64;
            let expected = tokens + self.expected(count);
            // The quotients compared, so that no time at all is all the better.
            if expected * time > gives * step || expected > gives && step <= time {
                (best, time, gives) = (count, step, expected);
            }
        }
        let pays = gives * plain >= GAIN * tokens * time;
        Some(if pays { best } else { 0 })
    }

    /// How many of so many guesses are likely to be right.
    pub(crate) fn expected(&self, count: usize) -> f64 {
        let rate = self.rate();
        let rates = std::iter::successors(Some(rate), |power| Some(power * rate));
        rates.take(count).sum()
    }

    /// Whether a step goes without a guess, whatever could be guessed; it is one of the pause.
    pub(crate) fn rests(&mut self) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        if self.left == 0 {
            // What answers look like changes.
            self.right *= KEPT_IN_PAUSE;
            self.seen *= KEPT_IN_PAUSE;
            self.trial = true;
        }
        true
    }

    /// A guess does not pay by what is known. Says whether it is made all the same, as the pause has been long; else there is
    /// a pause from now on, this step included.
    pub(crate) fn decline(&mut self) -> bool {
        if !self.trial {
            self.left = self.pause - 1;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
        self.trial
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
        let one = Base::new(1);
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
        let mut trials = Vec::new();
        for step in 0..4000 {
            if !acceptance.rests() && acceptance.decline() {
                trials.push(step);
                acceptance.verified(2, 0);
            }
        }
        // A pause, a step with a guess, and so on.
        let pauses = [32, 64, 128, 256, 512, 1024, 1024];
        let mut at = 0;
        let expected: Vec<usize> = pauses
            .iter()
            .enumerate()
            .map(|(before, pause)| {
                at += pause;
                at + before
            })
            .collect();
        assert_eq!(trials, expected);
        while acceptance.rests() {}
        // One that was right makes the next pause short.
        acceptance.verified(2, 2);
        assert!(!acceptance.decline());
        assert_eq!((0..100).take_while(|_| acceptance.rests()).count(), 31);
    }

    #[test]
    fn what_others_guess_in_the_same_step_need_not_have_been_measured() {
        let costs = costs(&[(3, 1.0), (9, 1.0)]);
        let base = Base::new(3).with(4, 3.0);
        assert_eq!(Acceptance::default().worth(2, base, &costs, 0.0), Some(2));
    }

    #[test]
    fn little_is_tried_until_some_is_right() {
        let mut acceptance = Acceptance::default();
        assert_eq!(acceptance.reach(), 2);
        acceptance.verified(2, 0);
        assert_eq!(acceptance.reach(), 2);
        acceptance.verified(2, 2);
        assert_eq!(acceptance.reach(), 6);
        acceptance.verified(6, 5);
        assert_eq!(acceptance.reach(), 15);
    }

    #[test]
    fn what_is_usual_is_thought_of_a_new_request() {
        let mut usual = Usual::default();
        (0..100).for_each(|_| usual.verified(4, 0));
        assert!(Acceptance::new(usual).rate() < 0.01, "{usual:?}");
        (0..100).for_each(|_| usual.verified(4, 3));
        let rate = Acceptance::new(usual).rate();
        assert!((0.65..0.85).contains(&rate), "{rate}");
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
