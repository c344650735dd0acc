//! The thread that owns the model.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use mlx_engine_core::{Backend, Device, EngineError, FinishReason, GenerateSummary, GenerationEvent};
use mlx_engine_text::Tokenizer;
use tokio::sync::{mpsc, oneshot};

use crate::engine::{EngineOptions, Score};
use crate::prefix::PrefixCache;
use crate::request::{Answer, Request};
use crate::{Chosen, Feed, TokenModel};

/// What reaches the worker.
#[derive(Debug)]
pub(crate) enum Command {
    Generate(Box<Request>),
    Score {
        tokens: Vec<u32>,
        reply: oneshot::Sender<Result<Score, EngineError>>,
    },
}

/// What every answer says of the engine.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) model: Arc<str>,
    pub(crate) backend: Backend,
    pub(crate) device: Device,
    pub(crate) load_s: f64,
}

pub(crate) struct Worker<M: TokenModel> {
    model: M,
    tokenizer: Tokenizer,
    identity: Identity,
    options: EngineOptions,
    prefixes: PrefixCache<M::Sequence>,
    /// The next request, which does not fit beside those that run.
    waiting: Option<Request>,
    /// In the order in which they came.
    active: Vec<Active<M::Sequence>>,
    /// Requests so far.
    admitted: u64,
}

/// A request that is being run.
struct Active<S> {
    request: Request,
    answer: Answer,
    sequence: S,
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Prompt tokens that were taken over from another request.
    cached: usize,
    phase: Phase,
    started: Instant,
    /// Tells requests apart.
    number: u64,
    /// Whether the first token was begun in this turn.
    fresh: bool,
    /// Whether the token after the one that is read was begun in this turn.
    ahead: bool,
    finished: Option<FinishReason>,
}

enum Phase {
    /// This many tokens of the prompt have been fed.
    Prefill(usize),
    /// A token is being chosen.
    Decode,
}

impl<M: TokenModel> Worker<M> {
    pub(crate) fn new(model: M, tokenizer: Tokenizer, identity: Identity, options: EngineOptions) -> Self {
        let prefixes = PrefixCache::new(options.kept_sequences);
        Self {
            model,
            tokenizer,
            identity,
            options,
            prefixes,
            waiting: None,
            active: Vec::new(),
            admitted: 0,
        }
    }

    /// Serves requests until nobody can send any.
    pub(crate) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            if let Some(request) = self.waiting.take() {
                self.admit(request);
            }
            if self.active.is_empty() && self.waiting.is_none() {
                match commands.blocking_recv() {
                    Some(command) => self.accept(command, &commands),
                    None => return,
                }
            }
            while self.active.len() < self.options.max_active && self.waiting.is_none() {
                match commands.try_recv() {
                    Ok(command) => self.accept(command, &commands),
                    Err(_) => break,
                }
            }
            if commands.is_closed() {
                // The engine was unloaded: nobody waits for what is left.
                let active = self.active.drain(..).map(|active| active.request);
                for request in active.chain(self.waiting.take()) {
                    let error = EngineError::NotLoaded {
                        model: self.identity.model.to_string(),
                    };
                    let _ = request.events.try_send(Err(error));
                }
                return;
            }
            self.turn();
        }
    }

    fn accept(&mut self, command: Command, commands: &mpsc::Receiver<Command>) {
        match command {
            Command::Generate(request) => self.admit(*request),
            Command::Score { tokens, reply } => {
                let go_on = || !reply.is_closed() && !commands.is_closed();
                let scored = catch_unwind(AssertUnwindSafe(|| self.model.score(&tokens, &go_on)));
                let result = scored.unwrap_or_else(|panic| Err(panicked(&*panic)));
                // The caller may have gone.
                let _ = reply.send(result.map(|logprobs| Score { tokens, logprobs }));
            }
        }
    }

    fn admit(&mut self, request: Request) {
        let context_length = self.model.context_length();
        if request.tokens.len() >= context_length {
            let error = EngineError::PromptTooLong {
                prompt_tokens: request.tokens.len() as u64,
                context_length: context_length as u64,
            };
            let _ = request.events.try_send(Err(error));
            return;
        }
        if request.events.is_closed() {
            return;
        }
        match self.make_room(&request) {
            Ok(true) => {}
            Ok(false) => {
                self.waiting = Some(request);
                return;
            }
            Err(error) => {
                let _ = request.events.try_send(Err(error));
                return;
            }
        }
        let started = Instant::now();
        let (sequence, cached) = match self.prefixes.take(&request.tokens) {
            Some((mut sequence, len)) => {
                self.model.truncate(&mut sequence, len);
                (sequence, len)
            }
            None => (self.model.open(), 0),
        };
        let prompt_len = request.tokens.len();
        let event = GenerationEvent::Started {
            prompt_tokens: prompt_len as u32,
            cached_tokens: cached as u32,
        };
        let _ = request.events.try_send(Ok(event));
        self.active.push(Active {
            answer: Answer::new(&self.tokenizer, &request),
            tokens: request.tokens.clone(),
            request,
            sequence,
            prompt_len,
            cached,
            phase: Phase::Prefill(cached),
            started,
            number: self.admitted,
            fresh: false,
            ahead: false,
            finished: None,
        });
        self.admitted += 1;
    }

    /// Bytes that a request may come to take.
    fn most_bytes(&self, request: &Request) -> u64 {
        let answer = request.params.max_tokens as usize;
        let most = request.tokens.len().saturating_add(answer);
        self.model.sequence_bytes(most.min(self.model.context_length()))
    }

    /// Whether a request fits beside those that run. Sequences that are only kept are given up for it.
    fn make_room(&mut self, request: &Request) -> Result<bool, EngineError> {
        let Some(limit) = self.options.memory_limit else {
            return Ok(true);
        };
        let available = limit.saturating_sub(self.model.weight_bytes());
        let required = self.most_bytes(request);
        if required > available {
            return Err(EngineError::InsufficientMemory { required, available });
        }
        let running = self.active.iter().map(|active| self.most_bytes(&active.request));
        let free = available.saturating_sub(running.sum());
        if required > free {
            return Ok(false);
        }
        let kept = |worker: &Self| {
            let lengths = worker.prefixes.lengths();
            lengths.map(|len| worker.model.sequence_bytes(len)).sum::<u64>()
        };
        while required.saturating_add(kept(self)) > free && self.prefixes.drop_oldest() {}
        Ok(true)
    }

    /// Takes a chunk of the prompt that came first, and every answer a token further.
    ///
    /// One chunk a turn, so that answers never wait for more than that.
    fn turn(&mut self) {
        // A caller who dropped the stream. What has been computed may serve the next request.
        self.take_out(|active| active.request.events.is_closed().then_some(Outcome::Dropped));
        let decoding = |active: &Active<M::Sequence>| matches!(active.phase, Phase::Decode);
        let prompt = self.active.iter().position(|active| !decoding(active));
        let mut failed = Vec::new();
        if let Some(index) = prompt {
            let (model, active) = (&mut self.model, &mut self.active[index]);
            let chunk = self.options.prefill_chunk;
            if let Err(error) = guarded(|| prefill(model, active, chunk)) {
                failed.push((active.number, error));
            } else if decoding(active) {
                // Its first token is read in the next turn, so that it is chosen meanwhile.
                active.fresh = true;
            }
        }
        self.feed(&mut failed, |model, active| {
            let more = active.wants_more(model.context_length());
            let free = active.request.walk.is_none();
            (more && free && model.can_look_ahead(&active.sequence)).then_some(None)
        });
        for active in self.active.iter_mut().filter(|active| active.is_due()) {
            if failed.iter().any(|(number, _)| *number == active.number) {
                continue;
            }
            let model = &mut self.model;
            match guarded(|| read(model, active)) {
                Ok(reason) => active.finished = reason,
                Err(error) => failed.push((active.number, error)),
            }
        }
        self.feed(&mut failed, |_, active| {
            let stands = active.finished.is_none() && !active.ahead;
            stands.then(|| active.tokens.last().copied())
        });
        for active in &mut self.active {
            (active.fresh, active.ahead) = (false, false);
        }
        self.take_out(|active| {
            if let Some(at) = failed.iter().position(|(number, _)| *number == active.number) {
                return Some(Outcome::Failed(failed.swap_remove(at).1));
            }
            active.finished.map(Outcome::Finished)
        });
    }

    /// Feeds a token to every answer that is due and for which `token` gives one, `Some(None)` being the one that is not
    /// read yet, as many at once as the model takes.
    fn feed(
        &mut self,
        failed: &mut Vec<(u64, EngineError)>,
        token: impl Fn(&M, &Active<M::Sequence>) -> Option<Option<u32>>,
    ) {
        let Self { model, active, .. } = self;
        let mut due = Vec::new();
        for active in active.iter_mut().filter(|active| active.is_due()) {
            if failed.iter().any(|(number, _)| *number == active.number) {
                continue;
            }
            if let Some(token) = token(model, active) {
                due.push((active, token));
            }
        }
        for some in due.chunks_mut(model.batch_limit().max(1)) {
            let mut batch: Vec<Feed<'_, M::Sequence>> = some
                .iter_mut()
                .map(|(active, token)| {
                    let read = u32::from(token.is_none());
                    Feed {
                        number: (active.answer.generated() + read).into(),
                        sequence: &mut active.sequence,
                        params: &active.request.params,
                        token: *token,
                    }
                })
                .collect();
            match guarded(|| model.feed(&mut batch)) {
                Ok(()) => some.iter_mut().for_each(|(active, _)| active.ahead = true),
                // The step was theirs together.
                Err(error) => failed.extend(some.iter().map(|(active, _)| (active.number, error.clone()))),
            }
        }
    }

    /// Takes requests out that `outcome` says have ended.
    fn take_out(&mut self, mut outcome: impl FnMut(&Active<M::Sequence>) -> Option<Outcome>) {
        let mut index = 0;
        while index < self.active.len() {
            let Some(outcome) = outcome(&self.active[index]) else {
                index += 1;
                continue;
            };
            // In order, so that who came first stays first.
            let active = self.active.remove(index);
            match outcome {
                Outcome::Dropped => self.retire(active),
                Outcome::Finished(reason) => self.finish(active, reason),
                Outcome::Failed(error) => {
                    // Its memory goes with it: what it holds may be half written.
                    tracing::warn!(error = %error, model = %self.identity.model, "request failed");
                    if matches!(error, EngineError::OutOfMemory) {
                        self.prefixes.clear();
                    }
                    let _ = active.request.events.try_send(Err(error));
                }
            }
        }
    }

    fn finish(&mut self, active: Active<M::Sequence>, finish_reason: FinishReason) {
        let usage = active.answer.usage(active.prompt_len, active.cached);
        let summary = GenerateSummary {
            model: self.identity.model.to_string(),
            backend: self.identity.backend,
            device: self.identity.device,
            finish_reason,
            usage,
            timings: active.answer.timings(self.identity.load_s, active.started, usage),
            peak_memory_bytes: self.model.peak_memory_bytes(),
        };
        let _ = active
            .request
            .events
            .try_send(Ok(GenerationEvent::Finished(summary)));
        self.retire(active);
    }

    /// Keeps what a request has computed.
    fn retire(&mut self, active: Active<M::Sequence>) {
        let Active {
            mut sequence,
            mut tokens,
            ..
        } = active;
        // A step that looked ahead was fed a token that the answer does not have.
        tokens.truncate(self.model.len(&sequence));
        self.model.truncate(&mut sequence, tokens.len());
        self.prefixes.keep(tokens, sequence);
    }
}

/// Why a request is taken out.
enum Outcome {
    Dropped,
    Finished(FinishReason),
    Failed(EngineError),
}

impl<S> Active<S> {
    /// Whether a token of the answer is being chosen, since before this turn.
    fn is_due(&self) -> bool {
        matches!(self.phase, Phase::Decode) && !self.fresh
    }

    /// Whether a token may follow the one that is being chosen.
    fn wants_more(&self, context_length: usize) -> bool {
        self.answer.generated() + 1 < self.request.params.max_tokens && self.tokens.len() + 1 < context_length
    }
}

/// Runs a step of the model; a panic in it is an error.
fn guarded<T>(step: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| Err(panicked(&*panic)))
}

/// One chunk of the prompt.
fn prefill<M: TokenModel>(
    model: &mut M,
    active: &mut Active<M::Sequence>,
    chunk: usize,
) -> Result<(), EngineError> {
    let Phase::Prefill(fed) = active.phase else {
        return Ok(());
    };
    if active.prompt_len - fed > chunk {
        model.prefill(&mut active.sequence, &active.tokens[fed..fed + chunk])?;
        active.phase = Phase::Prefill(fed + chunk);
    } else {
        let params = &active.request.params;
        model.begin(&mut active.sequence, &active.tokens[fed..], params, 0)?;
        active.phase = Phase::Decode;
    }
    Ok(())
}

/// Reads the token that is being chosen, and says whether it was the last.
fn read<M: TokenModel>(
    model: &mut M,
    active: &mut Active<M::Sequence>,
) -> Result<Option<FinishReason>, EngineError> {
    let room = active.tokens.len() + 1 < model.context_length();
    let Request { params, walk, .. } = &mut active.request;
    if let Some(walk) = walk {
        walk.prepare()?;
    }
    let mut masked = Ok(());
    let mut mask = |logits: &mut [f32]| {
        if let Some(walk) = walk {
            masked = walk.mask(logits);
        }
    };
    let chosen = model.read(
        &mut active.sequence,
        params,
        &active.tokens,
        active.prompt_len,
        &mut mask,
    )?;
    masked?;
    active.tokens.push(chosen.token);
    let complete = match walk {
        Some(walk) => walk.commit(chosen.token)?,
        None => false,
    };
    let reason = emit(active, chosen, complete);
    Ok(reason.or((!room).then_some(FinishReason::Length)))
}

/// Hands a token's text to the caller.
fn emit<S>(active: &mut Active<S>, chosen: Chosen, complete: bool) -> Option<FinishReason> {
    let params = &active.request.params;
    let (event, reason) = active.answer.take(chosen, params, complete, Instant::now());
    if let Some(event) = event {
        // A caller who is gone is noticed before the next step.
        let _ = active.request.events.try_send(Ok(event));
    }
    reason
}

pub(crate) fn panicked(panic: &(dyn Any + Send)) -> EngineError {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    EngineError::WorkerPanicked {
        message: text.unwrap_or_else(|| "no message".to_owned()),
    }
}
