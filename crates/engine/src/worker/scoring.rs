//! Texts whose probabilities are computed, between the steps of those that are answered. They wait for their turn, hold a place
//! and take memory as those do.

use mlx_engine_core::{EngineError, Priority};
use tokio::sync::oneshot;

use super::{Worker, guarded};
use crate::TokenModel;
use crate::clock::Clock;
use crate::engine::Score;
use crate::scheduler::{Ask, Chunk, Id, Work};

/// The way back to who wants a score.
pub(crate) type Reply = oneshot::Sender<Result<Score, EngineError>>;

/// A text that is scored, or will be.
pub(super) struct Job<S> {
    id: Id,
    tokens: Vec<u32>,
    /// Once it is admitted.
    sequence: Option<S>,
    logprobs: Vec<Option<f32>>,
    reply: Reply,
}

impl<S> Job<S> {
    // Who asked may have gone.
    fn fail(self, error: EngineError) {
        let _ = self.reply.send(Err(error));
        // A sequence that is half written may not even be dropped in peace.
        let _ = guarded(|| {
            drop(self.sequence);
            Ok(())
        });
    }
}

/// The texts, in the order in which they came.
pub(super) struct Scoring<S>(Vec<Job<S>>);

impl<S> Scoring<S> {
    pub(super) fn new() -> Self {
        Self(Vec::new())
    }

    /// Bytes that the texts take that are being computed.
    pub(super) fn bytes<M: TokenModel<Sequence = S>>(&self, model: &M) -> u64 {
        let sequences = self.0.iter().filter_map(|job| job.sequence.as_ref());
        sequences
            .map(|sequence| model.sequence_bytes(model.len(sequence)))
            .sum()
    }

    /// How many are being computed, and how many wait.
    pub(super) fn counts(&self) -> (usize, usize) {
        let running = self.0.iter().filter(|job| job.sequence.is_some()).count();
        (running, self.0.len() - running)
    }

    pub(super) fn has(&self, id: Id) -> bool {
        self.0.iter().any(|job| job.id == id)
    }

    /// Those for which nobody waits any more.
    pub(super) fn given_up(&self) -> impl Iterator<Item = Id> {
        self.0
            .iter()
            .filter(|job| job.reply.is_closed())
            .map(|job| job.id)
    }

    pub(super) fn remove(&mut self, id: Id) -> Option<Job<S>> {
        let at = self.0.iter().position(|job| job.id == id)?;
        Some(self.0.remove(at))
    }

    /// Ends those that are being computed, and those that wait too where all is over. Gives their numbers.
    pub(super) fn fail(&mut self, error: &EngineError, all: bool) -> Vec<Id> {
        let over = |job: &mut Job<S>| all || job.sequence.is_some();
        let jobs = self.0.extract_if(.., over);
        jobs.map(|job| {
            let id = job.id;
            job.fail(error.clone());
            id
        })
        .collect()
    }
}

impl<M: TokenModel, C: Clock> Worker<M, C> {
    /// Puts a text into the queue.
    pub(super) fn submit_score(&mut self, tokens: Vec<u32>, reply: Reply) {
        let ask = Ask {
            id: self.submitted,
            prompt: tokens.len(),
            cuts: Vec::new(),
            work: Work::Score,
            bytes: self.model.sequence_bytes(tokens.len()),
            priority: Priority::Normal,
            arrived: self.clock.now(),
            queue_limit: None,
            limit: None,
        };
        let id = ask.id;
        let taken = if tokens.is_empty() {
            Err(EngineError::EmptyPrompt)
        } else {
            self.enqueue(ask)
        };
        match taken {
            Ok(()) => {
                self.scoring.0.push(Job {
                    id,
                    tokens,
                    sequence: None,
                    logprobs: vec![None],
                    reply,
                });
                self.note();
            }
            Err(error) => _ = reply.send(Err(error)),
        }
    }

    /// A text comes to its turn, with a sequence, or cannot.
    pub(super) fn admit_score(&mut self, id: Id, opened: Result<M::Sequence, EngineError>) {
        match opened {
            Ok(sequence) => {
                if let Some(job) = self.scoring.0.iter_mut().find(|job| job.id == id) {
                    job.sequence = Some(sequence);
                }
            }
            Err(error) => self.end_score(id, Err(error)),
        }
    }

    /// Takes a text a part further.
    pub(super) fn score(&mut self, chunk: Chunk) {
        let Self { model, scoring, .. } = self;
        let job = scoring.0.iter_mut().find(|job| job.id == chunk.id);
        let Some(Job {
            tokens,
            sequence: Some(sequence),
            logprobs,
            ..
        }) = job
        else {
            self.scheduler.cancel(chunk.id);
            return;
        };
        let next = &tokens[chunk.from + 1..tokens.len().min(chunk.to + 1)];
        match guarded(|| model.score(sequence, &tokens[chunk.from..chunk.to], next)) {
            Ok(found) => {
                logprobs.extend(found.into_iter().map(Some));
                self.scheduler.scored(chunk);
                if chunk.last {
                    // While it is there: what it took is no workspace.
                    self.measure(false);
                    self.end_score(chunk.id, Ok(()));
                }
            }
            Err(error) => {
                if matches!(error, EngineError::OutOfMemory) {
                    // What is only kept makes room.
                    self.prefixes.clear();
                }
                self.end_score(chunk.id, Err(error));
            }
        }
    }

    fn end_score(&mut self, id: Id, end: Result<(), EngineError>) {
        self.scheduler.cancel(id);
        let Some(job) = self.scoring.remove(id) else {
            return;
        };
        // What is written down is true when the caller hears of the end.
        self.note();
        match end {
            Ok(()) => {
                let Job {
                    tokens,
                    logprobs,
                    reply,
                    ..
                } = job;
                let _ = reply.send(Ok(Score { tokens, logprobs }));
            }
            Err(error) => job.fail(error),
        }
    }
}
