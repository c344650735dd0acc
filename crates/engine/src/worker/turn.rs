//! A turn: a chunk of a prompt, a token of every answer, and what ends with it.

use std::sync::Arc;

use mlx_engine_core::{EngineError, FinishReason, GenerateSummary, GenerationEvent};

use super::active::{Active, forced, read};
use super::{TURNS_BETWEEN_CHUNKS, Worker, guarded};
use crate::clock::Clock;
use crate::scheduler::Id;
use crate::{Feed, TokenModel};

/// Requests that an error of this turn ends.
pub(super) type Failed = Vec<(Id, EngineError)>;

impl<M: TokenModel, C: Clock> Worker<M, C> {
    /// Takes a chunk of a prompt, and every answer a token further.
    pub(crate) fn turn(&mut self) {
        self.sweep();
        self.admit();
        let began = self.clock.now();
        let mut turn = self.scheduler.turn();
        self.gauges.begin(began, turn.decode.len());
        let mut failed = Failed::new();
        if let Some(chunk) = turn.chunk {
            let fed = self.begin(chunk).and_then(|chunk| {
                turn.chunk = Some(chunk);
                self.prefill(chunk)?;
                self.scheduler.fed(chunk);
                Ok(())
            });
            if let Err(error) = fed {
                failed.push((chunk.id, error));
            }
        }
        let decoded = turn.chunk.is_none() && self.scoring.is_empty();
        self.scoring.step(&mut self.model);
        let due = &turn.decode;
        let rows = self.rows(due);
        let context_length = self.context_length;
        if !self.expects_guesses(due, &failed) {
            self.feed(due, &mut failed, |model, active| {
                let more = active.wants_more(context_length);
                let free =
                    active.request.walk.is_none() && !active.answer.may_force(&active.request.params, 1);
                (more && free && model.can_look_ahead(&active.sequence)).then_some(None)
            });
        }
        self.prepare(due, &mut failed);
        let read = self.read(due, &mut failed) + self.force(due, &mut failed);
        self.guess(due, &failed);
        self.feed(due, &mut failed, |_, active| {
            let stands = active.finished.is_none() && !active.ahead;
            stands.then(|| active.tokens.last().copied())
        });
        for active in &mut self.active {
            active.ahead = false;
        }
        if turn.chunk.is_some() || !turn.decode.is_empty() {
            let spent = self.clock.now().saturating_duration_since(began);
            self.scheduler.turned(&turn, spent);
            self.speculation.turned(rows, spent, decoded);
        }
        if turn.chunk.is_some() {
            self.measure();
        }
        self.gauges.end(read);
        self.take_out(failed);
        self.make_room();
        self.note();
        self.turns += 1;
        if self.turns >= TURNS_BETWEEN_CHUNKS {
            self.turns = 0;
            self.save(false);
        }
    }

    /// Feeds a token to every answer that is due and for which `token` gives one, `Some(None)` being the one that is not
    /// read yet, as many at once as the model takes.
    fn feed(
        &mut self,
        due: &[Id],
        failed: &mut Failed,
        token: impl Fn(&M, &Active<M::Sequence>) -> Option<Option<u32>>,
    ) {
        let began = self.clock.now();
        let Self { model, active, .. } = self;
        let mut fed = Vec::new();
        for active in standing(active, due, failed) {
            if let Some(token) = token(model, active) {
                fed.push((active, token));
            }
        }
        let mut ended = Failed::new();
        for some in fed.chunks_mut(model.batch_limit().max(1)) {
            let mut batch: Vec<Feed<'_, M::Sequence>> = some
                .iter_mut()
                .map(|(active, token)| {
                    let read = u32::from(token.is_none());
                    Feed {
                        number: (active.answer.generated() + read).into(),
                        sequence: &mut active.sequence,
                        params: &active.request.params,
                        token: *token,
                        guesses: &active.guesses.fed,
                    }
                })
                .collect();
            match guarded(|| model.feed(&mut batch)) {
                Ok(()) => some.iter_mut().for_each(|(active, _)| active.ahead = true),
                // The step was theirs together.
                Err(error) => ended.extend(some.iter().map(|(active, _)| (active.id, error.clone()))),
            }
        }
        failed.append(&mut ended);
        self.speculation
            .fed(self.clock.now().saturating_duration_since(began));
    }

    /// Finds out what may come, of every answer that is due and held to a grammar: while the device computes.
    fn prepare(&mut self, due: &[Id], failed: &mut Failed) {
        let mut ended = Failed::new();
        for active in standing(&mut self.active, due, failed) {
            if let Some(walk) = &mut active.request.walk
                && let Err(error) = guarded(|| walk.prepare())
            {
                ended.push((active.id, error));
            }
        }
        failed.append(&mut ended);
    }

    /// Takes the tokens that need no choice behind those that were read, feeds them in one step, and says how many they were.
    fn force(&mut self, due: &[Id], failed: &mut Failed) -> usize {
        self.generate(due, failed, |model, active, context_length, clock| {
            if active.finished.is_some() || active.ahead {
                return Ok(0);
            }
            let forced = forced(active, context_length, clock)?;
            if forced > 0 && active.finished.is_none() {
                let fed = model.len(&active.sequence);
                let (params, number) = (&active.request.params, active.answer.generated().into());
                model.begin(&mut active.sequence, &active.tokens[fed..], params, number)?;
                active.ahead = true;
            }
            Ok(forced)
        })
    }

    /// Reads a token of every answer that is due, and those behind it that were guessed and the one behind them, and says how
    /// many they were.
    fn read(&mut self, due: &[Id], failed: &mut Failed) -> usize {
        let gauges = Arc::clone(&self.gauges);
        self.generate(due, failed, |model, active, context_length, clock| {
            let mut count = 0;
            loop {
                active.finished = read(model, active, context_length, clock)?;
                count += 1;
                let last = active.tokens.last().copied();
                let right = last.is_some_and(|token| active.guesses.confirm(token));
                if active.finished.is_some() || !right {
                    break;
                }
            }
            if let Some((drafted, accepted)) = active.guesses.settle() {
                gauges.verified(drafted as u64, accepted as u64);
                // The last token is not fed yet; wrong guesses were.
                let fed = active.tokens.len() - 1;
                if active.finished.is_none() && !model.truncate(&mut active.sequence, fed) {
                    return Err(EngineError::internal("a wrong guess could not be taken back"));
                }
            }
            Ok(count)
        })
    }

    /// Lets every answer that is due get some tokens, and says how many they were. What fails ends its own request.
    fn generate(
        &mut self,
        due: &[Id],
        failed: &mut Failed,
        mut tokens_of: impl FnMut(&mut M, &mut Active<M::Sequence>, usize, &C) -> Result<usize, EngineError>,
    ) -> usize {
        let Self {
            model,
            active,
            scheduler,
            clock,
            context_length,
            ..
        } = self;
        let (mut sum, mut ended) = (0, Failed::new());
        for active in standing(active, due, failed) {
            match guarded(|| tokens_of(model, active, *context_length, clock)) {
                Ok(tokens) => {
                    (0..tokens).for_each(|_| scheduler.generated(active.id));
                    sum += tokens;
                }
                Err(error) => ended.push((active.id, error)),
            }
        }
        failed.append(&mut ended);
        sum
    }

    /// Takes out requests that have failed or finished.
    fn take_out(&mut self, mut failed: Failed) {
        let mut index = 0;
        while index < self.active.len() {
            let id = self.active[index].id;
            let error = failed
                .iter()
                .position(|(other, _)| *other == id)
                .map(|at| failed.swap_remove(at).1);
            let finished = self.active[index].finished;
            if error.is_none() && finished.is_none() {
                index += 1;
                continue;
            }
            // In order, so that who came first stays first.
            let active = self.active.remove(index);
            if let Some(error) = error {
                // Its memory goes with it: what it holds may be half written.
                tracing::warn!(error = %error, model = %self.identity.model, "request failed");
                if matches!(error, EngineError::OutOfMemory) {
                    self.prefixes.clear();
                }
                self.scheduler.cancel(id);
                // What is written down is true when the caller hears of the end.
                self.note();
                let _ = active.request.events.send(Err(error));
            } else if let Some(reason) = finished {
                self.scheduler.finish(id);
                self.note();
                self.finish(active, reason);
            }
        }
    }

    fn finish(&mut self, active: Active<M::Sequence>, finish_reason: FinishReason) {
        let usage = active
            .answer
            .usage(active.prompt_len, active.cached.unwrap_or_default());
        let summary = GenerateSummary {
            model: self.identity.model.to_string(),
            backend: self.identity.backend,
            device: self.identity.device,
            finish_reason,
            usage,
            timings: active.answer.timings(self.identity.load_s, active.started, usage),
            peak_memory_bytes: self.model.peak_memory_bytes(),
            speculation: self.speculation.is_on().then_some(active.guesses.report),
        };
        let _ = active.request.events.send(Ok(GenerationEvent::Finished(summary)));
        self.retire(active);
    }

    /// Keeps what a request has computed.
    pub(super) fn retire(&mut self, active: Active<M::Sequence>) {
        let Active {
            mut sequence,
            mut tokens,
            shared,
            ..
        } = active;
        // A step that looked ahead was fed a token that the answer does not have.
        tokens.truncate(self.model.len(&sequence));
        if self.model.truncate(&mut sequence, tokens.len()) {
            self.prefixes.keep(&self.model, &tokens, sequence, shared);
            if let Some(disk) = &mut self.disk {
                disk.note(&tokens);
            }
        }
    }
}

/// Those of the requests that are due and have not failed.
pub(super) fn standing<'a, S>(
    active: &'a mut [Active<S>],
    due: &'a [Id],
    failed: &'a Failed,
) -> impl Iterator<Item = &'a mut Active<S>> {
    active
        .iter_mut()
        .filter(|active| due.contains(&active.id) && failed.iter().all(|(id, _)| *id != active.id))
}
