//! Guessing what answers go on with, where that pays.

use std::time::Duration;

use mlx_engine_core::SpeculationOff;
use mlx_engine_text::Tokenizer;

use super::Worker;
use super::active::Active;
use super::guesses::{Guesses, Intent};
use super::turn::{Failed, standing};
use crate::clock::Clock;
use crate::prefix::{Pair, fork_draft};
use crate::request::Request;
use crate::scheduler::Id;
use crate::speculation::{Asked, Base, Costs, Drafter, SpeculationConfig, Usual, look_up};
use crate::{EngineConfig, TokenModel};

/// What the worker guesses with.
#[derive(Debug)]
pub(super) struct Speculation<M> {
    config: SpeculationConfig,
    drafter: Option<Drafter<M>>,
    pub(super) costs: Costs,
    /// How often guesses were right so far.
    usual: Usual,
    /// Whether the last turn did nothing but decode, so that the next reads a step that began when it did.
    settled: bool,
    /// What the draft model took of the turn.
    drafting: Duration,
    /// What it took for guesses alone, in the steps that this turn begins and in those that it reads.
    guessing: (Duration, Duration),
}

/// What may be guessed for an answer.
enum Possible {
    /// Some tokens, which are known.
    Known(Vec<u32>),
    /// So many tokens, which the draft model has to say.
    Drafted(usize),
}

impl Possible {
    fn len(&self) -> usize {
        match self {
            Self::Known(tokens) => tokens.len(),
            Self::Drafted(count) => *count,
        }
    }
}

impl<M: TokenModel> Speculation<M> {
    pub(super) fn new(config: &EngineConfig, draft: Option<M>, tokenizer: &Tokenizer) -> Self {
        Self {
            config: config.speculation.clone(),
            drafter: draft.map(|model| Drafter::new(model, config.prefill_chunk, tokenizer)),
            costs: Costs::default(),
            usual: Usual::default(),
            settled: false,
            drafting: Duration::ZERO,
            guessing: (Duration::ZERO, Duration::ZERO),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        !self.config.is_off()
    }

    /// The draft model.
    pub(super) fn draft(&self) -> Option<&M> {
        self.drafter.as_ref().map(|drafter| &drafter.model)
    }

    #[cfg(test)]
    pub(super) fn draft_mut(&mut self) -> &mut M {
        &mut self.drafter.as_mut().expect("there is one").model
    }

    /// How often guesses were right for the requests so far.
    pub(super) fn usual(&self) -> Usual {
        self.usual
    }

    /// Of some guesses the first so many were right.
    pub(super) fn verified(&mut self, drafted: usize, accepted: usize) {
        self.usual.verified(drafted, accepted);
    }

    /// Has the draft model forget what it guessed wrong for an answer, as long as it is known where that begins: it may not be
    /// asked again for long.
    pub(super) fn forget(&mut self, active: &mut Active<M::Sequence>) {
        if let Some(drafter) = self.drafter.as_mut().filter(|_| active.guesses.verified > 0) {
            drafter.forget(&mut active.draft, active.tokens.len() - 1);
        }
    }

    /// The model and the one that guesses for it.
    pub(super) fn pair<'a>(&'a mut self, model: &'a mut M) -> Pair<'a, M> {
        let draft = self.drafter.as_mut().map(|drafter| &mut drafter.model);
        Pair { model, draft }
    }

    /// What the draft model has seen of the first `len` tokens of a request.
    pub(super) fn fork_draft(&mut self, draft: Option<&mut M::Sequence>, len: usize) -> Option<M::Sequence> {
        fork_draft(
            self.drafter.as_mut().map(|drafter| &mut drafter.model),
            draft,
            len,
        )
    }

    /// What the draft model has seen of a request, as far as the request has these tokens.
    pub(super) fn seen(&mut self, mut draft: Option<M::Sequence>, tokens: usize) -> Option<M::Sequence> {
        self.drafter.as_mut()?.forget(&mut draft, tokens);
        draft
    }

    /// What the draft model took of this turn.
    pub(super) fn drafting(&mut self) -> Duration {
        std::mem::take(&mut self.drafting)
    }

    /// The steps that a turn read were fed so many tokens of so many sequences and took so long; it did nothing else where it
    /// `decoded` alone. Of the sequences so many `wanted` guesses in them. Says how many steps longer each of these had them
    /// take; nothing where that is not known.
    fn took(
        &mut self,
        (rows, sequences, wanted): (usize, usize, usize),
        spent: Duration,
        decoded: bool,
    ) -> Option<f64> {
        let known = self.settled && decoded;
        self.settled = decoded;
        let guessing = std::mem::take(&mut self.guessing.0);
        let guessing = std::mem::replace(&mut self.guessing.1, guessing);
        // A step that waited for guesses which there were not is none without.
        if known && (wanted == 0 || rows > sequences) {
            self.costs.note(rows, spent.as_secs_f64());
        }
        let more = self.costs.more(sequences, (spent + guessing).as_secs_f64());
        known.then(|| more / wanted.max(1) as f64)
    }

    /// What may be guessed behind tokens, at most so many.
    fn possible(&self, tokens: &[u32], most: usize) -> Possible {
        match (&self.config, &self.drafter) {
            (SpeculationConfig::Lookup(config), _) if most > 0 => {
                Possible::Known(look_up(tokens, config, most))
            }
            (SpeculationConfig::Draft(_), Some(drafter)) => {
                Possible::Drafted(most.min(drafter.room(tokens.len())))
            }
            _ => Possible::Known(Vec::new()),
        }
    }

    /// How many steps so many guesses more can lose.
    fn risk(&self, guesses: usize, base: Base) -> f64 {
        let guess = self.drafter.as_ref().map_or(0.0, Drafter::seconds);
        base.risk(guesses, &self.costs, guess).unwrap_or_default()
    }

    /// How many of so many tokens are guessed: as many as are [worth](crate::speculation::Acceptance::worth) it and
    /// can be lost.
    fn count(&self, guesses: &mut Guesses, possible: usize, base: Base) -> usize {
        if self.config.always() {
            return possible;
        }
        let guess = self.drafter.as_ref().map_or(0.0, Drafter::seconds);
        let most = base.affordable(possible, &guesses.spare(), &self.costs, guess);
        match guesses.acceptance.worth(most, base, &self.costs, guess) {
            None => 0,
            Some(0) if most == 0 => {
                guesses.pause();
                0
            }
            Some(0) if guesses.intent == Intent::Trial || guesses.decline() => most,
            Some(worth) => worth,
        }
    }
}

impl<M: TokenModel, C: Clock> Worker<M, C> {
    /// Why nothing will be guessed for a request.
    pub(super) fn speculation_off(&self, request: &Request) -> Option<SpeculationOff> {
        if request.walk.is_some() {
            return Some(SpeculationOff::Constraint);
        }
        let takes_back = |model: &M| model.takes_back() > 0;
        let can = takes_back(&self.model) && self.speculation.draft().is_none_or(takes_back);
        (!can).then_some(SpeculationOff::Uncuttable)
    }

    /// Bytes that a request of so many tokens takes.
    pub(super) fn sequence_bytes(&self, tokens: usize) -> u64 {
        let draft = self.speculation.draft();
        let draft = draft.map_or(0, |draft| draft.sequence_bytes(tokens));
        self.model.sequence_bytes(tokens).saturating_add(draft)
    }

    /// Bytes that the sequences of the draft model take.
    pub(super) fn drafted_bytes(&self) -> u64 {
        let Some(draft) = self.speculation.draft() else {
            return 0;
        };
        let sequences = self.active.iter().filter_map(|active| active.draft.as_ref());
        sequences
            .map(|sequence| draft.sequence_bytes(draft.len(sequence)))
            .sum()
    }

    /// How many tokens the steps were fed that this turn reads.
    pub(super) fn rows(&self, due: &[Id]) -> usize {
        let due = self.active.iter().filter(|active| due.contains(&active.id));
        due.map(|active| active.rows).sum()
    }

    /// Notes how long the steps took that this turn read, which were fed so many tokens, and what guesses in them have gained
    /// and cost.
    pub(super) fn account(&mut self, due: &[Id], rows: usize, spent: Duration, decoded: bool) {
        let read = self.active.iter().filter(|active| due.contains(&active.id));
        let wanted = read.filter(|active| active.guesses.wanted).count();
        let more = self.speculation.took((rows, due.len(), wanted), spent, decoded);
        for active in self.active.iter_mut().filter(|active| due.contains(&active.id)) {
            active.guesses.account(more);
        }
    }

    /// Whether guesses are to be made in this turn, or verified: then its tokens have to be read before the next step is
    /// begun, and all of the batch are in that step together.
    pub(super) fn expects_guesses(&mut self, due: &[Id], failed: &Failed) -> bool {
        if !self.speculation.is_on() {
            return false;
        }
        let limit = self.context_length;
        let (model, speculation) = (&self.model, &self.speculation);
        let room = speculation.config.room(model.batch_limit());
        let base = Base::new(due.len());
        let mut expects = false;
        for active in standing(&mut self.active, due, failed) {
            if !active.guesses.fed.is_empty() {
                active.guesses.intent = Intent::Open;
                active.guesses.wants = true;
                expects = true;
                continue;
            }
            if speculation.config.always() {
                active.guesses.intent = Intent::Open;
            } else if active.guesses.rests() {
                continue;
            }
            let most = active.may_guess(limit, model.takes_back(), &speculation.config);
            // Of what is known one token is being chosen already.
            let possible = speculation.possible(&active.tokens, most.min(room));
            if possible.len() == 0 {
                continue;
            }
            active.guesses.wants = speculation.count(&mut active.guesses, possible.len(), base) > 0;
            expects |= active.guesses.wants;
        }
        expects
    }

    /// Guesses what every answer goes on with whose next step was not begun yet.
    pub(super) fn guess(&mut self, due: &[Id], failed: &Failed) {
        if !self.speculation.is_on() {
            return;
        }
        let limit = self.context_length;
        let Self {
            model,
            speculation,
            active,
            clock,
            ..
        } = self;
        let due: Vec<Id> = standing(active, due, failed)
            .filter(|active| active.waits())
            // Not behind tokens that needed no choice, which are fed in one step already.
            .filter(|active| model.len(&active.sequence) + 1 == active.tokens.len())
            .map(|active| active.id)
            .collect();
        let mut room = speculation.config.room(model.batch_limit());
        let mut base = Base::new(due.len());
        let mut drafted = Vec::new();
        for active in standing(active, &due, failed) {
            if active.guesses.intent == Intent::Declined {
                continue;
            }
            let most = active.may_guess(limit, model.takes_back(), &speculation.config);
            let possible = speculation.possible(&active.tokens, most.min(room));
            if possible.len() == 0 {
                continue;
            }
            let guesses = &mut active.guesses;
            let count = speculation.count(guesses, possible.len(), base);
            if count == 0 {
                continue;
            }
            guesses.wants = true;
            guesses.risks = speculation.risk(count, base);
            room -= count;
            base = base.with(count, guesses.acceptance.expected(count));
            match possible {
                Possible::Known(mut tokens) => {
                    tokens.truncate(count);
                    guesses.fed = tokens;
                }
                Possible::Drafted(_) => drafted.push((active, count)),
            }
        }
        speculation.draft_for(drafted, clock);
    }
}

impl<M: TokenModel> Speculation<M> {
    /// Has the draft model say so many tokens for each.
    fn draft_for(&mut self, mut drafted: Vec<(&mut Active<M::Sequence>, usize)>, clock: &impl Clock) {
        let Some(drafter) = self.drafter.as_mut().filter(|_| !drafted.is_empty()) else {
            return;
        };
        let began = clock.now();
        let asked = drafted.iter_mut().map(|(active, count)| Asked {
            sequence: &mut active.draft,
            tokens: &active.tokens,
            prompt_len: active.prompt_len,
            params: &active.request.params,
            number: active.answer.generated().into(),
            count: *count,
        });
        let asked = asked.collect();
        let (guessed, had_prompts) = drafter.guess(asked, clock);
        for ((active, _), guess) in drafted.into_iter().zip(guessed) {
            match guess {
                Ok(guess) => active.guesses.fed = guess,
                Err(error) => {
                    tracing::warn!(%error, "the draft model failed, and the answer goes on without");
                    active.guesses.report.off = Some(SpeculationOff::DraftFailed);
                    active.draft = None;
                }
            }
        }
        let spent = clock.now().saturating_duration_since(began);
        self.drafting += spent;
        if had_prompts {
            self.guessing.0 += spent;
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
        let reach = self.guesses.acceptance.reach();
        let most = if config.always() { most } else { most.min(reach) };
        if self.answer.may_force(&self.request.params, most + 1) {
            0
        } else {
            most
        }
    }
}
