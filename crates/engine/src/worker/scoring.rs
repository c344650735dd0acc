//! Texts whose probabilities are computed, between the turns of those that are answered.

use std::collections::VecDeque;

use mlx_engine_core::EngineError;
use tokio::sync::oneshot;

use super::guarded;
use crate::TokenModel;
use crate::engine::Score;

/// Tokens that are scored at once; the logits of each are kept until they are read.
const CHUNK: usize = 128;

/// The way back to who wants a score.
pub(crate) type Reply = oneshot::Sender<Result<Score, EngineError>>;

struct Job<S> {
    tokens: Vec<u32>,
    sequence: S,
    logprobs: Vec<Option<f32>>,
    reply: Reply,
}

/// The texts, the first to come is the first.
pub(super) struct Scoring<S>(VecDeque<Job<S>>);

impl<S> Scoring<S> {
    pub(super) fn new() -> Self {
        Self(VecDeque::new())
    }

    /// Bytes that the text takes that is computed, and those behind it, of which nothing is.
    pub(super) fn bytes<M: TokenModel<Sequence = S>>(&self, model: &M) -> u64 {
        let jobs = self.0.iter();
        jobs.map(|job| model.sequence_bytes(model.len(&job.sequence)))
            .sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, tokens: Vec<u32>, sequence: S, reply: Reply) {
        self.0.push_back(Job {
            tokens,
            sequence,
            logprobs: vec![None],
            reply,
        });
    }

    /// Takes the first a chunk further. Who does not wait any more is left out.
    pub(super) fn step<M: TokenModel<Sequence = S>>(&mut self, model: &mut M) {
        while self.0.front().is_some_and(|job| job.reply.is_closed()) {
            self.0.pop_front();
        }
        let Some(mut job) = self.0.pop_front() else {
            return;
        };
        let from = job.logprobs.len() - 1;
        let to = job.tokens.len().min(from + CHUNK);
        let (tokens, next) = (
            &job.tokens[from..to],
            &job.tokens[from + 1..job.tokens.len().min(to + 1)],
        );
        match guarded(|| model.score(&mut job.sequence, tokens, next)) {
            Ok(logprobs) if to < job.tokens.len() => {
                job.logprobs.extend(logprobs.into_iter().map(Some));
                self.0.push_front(job);
            }
            Ok(logprobs) => {
                job.logprobs.extend(logprobs.into_iter().map(Some));
                let score = Score {
                    tokens: job.tokens,
                    logprobs: job.logprobs,
                };
                // The caller may have gone.
                let _ = job.reply.send(Ok(score));
            }
            Err(error) => {
                let _ = job.reply.send(Err(error));
            }
        }
    }
}
