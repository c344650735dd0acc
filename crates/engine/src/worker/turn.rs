//! A turn: chunks of prompts, a token of every answer, and what ends with it.

use std::sync::Arc;

use mlx_engine_core::{EngineError, FinishReason, GenerateSummary, GenerationEvent};

use super::active::{Active, Row, Unread, forced, read};
use super::redo::alone;
use super::{TURNS_BETWEEN_CHUNKS, Worker, guarded};
use crate::clock::Clock;
use crate::prefix::{Forking, Known, Pair, PrefixCache};
use crate::scheduler::{Chunk, Id, Scheduler, Turn};
use crate::{FeedError, TokenModel};

/// Requests that an error of this turn ends.
pub(super) type Failed = Vec<(Id, EngineError)>;

impl<M: TokenModel, C: Clock> Worker<M, C> {
    /// Takes prompts a chunk and every answer a token further.
    pub(crate) fn turn(&mut self) {
        let began = self.clock.now();
        self.gauges.begin(began);
        self.sweep();
        self.admit();
        let mut failed = Failed::new();
        self.look_up(&mut failed);
        let turn = self.scheduler.turn();
        self.gauges.batch(turn.decode.len());
        let span = (turn != Turn::default()).then(|| {
            let fed: usize = turn.chunks.iter().map(|chunk| chunk.to - chunk.from).sum();
            let scored: usize = turn.scored.iter().map(|chunk| chunk.to - chunk.from).sum();
            tracing::debug_span!(
                "gen_ai.step",
                "gen_ai.provider.name" = "mlx_engine",
                "gen_ai.request.model" = &*self.identity.model,
                // An unsigned number would be sent as a text.
                "mlx_engine.step.answers" = turn.decode.len() as i64,
                "mlx_engine.step.prompt_tokens" = fed as i64,
                "mlx_engine.step.scored_tokens" = scored as i64,
                "gen_ai.usage.output_tokens" = tracing::field::Empty,
            )
        });
        let entered = span.as_ref().map(tracing::Span::enter);
        let decoded = turn.chunks.is_empty() && turn.scored.is_empty();
        let scoring = self.clock.now();
        for &chunk in &turn.scored {
            self.score(chunk);
        }
        let scoring = self.clock.now().saturating_duration_since(scoring);
        let due = &turn.decode;
        let rows = self.rows(due);
        let mut chunks = turn.chunks.clone();
        if !self.expects_guesses(due, &failed) {
            let context_length = self.context_length;
            let ahead = |model: &M, active: &Active<M::Sequence>| {
                let more = active.wants_more(context_length);
                let free =
                    active.request.walk.is_none() && !active.answer.may_force(&active.request.params, 1);
                (more && free && model.can_look_ahead(&active.sequence)).then(|| Row::unread(active))
            };
            if standing(&mut self.active, due, &failed).any(|active| ahead(&self.model, active).is_some()) {
                // Prompts go with those that are fed first: the device computes while tokens are read.
                self.feed(&mut chunks, due, &mut failed, ahead);
            }
        }
        self.prepare(due, &mut failed);
        let read = self.read(due, &mut failed) + self.force(due, &mut failed);
        self.guess(due, &failed);
        self.feed(&mut chunks, due, &mut failed, |model, active| {
            active
                .waits()
                .then(|| Row::read(active, model.len(&active.sequence)))
        });
        self.redo(due, &mut failed);
        for active in &mut self.active {
            active.ahead = false;
            active.together.read = active.together.begun;
        }
        drop(entered);
        if let Some(span) = span {
            span.record("gen_ai.usage.output_tokens", read as i64);
        }
        if !turn.chunks.is_empty() || !turn.decode.is_empty() {
            let spent = self.clock.now().saturating_duration_since(began);
            let other = self.speculation.drafting() + scoring;
            let read = self.stopwatch.turned(spent, other);
            self.scheduler.took(read);
            self.account(due, rows, read.spent, decoded);
        }
        self.measure(!turn.chunks.is_empty());
        self.gauges.end(read);
        self.take_out(failed);
        self.make_room();
        self.note();
        self.turns += 1;
        if self.turns >= TURNS_BETWEEN_CHUNKS {
            self.turns = 0;
            self.save();
        }
    }

    /// Feeds chunks, and every answer that is due and for which `row` says what, as many in one step as the model takes.
    fn feed(
        &mut self,
        chunks: &mut Vec<Chunk>,
        due: &[Id],
        failed: &mut Failed,
        row: impl Fn(&M, &Active<M::Sequence>) -> Option<Row>,
    ) {
        let began = self.clock.now();
        let chunks = std::mem::take(chunks);
        let Self {
            model,
            active,
            scheduler,
            prefixes,
            gauges,
            speculation,
            stopwatch,
            clock,
            ..
        } = self;
        let mut left = Vec::new();
        for active in active.iter_mut().filter(|active| stands(active, failed)) {
            let chunk = chunks.iter().find(|chunk| chunk.id == active.id);
            let row = match chunk {
                Some(&chunk) => Some(Row::chunk(active, chunk)),
                None if due.contains(&active.id) => row(model, active),
                None => None,
            };
            left.extend(row.map(|row| (active, row)));
        }
        while !left.is_empty() {
            let count = left.len().min(model.batch_limit().max(1));
            let mut batch: Vec<_> = left[..count]
                .iter_mut()
                .map(|(active, row)| row.feed(active))
                .collect();
            match guarded(|| Ok(model.feed(&mut batch))).unwrap_or_else(|error| Err(error.into())) {
                Ok(()) => {
                    for (active, row) in left.drain(..count) {
                        stopwatch.begun(row.prompt_tokens(), usize::from(row.chunk.is_none()));
                        let pair = &mut speculation.pair(model);
                        if let Err(error) = fed(pair, scheduler, prefixes, active, &row, count > 1) {
                            failed.push((active.id, error));
                        }
                    }
                }
                Err(FeedError {
                    error,
                    culprit: Some(culprit),
                }) if culprit < count => {
                    let (active, _) = left.remove(culprit);
                    failed.push((active.id, error));
                }
                Err(FeedError { error, .. }) if count == 1 => {
                    let ended = left.drain(..1);
                    failed.extend(ended.map(|(active, _)| (active.id, error.clone())));
                }
                // Whose fault it was is not known: each is fed alone.
                Err(FeedError { error, .. }) => {
                    tracing::warn!(%error, "a step of several requests failed, and each is taken further alone");
                    if matches!(error, EngineError::OutOfMemory) {
                        // What is only kept makes room.
                        prefixes.clear();
                    }
                    for (active, row) in left.drain(..count) {
                        if row.is_unread() {
                            // Once its token is read.
                            active.redo = Some(error.clone());
                            continue;
                        }
                        gauges.redone();
                        let done = guarded(|| alone(model, active, &row)).and_then(|()| {
                            let pair = &mut speculation.pair(model);
                            fed(pair, scheduler, prefixes, active, &row, false)
                        });
                        if let Err(error) = done {
                            failed.push((active.id, error));
                        }
                    }
                }
            }
        }
        stopwatch.fed(clock.now().saturating_duration_since(began));
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

    /// Takes the tokens that need no choice behind those that were read, and says how many they were. They are fed in the step
    /// of all.
    fn force(&mut self, due: &[Id], failed: &mut Failed) -> usize {
        self.generate(due, failed, |_, active, context_length, clock| {
            if !active.waits() {
                return Ok(0);
            }
            forced(active, context_length, clock)
        })
    }

    /// Reads a token of every answer that is due, and those behind it that were guessed and the one behind them, and says how
    /// many they were.
    fn read(&mut self, due: &[Id], failed: &mut Failed) -> usize {
        let gauges = Arc::clone(&self.gauges);
        let mut verified = Vec::new();
        let tokens = self.generate(due, failed, |model, active, context_length, clock| {
            let mut count = 0;
            loop {
                match read(model, active, context_length, clock) {
                    Ok(finished) => active.finished = finished,
                    Err(Unread::Step(error)) if active.together.read => {
                        // What was begun ahead went on from it.
                        (active.ahead, active.redo) = (false, Some(error));
                        active.guesses.settle();
                        return Ok(count);
                    }
                    Err(Unread::Step(error) | Unread::Request(error)) => return Err(error),
                }
                count += 1;
                active.guesses.gave += 1;
                let last = active.tokens.last().copied();
                let right = last.is_some_and(|token| active.guesses.confirm(token));
                if active.finished.is_some() || !right {
                    break;
                }
            }
            if let Some((drafted, accepted)) = active.guesses.settle() {
                gauges.verified(drafted as u64, accepted as u64);
                verified.push((drafted, accepted));
                // The last token is not fed yet; wrong guesses were.
                let fed = active.tokens.len() - 1;
                if active.finished.is_none() && !model.truncate(&mut active.sequence, fed) {
                    return Err(EngineError::internal("a wrong guess could not be taken back"));
                }
            }
            Ok(count)
        });
        for (drafted, accepted) in verified {
            self.speculation.verified(drafted, accepted);
        }
        for active in standing(&mut self.active, due, failed) {
            self.speculation.forget(active);
        }
        tokens
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
            draft,
            ..
        } = active;
        // The last token is none that it was fed, and what comes behind are guesses.
        let draft = self.speculation.seen(draft, tokens.len() - 1);
        // A step that looked ahead was fed a token that the answer does not have.
        tokens.truncate(self.model.len(&sequence));
        if self.model.truncate(&mut sequence, tokens.len()) {
            let draft = self.speculation.seen(draft, tokens.len());
            let pair = self.speculation.pair(&mut self.model);
            self.prefixes
                .keep(&pair, &tokens, Known { sequence, draft }, shared);
            if let Some(disk) = &mut self.disk {
                disk.note(&tokens);
            }
        }
    }
}

/// Notes that a request was fed, in a step with others or alone.
fn fed<M: TokenModel>(
    pair: &mut Pair<'_, M>,
    scheduler: &mut Scheduler,
    prefixes: &mut PrefixCache<Known<M::Sequence>>,
    active: &mut Active<M::Sequence>,
    row: &Row,
    together: bool,
) -> Result<(), EngineError> {
    active.rows = row.len();
    active.together.begun = together;
    let Some(chunk) = row.chunk else {
        active.ahead = true;
        return Ok(());
    };
    // What it took over may have failed to be computed.
    active.together.begun |= active.cached.is_some_and(|cached| cached > 0);
    scheduler.fed(chunk);
    guarded(|| keep(pair, prefixes, active, chunk))
}

/// Keeps the state of a prompt after a chunk, where it cannot be had from a longer one.
fn keep<M: TokenModel>(
    pair: &mut Pair<'_, M>,
    prefixes: &mut PrefixCache<Known<M::Sequence>>,
    active: &mut Active<M::Sequence>,
    chunk: Chunk,
) -> Result<(), EngineError> {
    let kept = active.checkpoints.contains(&chunk.to) || chunk.last && !pair.forks_anywhere();
    if kept && let Some(sequence) = pair.model.fork(&mut active.sequence, chunk.to)? {
        let known = Known {
            sequence,
            draft: None,
        };
        prefixes.keep(pair, &active.tokens[..chunk.to], known, active.shared);
    }
    Ok(())
}

/// Whether a request has not failed.
fn stands<S>(active: &Active<S>, failed: &Failed) -> bool {
    failed.iter().all(|(id, _)| *id != active.id)
}

/// Those of the requests that are due and have not failed.
pub(super) fn standing<'a, S>(
    active: &'a mut [Active<S>],
    due: &'a [Id],
    failed: &'a Failed,
) -> impl Iterator<Item = &'a mut Active<S>> {
    active
        .iter_mut()
        .filter(|active| due.contains(&active.id) && stands(active, failed))
}
