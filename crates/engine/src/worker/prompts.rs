//! Prompts: what is known of them already, their chunks, and what is kept of them.

use mlx_engine_core::{EngineError, GenerationEvent};

use super::active::Active;
use super::{PrefixCommand, Worker, guarded};
use crate::TokenModel;
use crate::clock::Clock;
use crate::scheduler::Chunk;

impl<M: TokenModel, C: Clock> Worker<M, C> {
    pub(super) fn manage(&mut self, command: PrefixCommand) {
        let Self { model, prefixes, .. } = self;
        match command {
            PrefixCommand::Report(reply) => drop(reply.send(prefixes.report())),
            PrefixCommand::Clear(reply) => drop(reply.send(prefixes.clear())),
            PrefixCommand::Pin { tokens, pinned } => {
                let result = guarded(|| prefixes.pin(model, &tokens)).map(|known| {
                    let lack = || EngineError::InsufficientMemory {
                        required: model.sequence_bytes(tokens.len()),
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
    /// Hands a chunk of what was computed over to be written; `false` where there is none, and, unless it may wait, no
    /// place for it.
    pub(super) fn save(&mut self, wait: bool) -> bool {
        let Self {
            model,
            prefixes,
            disk: Some(disk),
            ..
        } = self
        else {
            return false;
        };
        let Some(piece) = disk.piece() else {
            return false;
        };
        let Some(sequence) = prefixes.with(&piece.tokens) else {
            // It had to make room.
            disk.give_up();
            return true;
        };
        match guarded(|| model.export(sequence, piece.range.clone())) {
            Ok(block) => disk.write(&piece, &block, wait),
            Err(error) => {
                tracing::warn!(%error, "what was computed could not be written");
                disk.give_up();
                true
            }
        }
    }

    /// The beginning of a prompt that is on disk, where that is longer than `known`.
    fn read_disk(&mut self, prompt: &[u32], known: usize) -> Option<(M::Sequence, usize)> {
        let disk = self.disk.as_ref().filter(|disk| disk.known(prompt) > known)?;
        let blocks = disk.load(prompt);
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
                disk.refuse(prompt);
                None
            }
        }
    }

    /// Looks for what is known of a prompt before its first chunk, and says what the chunk is then.
    pub(super) fn begin(&mut self, chunk: Chunk) -> Result<Chunk, EngineError> {
        let position = |active: &Active<M::Sequence>| active.id == chunk.id && active.cached.is_none();
        let Some(at) = self.active.iter().position(position) else {
            return Ok(chunk);
        };
        // The last token is fed in any case: the logits after it are wanted.
        let active = &self.active[at];
        let prompt = &active.tokens[..active.prompt_len - 1].to_vec();
        let (known, cached) = match guarded(|| self.known(prompt))? {
            Some((sequence, len)) => (Some(sequence), len),
            None => (None, 0),
        };
        let (known, cached, shared) = match self.read_disk(prompt, cached) {
            Some((sequence, len)) => (Some(sequence), len, 0),
            None => (known, cached, cached),
        };
        self.prefixes.count(cached);
        let now = self.clock.now();
        let active = &mut self.active[at];
        if let Some(sequence) = known {
            active.sequence = sequence;
        }
        (active.cached, active.shared, active.started) = (Some(cached), shared, now);
        let event = GenerationEvent::Started {
            prompt_tokens: active.prompt_len as u32,
            cached_tokens: cached as u32,
        };
        let _ = active.request.events.send(Ok(event));
        Ok(self.scheduler.reused(chunk.id, cached).unwrap_or(chunk))
    }

    /// A sequence that has seen as much of a prompt as one that is kept or runs.
    fn known(&mut self, prompt: &[u32]) -> Result<Option<(M::Sequence, usize)>, EngineError> {
        let Self {
            model,
            active,
            prefixes,
            ..
        } = self;
        let begun = active.iter_mut().filter(|active| active.cached.is_some());
        let running = begun
            .map(|active| {
                let alike = active
                    .tokens
                    .iter()
                    .zip(prompt)
                    .take_while(|(a, b)| a == b)
                    .count();
                (alike.min(model.len(&active.sequence)), active)
            })
            .max_by_key(|(len, _)| *len);
        if let Some((len, active)) = running.filter(|(len, _)| *len > prefixes.known(prompt))
            && let Some(fork) = model.fork(&mut active.sequence, len)?
        {
            return Ok(Some((fork, len)));
        }
        prefixes.fork(model, prompt)
    }

    pub(super) fn prefill(&mut self, chunk: Chunk) -> Result<(), EngineError> {
        let Self {
            model,
            active,
            prefixes,
            ..
        } = self;
        let Some(active) = active.iter_mut().find(|active| active.id == chunk.id) else {
            return Ok(());
        };
        let tokens = &active.tokens[chunk.from..chunk.to];
        let (sequence, params) = (&mut active.sequence, &active.request.params);
        guarded(|| {
            if chunk.last {
                // Its first token is read in the next turn, so that it is chosen meanwhile.
                model.begin(sequence, tokens, params, 0)?;
            } else {
                model.prefill(sequence, tokens)?;
            }
            let kept = active.checkpoints.contains(&chunk.to) || chunk.last && !model.forks_anywhere();
            if kept && let Some(fork) = model.fork(sequence, chunk.to)? {
                prefixes.keep(model, &active.tokens[..chunk.to], fork, active.shared);
            }
            Ok(())
        })
    }
}
