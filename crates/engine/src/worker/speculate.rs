//! Guessing what answers go on with, where that pays.

use std::time::Duration;

use mlx_engine_core::SpeculationOff;

use super::Worker;
use super::active::Active;
use super::guesses::Intent;
use super::turn::{Failed, standing};
use crate::TokenModel;
use crate::clock::Clock;
use crate::request::Request;
use crate::scheduler::Id;
use crate::speculation::{Costs, SpeculationConfig, look_up};

/// What the worker guesses with.
#[derive(Debug)]
pub(super) struct Speculation {
    config: SpeculationConfig,
    pub(super) costs: Costs,
    /// Whether the last turn did nothing but decode, so that the next reads a step that began when it did.
    settled: bool,
}

impl Speculation {
    pub(super) fn new(config: &SpeculationConfig) -> Self {
        Self {
            config: config.clone(),
            costs: Costs::default(),
            settled: false,
        }
    }

    pub(super) fn is_off(&self) -> bool {
        self.config.is_off()
    }

    /// A turn took so long that read steps of so many tokens, and did nothing else where it `decoded` alone.
    pub(super) fn turned(&mut self, rows: usize, spent: Duration, decoded: bool) {
        if self.settled && decoded {
            self.costs.note(rows, spent.as_secs_f64());
        }
        self.settled = decoded;
    }

    /// At most so many tokens that may follow.
    fn guess(&self, tokens: &[u32], most: usize) -> Vec<u32> {
        match &self.config {
            SpeculationConfig::Lookup(config) if most > 0 => look_up(tokens, config, most),
            _ => Vec::new(),
        }
    }
}

impl<M: TokenModel, C: Clock> Worker<M, C> {
    /// Why nothing will be guessed for a request.
    pub(super) fn speculation_off(&self, request: &Request) -> Option<SpeculationOff> {
        if request.walk.is_some() {
            return Some(SpeculationOff::Constraint);
        }
        (self.model.takes_back() == 0).then_some(SpeculationOff::Uncuttable)
    }

    /// How many tokens the steps were fed that this turn reads.
    pub(super) fn rows(&self, due: &[Id]) -> usize {
        let due = self.active.iter().filter(|active| due.contains(&active.id));
        due.map(|active| 1 + active.guesses.fed.len()).sum()
    }

    /// Whether guesses are to be made in this turn, or verified: then its tokens have to be read before the next step is
    /// begun, and all of the batch are in that step together.
    pub(super) fn expects_guesses(&mut self, due: &[Id], failed: &Failed) -> bool {
        if self.speculation.is_off() {
            return false;
        }
        let limit = self.context_length;
        let (model, speculation) = (&self.model, &self.speculation);
        let room = speculation.config.room(model.batch_limit());
        let base = (due.len(), due.len() as f64);
        let mut expects = false;
        for active in standing(&mut self.active, due, failed) {
            active.guesses.intent = Intent::Open;
            if !active.guesses.fed.is_empty() {
                expects = true;
                continue;
            }
            // The token that is not read yet is the first guess, and is not fed.
            let most = active
                .may_guess(limit, model.takes_back(), &speculation.config)
                .min(room);
            let guess = speculation.guess(&active.tokens, most);
            if guess.is_empty() {
                continue;
            }
            match active
                .guesses
                .acceptance
                .worth(guess.len(), base, &speculation.costs, 0.0)
            {
                Some(0) => expects |= active.guesses.decline(),
                Some(_) => expects = true,
                None => {}
            }
        }
        expects
    }

    /// Guesses what every answer goes on with whose next step was not begun yet.
    pub(super) fn guess(&mut self, due: &[Id], failed: &Failed) {
        if self.speculation.is_off() {
            return;
        }
        let limit = self.context_length;
        let (model, speculation) = (&self.model, &self.speculation);
        let due: Vec<Id> = standing(&mut self.active, due, failed)
            .filter(|active| active.finished.is_none() && !active.ahead)
            .map(|active| active.id)
            .collect();
        let mut room = speculation.config.room(model.batch_limit());
        let mut base = (due.len(), due.len() as f64);
        for active in standing(&mut self.active, &due, failed) {
            let most = active
                .may_guess(limit, model.takes_back(), &speculation.config)
                .min(room);
            let mut guess = speculation.guess(&active.tokens, most);
            if guess.is_empty() || active.guesses.intent == Intent::Declined {
                continue;
            }
            let guesses = &mut active.guesses;
            match guesses
                .acceptance
                .worth(guess.len(), base, &speculation.costs, 0.0)
            {
                Some(0) if guesses.intent == Intent::Trial || guesses.decline() => {}
                Some(0) | None => continue,
                Some(worth) => {
                    guesses.acceptance.pays();
                    guess.truncate(worth);
                }
            }
            room -= guess.len();
            base = (
                base.0 + guess.len(),
                base.1 + guesses.acceptance.expected(guess.len()),
            );
            guesses.fed = guess;
        }
    }
}

impl<S> Active<S> {
    /// How many tokens may be guessed: no more than the answer can have, and none behind a token that may have others forced
    /// upon it.
    fn may_guess(&self, context_length: usize, takes_back: usize, config: &SpeculationConfig) -> usize {
        if self.guesses.report.off.is_some() {
            return 0;
        }
        let answer = self
            .request
            .params
            .max_tokens
            .saturating_sub(self.answer.generated() + 1) as usize;
        let room = context_length.saturating_sub(self.tokens.len() + 1);
        let most = config.max_tokens().min(answer).min(room).min(takes_back);
        if self.answer.may_force(&self.request.params, most + 1) {
            0
        } else {
            most
        }
    }
}
