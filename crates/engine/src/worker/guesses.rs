//! What is guessed for a request that runs, and what came of it.

use mlx_engine_core::{SpeculationOff, SpeculationReport};

use crate::speculation::{Acceptance, Account, Usual};

/// What is guessed for a request that runs, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Guesses {
    /// Guesses that the step that is not read yet was fed behind its token.
    pub(super) fed: Vec<u32>,
    /// How many of them have turned out right.
    right: usize,
    pub(super) acceptance: Acceptance,
    pub(super) account: Account,
    /// Whether the next step is begun late for its sake, or with guesses of its.
    pub(super) wants: bool,
    /// Whether the step was that is read.
    pub(super) wanted: bool,
    /// Steps that the guesses can lose which the next step is fed, and those that the one was fed that is read.
    pub(super) risks: f64,
    risked: f64,
    /// How many guesses the step was fed that was read.
    pub(super) verified: usize,
    /// Tokens that were read in this turn.
    pub(super) gave: usize,
    pub(super) report: SpeculationReport,
    pub(super) intent: Intent,
}

/// What was decided before the turn's tokens were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Intent {
    #[default]
    Open,
    /// A guess would not pay.
    Declined,
    /// One is made to see whether it pays.
    Trial,
}

impl Guesses {
    /// `usual` is how often guesses were right for others.
    pub(super) fn new(off: Option<SpeculationOff>, usual: Usual) -> Self {
        let report = SpeculationReport {
            off,
            ..SpeculationReport::default()
        };
        Self {
            report,
            acceptance: Acceptance::new(usual),
            ..Self::default()
        }
    }

    /// Hears a token that was chosen, and says whether the step was fed the right one behind it, so that the next can be
    /// read too.
    pub(super) fn confirm(&mut self, token: u32) -> bool {
        let right = self.fed.get(self.right) == Some(&token);
        self.right += usize::from(right);
        right
    }

    /// Counts what came of the guesses, and says how many there were and how many were right.
    pub(super) fn settle(&mut self) -> Option<(usize, usize)> {
        let (drafted, accepted) = (self.fed.len(), self.right);
        self.fed.clear();
        self.right = 0;
        if drafted == 0 {
            return None;
        }
        self.acceptance.verified(drafted, accepted);
        self.verified = drafted;
        self.report.steps += 1;
        self.report.drafted_tokens += drafted as u32;
        self.report.accepted_tokens += accepted as u32;
        Some((drafted, accepted))
    }

    /// Has the answer account for the step that was read, which took `more` steps longer for its sake; not where that is
    /// not known.
    pub(super) fn account(&mut self, more: Option<f64>) {
        let gave = std::mem::take(&mut self.gave);
        // A token takes no more than a step: what is beyond is the machine's, which has other things to do.
        let most = std::mem::take(&mut self.verified).max(1) as f64;
        match more.filter(|_| self.wanted) {
            Some(more) => self.account.guessed(gave.max(1), more.min(most)),
            None => self.account.step(),
        }
        self.wanted = std::mem::take(&mut self.wants);
        self.risked = std::mem::take(&mut self.risks);
    }

    /// What there is to spare for guesses, before it is known how long the step took that is read.
    pub(super) fn spare(&self) -> Account {
        self.account.after(self.gave.saturating_sub(1), self.risked)
    }

    /// Decides anew. Says whether nothing is guessed in this turn, as guesses are paused or have lost what they may: then nothing
    /// is looked up or computed for them either.
    pub(super) fn rests(&mut self) -> bool {
        let rests = self.acceptance.rests() || self.account.is_empty();
        if rests {
            self.pause();
        } else {
            self.intent = Intent::Open;
        }
        rests
    }

    /// A guess would not pay. Says whether it is made all the same, to see whether that is still so.
    pub(super) fn decline(&mut self) -> bool {
        let trial = self.acceptance.decline();
        if trial {
            self.intent = Intent::Trial;
        } else {
            self.pause();
        }
        trial
    }

    pub(super) fn pause(&mut self) {
        self.report.paused_steps += 1;
        self.intent = Intent::Declined;
    }
}
