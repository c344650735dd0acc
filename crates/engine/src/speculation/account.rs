//! What guesses have gained an answer, and what they may cost it.

/// The part of each step that guesses may lose.
const SHARE: f64 = 0.01;

/// What they may lose beside that, in steps: something has to be tried before it is known whether it pays.
const GRANT: f64 = 1.0;

/// What an answer has to spare for guesses, in steps without guesses. A guess is made where this would cover it if it were
/// wrong. So an answer takes no longer than without guesses but by a step and a hundredth of its own, however
/// guesses turn out and whatever was thought of them: 2% of an answer of 100 tokens, and 1.2% of one of 500.
#[derive(Clone, Debug)]
pub(crate) struct Account(f64);

impl Default for Account {
    fn default() -> Self {
        Self(GRANT)
    }
}

impl Account {
    /// A step was taken without guesses.
    pub(crate) fn step(&mut self) {
        self.0 += SHARE;
    }

    /// A step with guesses gave so many tokens and took so many steps more than one without.
    pub(crate) fn guessed(&mut self, tokens: usize, more: f64) {
        self.0 += SHARE + tokens as f64 - 1.0 - more;
    }

    /// What there is if so many tokens were right and so many steps are lost that nobody has counted yet.
    pub(crate) fn after(&self, right: usize, lost: f64) -> Self {
        Self(self.0 + right as f64 - lost)
    }

    /// Whether guesses may be made that lose so many steps where they are wrong.
    pub(crate) fn covers(&self, steps: f64) -> bool {
        steps <= self.0
    }

    /// Whether not even a guess may be made that costs next to nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.0 < 0.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_lost_has_to_be_earned_again() {
        let mut account = Account::default();
        assert!(account.covers(1.0) && !account.covers(1.1));
        account.guessed(1, 0.5);
        assert!(account.covers(0.5) && !account.covers(0.6));
        account.guessed(1, 0.6);
        assert!(account.is_empty());
        (0..50).for_each(|_| account.step());
        assert!(account.covers(0.4) && !account.covers(0.5));
        account.guessed(4, 0.5);
        assert!(account.covers(2.9));
        let after = account.after(1, 2.0);
        assert!(after.covers(1.9) && !after.covers(2.0));
    }

    proptest! {
        /// Whatever comes of guesses, an answer loses no more than it may.
        #[test]
        fn no_more_is_lost_than_may_be(
            guesses in prop::collection::vec((0.0_f64..3.0, 0.0_f64..1.0, 1_usize..5, any::<bool>()), 1..400),
        ) {
            let (mut account, mut time, mut tokens) = (Account::default(), 0.0, 0);
            for (risk, cost, gives, wants) in guesses {
                if wants && account.covers(risk) {
                    // At most what was thought.
                    account.guessed(gives, risk * cost);
                    time += 1.0 + risk * cost;
                    tokens += gives;
                } else {
                    account.step();
                    time += 1.0;
                    tokens += 1;
                }
                prop_assert!(time <= tokens as f64 * (1.0 + SHARE) + GRANT + 1e-9);
            }
        }
    }
}
