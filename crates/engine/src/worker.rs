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
use crate::{Chosen, TokenModel};

/// What reaches the worker.
#[derive(Debug)]
pub(crate) enum Command {
    Generate(Request),
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
    active: Vec<Active<M::Sequence>>,
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
}

enum Phase {
    /// This many tokens of the prompt have been fed.
    Prefill(usize),
    /// A token is being chosen.
    Decode,
}

/// Whether a request goes on.
enum Progress {
    Running,
    Finished(FinishReason),
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
            active: Vec::new(),
        }
    }

    /// Serves requests until nobody can send any.
    pub(crate) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            if self.active.is_empty() {
                match commands.blocking_recv() {
                    Some(command) => self.accept(command),
                    None => return,
                }
            }
            while self.active.len() < self.options.max_active {
                match commands.try_recv() {
                    Ok(command) => self.accept(command),
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => {
                        // The engine was unloaded: nobody waits for what is left.
                        for active in self.active.drain(..) {
                            let error = EngineError::NotLoaded {
                                model: self.identity.model.to_string(),
                            };
                            let _ = active.request.events.try_send(Err(error));
                        }
                        return;
                    }
                }
            }
            self.turn();
        }
    }

    fn accept(&mut self, command: Command) {
        match command {
            Command::Generate(request) => self.admit(request),
            Command::Score { tokens, reply } => {
                let go_on = || !reply.is_closed();
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
        });
    }

    /// Takes every request one step further.
    fn turn(&mut self) {
        let mut index = 0;
        while index < self.active.len() {
            let active = &mut self.active[index];
            if active.request.events.is_closed() {
                // The caller dropped the stream. What has been computed may serve the next request.
                let active = self.active.swap_remove(index);
                self.retire(active);
                continue;
            }
            let (model, chunk) = (&mut self.model, self.options.prefill_chunk);
            let stepped = catch_unwind(AssertUnwindSafe(|| step(model, active, chunk)));
            match stepped.unwrap_or_else(|panic| Err(panicked(&*panic))) {
                Ok(Progress::Running) => index += 1,
                Ok(Progress::Finished(reason)) => {
                    let active = self.active.swap_remove(index);
                    self.finish(active, reason);
                }
                Err(error) => {
                    // Its memory goes with it: what it holds may be half written.
                    let active = self.active.swap_remove(index);
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

/// One chunk of the prompt, or one token.
fn step<M: TokenModel>(
    model: &mut M,
    active: &mut Active<M::Sequence>,
    chunk: usize,
) -> Result<Progress, EngineError> {
    let params = &active.request.params;
    match active.phase {
        Phase::Prefill(fed) if active.prompt_len - fed > chunk => {
            model.prefill(&mut active.sequence, &active.tokens[fed..fed + chunk])?;
            active.phase = Phase::Prefill(fed + chunk);
            Ok(Progress::Running)
        }
        Phase::Prefill(fed) => {
            model.begin(&mut active.sequence, &active.tokens[fed..], params, 0)?;
            active.phase = Phase::Decode;
            Ok(Progress::Running)
        }
        Phase::Decode => {
            let next = active.answer.generated() + 1;
            let room = active.tokens.len() + 1 < model.context_length();
            let more = next < params.max_tokens && room;
            let ahead = more && model.look_ahead(&mut active.sequence, params, next.into())?;
            let chosen = model.read(&mut active.sequence, params, &active.tokens, active.prompt_len)?;
            let token = chosen.token;
            active.tokens.push(token);
            let reason = emit(active, chosen);
            if let Some(reason) = reason {
                return Ok(Progress::Finished(reason));
            }
            if !room {
                return Ok(Progress::Finished(FinishReason::Length));
            }
            if !ahead {
                model.begin(
                    &mut active.sequence,
                    &[token],
                    &active.request.params,
                    next.into(),
                )?;
            }
            Ok(Progress::Running)
        }
    }
}

/// Hands a token's text to the caller.
fn emit<S>(active: &mut Active<S>, chosen: Chosen) -> Option<FinishReason> {
    let (event, reason) = active.answer.take(chosen, &active.request.params, Instant::now());
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
