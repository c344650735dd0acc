//! What of the memory is for sequences.

use crate::TokenModel;
use crate::config::EngineConfig;
use crate::fit::{TIGHT, TIGHT_CHUNK};

/// The memory of an engine: its limit, and what is taken before any sequence is.
#[derive(Debug)]
pub(super) struct Memory {
    /// What the weights leave of the limit; no limit where `None`.
    beside_weights: Option<u64>,
    weights: u64,
    /// The workspace of a step as it was estimated.
    estimated: u64,
    /// The same as it was measured last.
    workspace: u64,
    /// The most bytes that sequences have taken at once.
    most_held: u64,
}

impl Memory {
    /// What a model and the one that guesses for it leave, and the tokens of a prompt that are fed at once.
    pub(super) fn new<M: TokenModel>(model: &M, draft: Option<&M>, config: &EngineConfig) -> (Self, usize) {
        let weights = model.weight_bytes() + draft.map_or(0, TokenModel::weight_bytes);
        let beside_weights = config.memory_limit.map(|limit| limit.saturating_sub(weights));
        let chunk = config.prefill_chunk.unwrap_or_else(|| {
            let preferred = model.prefill_chunk();
            let workspace = model.workspace_bytes(preferred, 1);
            let tight = beside_weights.is_some_and(|bytes| workspace > bytes / TIGHT);
            preferred.min(if tight { TIGHT_CHUNK } else { usize::MAX })
        });
        // A step has logits for guesses too.
        let guesses = config.speculation.room(model.batch_limit());
        let estimated = model.workspace_bytes(chunk, config.max_batch + guesses);
        let estimated = estimated + draft.map_or(0, |draft| draft.workspace_bytes(chunk, config.max_batch));
        let memory = Self {
            beside_weights,
            weights,
            estimated,
            workspace: estimated,
            most_held: 0,
        };
        (memory, chunk)
    }

    /// Bytes for sequences; no limit where `None`.
    pub(super) fn available(&self) -> Option<u64> {
        Some(self.beside_weights?.saturating_sub(self.workspace))
    }

    /// Notes what sequences take: in every turn, as what all have taken at most has that of each of them in it.
    pub(super) fn hold(&mut self, held: u64) {
        self.most_held = self.most_held.max(held);
    }

    /// Goes on from what was known before a configuration was changed.
    pub(super) fn after(self, before: &Self) -> Self {
        Self {
            most_held: before.most_held,
            ..self
        }
    }

    /// Corrects the estimate of the workspace by what all have taken at most. Half of the estimate is kept in any case: the
    /// largest step may not have been run yet.
    pub(super) fn measure(&mut self, most: Option<u64>) {
        if let Some(most) = most {
            let found = most.saturating_sub(self.weights).saturating_sub(self.most_held);
            self.workspace = found.max(self.estimated / 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MockScript;

    fn memory(memory_limit: Option<u64>, script: MockScript) -> (Memory, usize) {
        let config = EngineConfig {
            memory_limit,
            ..EngineConfig::default()
        };
        Memory::new(&script.load().unwrap(), None, &config)
    }

    #[test]
    fn the_workspace_is_corrected_by_what_was_measured() {
        let (mut memory, chunk) = memory(Some(1000), MockScript::default().with_workspace(200, 0));
        assert_eq!((memory.available(), chunk), (Some(800), 2048));
        memory.hold(50);
        memory.measure(None);
        assert_eq!(memory.available(), Some(800));
        memory.hold(30);
        memory.measure(Some(550));
        assert_eq!(memory.available(), Some(500));
        memory.measure(Some(60));
        assert_eq!(memory.available(), Some(900), "half of the estimate stays");
    }

    #[test]
    fn a_chunk_is_smaller_where_memory_is_tight() {
        let tight = MockScript::default().with_workspace(300, 0);
        assert_eq!(memory(Some(1000), tight.clone()).1, 512);
        assert_eq!(memory(None, tight).1, 2048);
        assert_eq!(memory(None, MockScript::default()).0.available(), None);
    }
}
