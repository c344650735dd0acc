//! A model that fails as planned.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use mlx_engine_core::{EngineError, GenerateParams};

use super::plan::{Plan, Point, VICTIM};
use crate::engine::Loaded;
use crate::{Chosen, Feed, FeedError, TokenModel};

/// A model that fails as planned.
pub(super) struct Faulty<M> {
    model: M,
    plan: Arc<Plan>,
}

impl<M: TokenModel> TokenModel for Faulty<M> {
    type Sequence = M::Sequence;

    fn context_length(&self) -> usize {
        self.model.context_length()
    }

    fn open(&mut self) -> M::Sequence {
        self.model.open()
    }

    fn len(&self, sequence: &M::Sequence) -> usize {
        self.model.len(sequence)
    }

    fn truncate(&mut self, sequence: &mut M::Sequence, len: usize) -> bool {
        // There is no error to return: it can only panic.
        assert!(self.plan.due(Point::Truncate).is_none(), "told to panic");
        self.model.truncate(sequence, len)
    }

    fn undo(&mut self, sequence: &mut M::Sequence, len: usize) -> bool {
        !self.plan.forgets.load(Ordering::Relaxed) && self.model.undo(sequence, len)
    }

    fn fork(&mut self, sequence: &mut M::Sequence, len: usize) -> Result<Option<M::Sequence>, EngineError> {
        self.model.fork(sequence, len)
    }

    fn forks_anywhere(&self) -> bool {
        self.model.forks_anywhere()
    }

    fn takes_back(&self) -> usize {
        self.model.takes_back()
    }

    fn shared_bytes(&self, len: usize) -> u64 {
        self.model.shared_bytes(len)
    }

    fn can_look_ahead(&self, sequence: &M::Sequence) -> bool {
        self.model.can_look_ahead(sequence)
    }

    fn batch_limit(&self) -> usize {
        self.model.batch_limit()
    }

    fn feed(&mut self, batch: &mut [Feed<'_, M::Sequence>]) -> Result<(), FeedError> {
        for (index, feed) in batch.iter().enumerate() {
            let point = if feed.choices == 0 {
                Point::Prefill
            } else {
                Point::Step(feed.number)
            };
            if feed.params.seed == Some(VICTIM) {
                self.plan.meet(point).map_err(|error| FeedError {
                    error,
                    culprit: (!self.plan.hides.load(Ordering::Relaxed)).then_some(index),
                })?;
            }
        }
        self.model.feed(batch)
    }

    fn read(
        &mut self,
        sequence: &mut M::Sequence,
        params: &GenerateParams,
        tokens: &[u32],
        prompt_len: usize,
        mask: &mut dyn FnMut(&mut [f32]),
    ) -> Result<Chosen, EngineError> {
        if params.seed == Some(VICTIM) {
            self.plan.meet(Point::Read)?;
            self.plan
                .meet(Point::ReadAt((tokens.len() - prompt_len) as u64))?;
        }
        self.model.read(sequence, params, tokens, prompt_len, mask)
    }

    fn score(
        &mut self,
        sequence: &mut M::Sequence,
        tokens: &[u32],
        next: &[u32],
    ) -> Result<Vec<f32>, EngineError> {
        self.model.score(sequence, tokens, next)
    }

    fn sequence_bytes(&self, tokens: usize) -> u64 {
        assert!(self.plan.due(Point::Bytes).is_none(), "told to panic");
        self.model.sequence_bytes(tokens)
    }

    fn peak_memory_bytes(&self) -> u64 {
        self.model.peak_memory_bytes()
    }

    fn clear_caches(&mut self) -> Result<(), EngineError> {
        self.model.clear_caches()
    }

    fn has_stream(&self) -> bool {
        self.model.has_stream()
    }

    fn rebuild_stream(&mut self) -> Result<(), EngineError> {
        self.model.rebuild_stream()
    }
}

/// Puts what is planned under a model.
pub(super) fn faulty<M>(loaded: Loaded<M>, plan: Arc<Plan>) -> Loaded<Faulty<M>> {
    let Loaded {
        model,
        draft,
        configuration,
        encoder,
        backend,
        device,
    } = loaded;
    *plan.loads.lock().expect("not poisoned") += 1;
    if *plan.loads.lock().expect("not poisoned") > 1 {
        *plan.fault.lock().expect("not poisoned") = None;
    }
    Loaded {
        draft: draft.map(|model| Faulty {
            model,
            plan: Arc::clone(&plan),
        }),
        model: Faulty { model, plan },
        configuration,
        encoder,
        backend,
        device,
    }
}
