//! Prompts: what is known of them already, their chunks, and what is kept of them.

use std::time::Duration;

use mlx_engine_core::{EngineError, GenerationEvent};

use super::active::Reading;
use super::turn::Failed;
use super::{PrefixCommand, Worker, guarded};
use crate::TokenModel;
use crate::clock::Clock;
use crate::disk::Fetch;
use crate::prefix::{Forking, Known};
use crate::scheduler::Id;

/// Tokens that one request computes and another would compute too, for which it is worth a turn to wait. Those of a usual
/// system prompt and a template are fewer, and requests that share no more are fed in one step.
const WORTH_WAITING: usize = 64;

/// How long the worker waits for the disk before it looks after callers.
pub(super) const MOMENT: Duration = Duration::from_millis(5);

/// What came of handing something over to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saved {
    /// Some was, or given up: there may be more.
    Some,
    /// There is nothing to be written.
    Nothing,
    /// The disk has enough to do.
    Later,
}

impl<M: TokenModel, C: Clock> Worker<M, C> {
    pub(super) fn manage(&mut self, command: PrefixCommand) {
        let Self {
            model,
            prefixes,
            speculation,
            ..
        } = self;
        let mut pair = speculation.pair(model);
        match command {
            PrefixCommand::Report(reply) => drop(reply.send(prefixes.report())),
            PrefixCommand::Clear(reply) => drop(reply.send(prefixes.clear())),
            PrefixCommand::Pin { tokens, pinned } => {
                let result = guarded(|| prefixes.pin(&mut pair, &tokens)).map(|known| {
                    let lack = || EngineError::InsufficientMemory {
                        required: pair.sequence_bytes(tokens.len()),
                        available: prefixes.max_bytes().saturating_sub(prefixes.pinned_bytes()),
                    };
                    (!known).then(lack)
                });
                drop(pinned.send(result));
            }
            PrefixCommand::Unpin { tokens, unpinned } => drop(unpinned.send(prefixes.unpin(&tokens))),
        }
        self.scheduler.set_taken(self.prefixes.pinned_bytes());
        self.make_room();
    }

    /// Hands a chunk of what was computed over to be written.
    pub(super) fn save(&mut self) -> Saved {
        let Self {
            model,
            prefixes,
            disk: Some(disk),
            ..
        } = self
        else {
            return Saved::Nothing;
        };
        let Some(piece) = disk.piece() else {
            return Saved::Nothing;
        };
        if !disk.has_room() {
            return Saved::Later;
        }
        let Some(Known { sequence, .. }) = prefixes.with(&piece.tokens) else {
            // It had to make room.
            disk.give_up();
            return Saved::Some;
        };
        match guarded(|| model.export(sequence, piece.range.clone())) {
            Ok(block) if disk.write(&piece, &block) => Saved::Some,
            Ok(_) => Saved::Later,
            Err(error) => {
                tracing::warn!(%error, "what was computed could not be written");
                disk.give_up();
                Saved::Some
            }
        }
    }

    /// Looks up what is known of the prompts that are fed next. What one of them shares with another that is fed before it is
    /// not computed twice: it waits for that. It waits for the disk too, while the others go on.
    pub(super) fn look_up(&mut self, failed: &mut Failed) {
        self.hear_of_disk();
        while let Some(id) = self.scheduler.unknown() {
            let Some(at) = self.active.iter().position(|active| active.id == id) else {
                self.scheduler.cancel(id);
                continue;
            };
            if let Some((other, tokens)) = self.computed_before(at) {
                self.scheduler.wait_behind(id, other, tokens);
            } else if let Err(error) = self.begin(at) {
                self.scheduler.cancel(id);
                failed.push((id, error));
            }
        }
    }

    /// Lets those go on for whom all was read from disk, or as much as is in time.
    fn hear_of_disk(&mut self) {
        let now = self.clock.now();
        for active in &mut self.active {
            if let Some(reading) = &mut active.reading
                && (reading.fetch.is_over() || now.saturating_duration_since(reading.since) >= reading.limit)
            {
                self.scheduler.has_read(active.id);
            }
        }
    }

    /// A request whose prompt is fed before this one's, and how many tokens of it save this one some.
    fn computed_before(&self, at: usize) -> Option<(Id, usize)> {
        let own = &self.active[at];
        if own.reading.is_some() {
            return None;
        }
        // The last token is fed in any case: the logits after it are wanted.
        let prompt = &own.tokens[..own.prompt_len - 1];
        let before = self.scheduler.fed_before(own.id);
        let (in_memory, on_disk) = self.known_lengths(prompt);
        let shared = before.into_iter().filter_map(|(id, fed)| {
            let other = self.active.iter().find(|active| active.id == id)?;
            let alike = alike(&other.tokens[..other.prompt_len], prompt);
            let useful = if self.model.forks_anywhere() {
                alike
            } else {
                let kept = other.checkpoints.iter().copied();
                kept.take_while(|&length| length <= alike).last()?
            };
            let worth = if other.reading.is_some() {
                // Nobody reads again what it reads.
                useful >= in_memory + WORTH_WAITING && useful + WORTH_WAITING > on_disk
            } else {
                useful >= in_memory.max(on_disk) + WORTH_WAITING
            };
            (useful > fed && worth).then_some((id, useful))
        });
        shared.max_by_key(|(_, tokens)| *tokens)
    }

    /// How many tokens of a prompt are known in memory, and how many the disk has.
    fn known_lengths(&self, prompt: &[u32]) -> (usize, usize) {
        let begun = self.active.iter().filter(|active| active.cached.is_some());
        let running = begun.map(|active| alike(&active.tokens, prompt).min(self.model.len(&active.sequence)));
        let on_disk = self.disk.as_ref().map_or(0, |disk| disk.known(prompt));
        let in_memory = running.max().unwrap_or(0).max(self.prefixes.known(prompt));
        (in_memory, on_disk)
    }

    /// Takes over what is known of a prompt, once that is read.
    fn begin(&mut self, at: usize) -> Result<(), EngineError> {
        let active = &mut self.active[at];
        let (id, reading) = (active.id, active.reading.take());
        let prompt = &active.tokens[..active.prompt_len - 1].to_vec();
        let (known, draft, cached) = match guarded(|| self.known(prompt))? {
            Some((Known { sequence, draft }, len)) => (Some(sequence), draft, len),
            None => (None, None, 0),
        };
        let read = match reading {
            Some(Reading { fetch, .. }) => self.import(fetch, prompt, cached),
            None => match self.fetch(prompt, cached) {
                None => None,
                reading => {
                    self.active[at].reading = reading;
                    self.scheduler.wait_for_disk(id);
                    return Ok(());
                }
            },
        };
        let (known, cached, shared) = match read {
            Some((sequence, len)) => (Some(sequence), len, 0),
            None => (known, cached, cached),
        };
        self.prefixes.count(cached);
        let now = self.clock.now();
        let active = &mut self.active[at];
        if let Some(sequence) = known {
            active.sequence = sequence;
        }
        active.draft = draft;
        (active.cached, active.shared, active.started) = (Some(cached), shared, now);
        let event = GenerationEvent::Started {
            prompt_tokens: active.prompt_len as u32,
            cached_tokens: cached as u32,
        };
        let _ = active.request.events.send(Ok(event));
        self.scheduler.reused(id, cached);
        Ok(())
    }

    /// Has the beginning of a prompt read from disk, where that has more than `known` tokens of it.
    fn fetch(&self, prompt: &[u32], known: usize) -> Option<Reading> {
        let disk = self.disk.as_ref()?;
        let on_disk = disk.known(prompt);
        (on_disk > known).then(|| Reading {
            fetch: disk.fetch(&prompt[..on_disk]),
            since: self.clock.now(),
            limit: self.scheduler.prefill_time(on_disk - known),
        })
    }

    /// The beginning of a prompt that was read, where that is longer than `known`.
    fn import(&mut self, mut fetch: Fetch, prompt: &[u32], known: usize) -> Option<(M::Sequence, usize)> {
        // What has come since it was looked at.
        fetch.is_over();
        let blocks = fetch.into_blocks();
        if blocks.is_empty() {
            return None;
        }
        let model = &mut self.model;
        match guarded(|| model.import(&blocks)) {
            Ok(sequence) => {
                let len = model.len(&sequence);
                (len > known && len <= prompt.len()).then_some((sequence, len))
            }
            Err(error) => {
                tracing::warn!(%error, "what is on disk is of no use and is given up");
                if let Some(disk) = &self.disk {
                    disk.refuse(prompt);
                }
                None
            }
        }
    }

    /// Waits for the disk where nothing else can be done, for a moment: callers and times are looked after in between.
    pub(super) fn wait_for_disk(&mut self) {
        if self.scheduler.waits_for_disk() {
            let reading = self.active.iter_mut().find_map(|active| active.reading.as_mut());
            if let Some(Reading { fetch, .. }) = reading {
                fetch.wait(MOMENT);
            }
        }
    }

    /// What one that is kept or runs knows of a prompt, and how much of it.
    fn known(&mut self, prompt: &[u32]) -> Result<Found<M::Sequence>, EngineError> {
        let Self {
            model,
            active,
            prefixes,
            speculation,
            ..
        } = self;
        let begun = active.iter_mut().filter(|active| active.cached.is_some());
        let running = begun
            .map(|active| {
                let alike = alike(&active.tokens, prompt);
                (alike.min(model.len(&active.sequence)), active)
            })
            .max_by_key(|(len, _)| *len);
        if let Some((len, active)) = running.filter(|(len, _)| *len > prefixes.known(prompt))
            && let Some(sequence) = model.fork(&mut active.sequence, len)?
        {
            // What the draft model has seen may be guesses behind what the two have in common.
            let alike = len.min(active.tokens.len() - 1);
            let draft = speculation.fork_draft(active.draft.as_mut(), alike);
            return Ok(Some((Known { sequence, draft }, len)));
        }
        prefixes.fork(&mut speculation.pair(model), prompt)
    }
}

/// What is known of a prompt, and of how many of its tokens.
type Found<S> = Option<(Known<S>, usize)>;

/// How many of the first tokens are the same.
fn alike(some: &[u32], others: &[u32]) -> usize {
    some.iter().zip(others).take_while(|(a, b)| a == b).count()
}
