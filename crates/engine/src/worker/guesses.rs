//! What is guessed for a request that runs, and what came of it.

use mlx_engine_core::{SpeculationOff, SpeculationReport};

use crate::speculation::{Acceptance, Usual};

/// What is guessed for a request that runs, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Guesses {
    /// Guesses that the step that is not read yet was fed behind its token.
    pub(super) fed: Vec<u32>,
    /// How many of them have turned out right.
    right: usize,
    pub(super) acceptance: Acceptance,
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
        self.report.steps += 1;
        self.report.drafted_tokens += drafted as u32;
        self.report.accepted_tokens += accepted as u32;
        Some((drafted, accepted))
    }

    /// Decides anew. Says whether nothing is guessed in this turn, as guesses are paused: then nothing is looked up or computed
    /// for them either.
    pub(super) fn rests(&mut self) -> bool {
        let rests = self.acceptance.rests();
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

    fn pause(&mut self) {
        self.report.paused_steps += 1;
        self.intent = Intent::Declined;
    }
}
