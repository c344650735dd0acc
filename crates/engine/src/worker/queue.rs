//! From the queue to the requests that run, and out of both.

use std::time::Duration;

use mlx_engine_core::EngineError;

use super::active::{Active, Together};
use super::guesses::Guesses;
use super::{Worker, guarded};
use crate::TokenModel;
use crate::clock::Clock;
use crate::request::{Answer, Request};
use crate::scheduler::{Admission, Ask, Id, Refusal, Work};

impl<M: TokenModel, C: Clock> Worker<M, C> {
    /// Puts a request into the queue.
    pub(crate) fn submit(&mut self, request: Request) -> Result<(), EngineError> {
        let context_length = self.context_length;
        let prompt = request.tokens.len();
        if prompt >= context_length {
            return Err(EngineError::PromptTooLong {
                prompt_tokens: prompt as u64,
                context_length: context_length as u64,
            });
        }
        if prompt == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        let answer = (request.params.max_tokens as usize).min(context_length - prompt);
        let limit = |seconds: Option<f64>| Duration::try_from_secs_f64(seconds?).ok();
        let ask = Ask {
            id: self.submitted,
            prompt,
            cuts: self.checkpoints(&request.tokens),
            work: Work::Answer(answer),
            bytes: self.sequence_bytes(prompt + answer),
            priority: request.params.priority,
            arrived: request.submitted,
            queue_limit: limit(request.params.queue_timeout_s),
            limit: limit(request.params.timeout_s),
        };
        let id = ask.id;
        self.enqueue(ask)?;
        self.waiting.push((id, request));
        self.note();
        Ok(())
    }

    /// Has the scheduler take what a request asks for.
    pub(super) fn enqueue(&mut self, ask: Ask) -> Result<(), EngineError> {
        // Who has gone holds no place.
        self.sweep();
        self.scheduler.submit(ask).map_err(|refusal| match refusal {
            Refusal::Full { retry_after } => EngineError::QueueFull { retry_after },
            Refusal::TooLarge { required, available } => {
                EngineError::InsufficientMemory { required, available }
            }
        })?;
        self.submitted += 1;
        Ok(())
    }

    /// Takes out requests whose caller has gone and those whose time is over.
    pub(super) fn sweep(&mut self) {
        let gone = |request: &Request| request.events.is_closed();
        let waiting = self
            .waiting
            .iter()
            .filter(|(_, request)| gone(request))
            .map(|(id, _)| *id);
        let active = self
            .active
            .iter()
            .filter(|active| gone(&active.request))
            .map(|active| active.id);
        let scored = self.scoring.given_up();
        for id in waiting.chain(active).chain(scored).collect::<Vec<_>>() {
            self.scheduler.cancel(id);
            self.scoring.remove(id);
            self.end(id, Self::retire, drop);
        }
        let now = self.clock.now();
        while let Some((id, limit)) = self.scheduler.expire(now) {
            let error = EngineError::DeadlineExceeded { limit };
            let told = error.clone();
            self.end(
                id,
                |worker, active| {
                    let _ = active.request.events.send(Err(error));
                    worker.retire(active);
                },
                |request| {
                    let _ = request.events.send(Err(told));
                },
            );
        }
    }

    /// Takes a request out of where it is.
    fn end(
        &mut self,
        id: Id,
        running: impl FnOnce(&mut Self, Active<M::Sequence>),
        waiting: impl FnOnce(Request),
    ) {
        if let Some(at) = self.waiting.iter().position(|(other, _)| *other == id) {
            waiting(self.waiting.remove(at).1);
        } else if let Some(at) = self.active.iter().position(|active| active.id == id) {
            let active = self.active.remove(at);
            running(self, active);
        }
    }

    /// Where the state of a prompt is kept while it is fed: behind its first and its last message, where a conversation
    /// that begins alike goes another way. None where any state can be had from a later one.
    pub(super) fn checkpoints(&self, tokens: &[u32]) -> Vec<usize> {
        if self.model.forks_anywhere() {
            return Vec::new();
        }
        let ends = self.tokenizer.eos_ids();
        let behind = |(at, token): (usize, &u32)| ends.contains(token).then_some(at + 1);
        let mut behind = tokens
            .iter()
            .enumerate()
            .filter_map(behind)
            .filter(|&at| at < tokens.len());
        let first = behind.next();
        first.into_iter().chain(behind.next_back()).collect()
    }

    /// Lets requests run for which there is room.
    pub(super) fn admit(&mut self) {
        while let Some(admission) = self.scheduler.admit() {
            let (id, opened) = match admission {
                Admission::Run(id) => (id, guarded(|| Ok(self.model.open()))),
                Admission::TooLarge {
                    id,
                    required,
                    available,
                } => (id, Err(EngineError::InsufficientMemory { required, available })),
            };
            if self.scoring.has(id) {
                self.admit_score(id, opened);
                continue;
            }
            let Some(at) = self.waiting.iter().position(|(other, _)| *other == id) else {
                self.scheduler.cancel(id);
                continue;
            };
            let (_, mut request) = self.waiting.remove(at);
            let sequence = match opened {
                Ok(sequence) => sequence,
                Err(error) => {
                    self.scheduler.cancel(id);
                    let _ = request.events.send(Err(error));
                    continue;
                }
            };
            if self.speculation.draft().is_some() {
                // Both models choose by the same random numbers.
                request.params.seed.get_or_insert_with(|| self.model.seed());
            }
            let off = self.speculation_off(&request);
            self.active.push(Active {
                id,
                answer: Answer::new(&self.tokenizer, &request),
                tokens: request.tokens.clone(),
                prompt_len: request.tokens.len(),
                checkpoints: self.checkpoints(&request.tokens),
                request,
                sequence,
                reading: None,
                cached: None,
                shared: 0,
                started: self.clock.now(),
                ahead: false,
                together: Together::default(),
                redo: None,
                rows: 0,
                finished: None,
                guesses: Guesses::new(off, self.speculation.usual()),
                draft: None,
            });
        }
        self.make_room();
    }
}
