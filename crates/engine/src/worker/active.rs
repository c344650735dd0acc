//! A request that is being run.

use std::time::{Duration, Instant};

use mlx_engine_core::{EngineError, FinishReason};

use super::guarded;
use super::guesses::Guesses;
use crate::clock::Clock;
use crate::disk::Fetch;
use crate::request::{Answer, Request};
use crate::scheduler::{Chunk, Id};
use crate::{Chosen, Feed, TokenModel};

/// A request that is being run.
pub(super) struct Active<S> {
    pub(super) id: Id,
    pub(super) request: Request,
    pub(super) answer: Answer,
    pub(super) sequence: S,
    /// Prompt and answer so far.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_len: usize,
    /// The beginning of its prompt that is read from disk before it is begun.
    pub(super) reading: Option<Reading>,
    /// Prompt tokens that need not be computed; `None` until its prompt is begun.
    pub(super) cached: Option<usize>,
    /// Those of them that are in memory once, for this request and for another.
    pub(super) shared: usize,
    /// Lengths of the prompt at which its state is kept, where it cannot be had from a longer one.
    pub(super) checkpoints: Vec<usize>,
    pub(super) started: Instant,
    /// Whether the token after the one that is read was begun in this turn.
    pub(super) ahead: bool,
    /// Whether the step that was begun last was one with others, and whether the one that is read was.
    pub(super) together: Together,
    /// What a step failed with that was one with others: it is to be run again, alone.
    pub(super) redo: Option<EngineError>,
    /// Tokens that the step was fed which is read next.
    pub(super) rows: usize,
    pub(super) finished: Option<FinishReason>,
    pub(super) guesses: Guesses,
    /// What the draft model has seen of it.
    pub(super) draft: Option<S>,
}

/// The beginning of a prompt on its way from the disk.
pub(super) struct Reading {
    pub(super) fetch: Fetch,
    pub(super) since: Instant,
    /// How long it would take to compute it: what has not come by then is late.
    pub(super) limit: Duration,
}

impl<S> Active<S> {
    /// Whether it goes on and its next step was not begun.
    pub(super) fn waits(&self) -> bool {
        self.finished.is_none() && !self.ahead && self.redo.is_none()
    }

    /// Whether a token may follow the one that is being chosen.
    pub(super) fn wants_more(&self, context_length: usize) -> bool {
        self.answer.generated() + 1 < self.request.params.max_tokens && self.tokens.len() + 1 < context_length
    }
}

/// Whether steps of a request were one with those of others, or went on from what another has computed: then it is not known
/// whose fault it is that one fails.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Together {
    pub(super) begun: bool,
    pub(super) read: bool,
}

/// Why no token was read.
#[derive(Debug)]
pub(super) enum Unread {
    /// The step failed.
    Step(EngineError),
    /// The token cannot be of use.
    Request(EngineError),
}

impl From<EngineError> for Unread {
    fn from(error: EngineError) -> Self {
        Self::Request(error)
    }
}

/// Reads the token that is being chosen, and says whether it was the last.
pub(super) fn read<M: TokenModel>(
    model: &mut M,
    active: &mut Active<M::Sequence>,
    context_length: usize,
    clock: &impl Clock,
) -> Result<Option<FinishReason>, Unread> {
    let room = active.tokens.len() + 1 < context_length;
    let Request { params, walk, .. } = &mut active.request;
    let mut masked = Ok(());
    let mut mask = |logits: &mut [f32]| {
        if let Some(walk) = walk {
            // While the device computed these logits: now they would wait for it.
            debug_assert!(walk.is_prepared(), "what may come was not found out before");
            masked = walk.mask(logits);
        }
    };
    let (sequence, tokens) = (&mut active.sequence, &active.tokens);
    let chosen = guarded(|| model.read(sequence, params, tokens, active.prompt_len, &mut mask));
    let chosen = chosen.map_err(Unread::Step)?;
    masked?;
    active.tokens.push(chosen.token);
    let complete = match walk {
        Some(walk) => walk.commit(chosen.token)?,
        None => false,
    };
    let reason = emit(active, chosen, complete, clock.now());
    Ok(reason.or((!room).then_some(FinishReason::Length)))
}

/// What a request is fed in a step.
pub(super) struct Row {
    /// The token that is not read yet where `None`.
    tokens: Option<Vec<u32>>,
    choices: usize,
    number: u64,
    /// Tokens that the sequence has seen before.
    pub(super) from: usize,
    /// Where it is a part of the prompt.
    pub(super) chunk: Option<Chunk>,
}

impl Row {
    /// A part of the prompt. The first token of the answer is read in the next turn, so that it is chosen meanwhile.
    pub(super) fn chunk<S>(active: &Active<S>, chunk: Chunk) -> Self {
        Self {
            tokens: Some(active.tokens[chunk.from..chunk.to].to_vec()),
            choices: usize::from(chunk.last),
            number: 0,
            from: chunk.from,
            chunk: Some(chunk),
        }
    }

    /// The token that is being chosen.
    pub(super) fn unread<S>(active: &Active<S>) -> Self {
        Self {
            tokens: None,
            choices: 1,
            number: u64::from(active.answer.generated()) + 1,
            from: active.tokens.len(),
            chunk: None,
        }
    }

    /// What was read and not fed, and the guesses behind it.
    pub(super) fn read<S>(active: &Active<S>, fed: usize) -> Self {
        let guesses = &active.guesses.fed;
        Self {
            tokens: Some([&active.tokens[fed..], guesses].concat()),
            choices: 1 + guesses.len(),
            number: active.answer.generated().into(),
            from: fed,
            chunk: None,
        }
    }

    /// Whether what it feeds is not read yet.
    pub(super) fn is_unread(&self) -> bool {
        self.tokens.is_none()
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.as_ref().map_or(1, Vec::len)
    }

    /// Tokens of a prompt that it feeds.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.chunk.map_or(0, |chunk| chunk.to - chunk.from)
    }

    /// The same for the model.
    pub(super) fn feed<'a, S>(&'a self, active: &'a mut Active<S>) -> Feed<'a, S> {
        Feed {
            sequence: &mut active.sequence,
            params: &active.request.params,
            tokens: self.tokens.as_deref(),
            choices: self.choices,
            number: self.number,
            before: &active.tokens[..self.from],
            prompt_len: active.prompt_len,
        }
    }
}

/// Adds the tokens to an answer that need no choice, and says how many they are: those that end its thoughts, or those that
/// its grammar leaves no choice about.
pub(super) fn forced<S>(
    active: &mut Active<S>,
    context_length: usize,
    clock: &impl Clock,
) -> Result<usize, EngineError> {
    let Request { params, walk, .. } = &mut active.request;
    let mut tokens = active.answer.end_of_thoughts(params);
    if let Some(walk) = walk {
        if !tokens.is_empty() {
            tokens.truncate(walk.allowed_of(&tokens)?);
        } else if !params.logprobs {
            // What is not chosen has no probability.
            tokens = walk.forced();
        }
    }
    let mut count = 0;
    for token in tokens {
        let room = active.tokens.len() + 1 < context_length;
        let complete = match &mut active.request.walk {
            Some(walk) => walk.commit(token)?,
            None => false,
        };
        active.tokens.push(token);
        count += 1;
        let chosen = Chosen {
            token,
            logprob: None,
            top: Vec::new(),
        };
        let reason = emit(active, chosen, complete, clock.now());
        active.finished = reason.or((!room).then_some(FinishReason::Length));
        if active.finished.is_some() {
            break;
        }
    }
    Ok(count)
}

/// Hands what a token makes certain to the caller.
fn emit<S>(active: &mut Active<S>, chosen: Chosen, complete: bool, now: Instant) -> Option<FinishReason> {
    let params = &active.request.params;
    let (events, reason) = active.answer.take(chosen, params, complete, now);
    for event in events {
        // A caller who is gone is noticed before the next step.
        let _ = active.request.events.send(Ok(event));
    }
    reason
}
