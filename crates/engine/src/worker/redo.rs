//! Steps that are run again, each alone, as a step of several requests has failed: then it is known whose fault it was.

use mlx_engine_core::EngineError;

use super::active::{Active, Row};
use super::turn::{Failed, standing};
use super::{Worker, guarded};
use crate::clock::Clock;
use crate::scheduler::Id;
use crate::{Feed, TokenModel};

impl<M: TokenModel, C: Clock> Worker<M, C> {
    /// Runs the steps again that failed with others, now that the tokens are known that they are fed, and ends those requests
    /// whose step fails alone too.
    pub(super) fn redo(&mut self, due: &[Id], failed: &mut Failed) {
        let Self {
            model,
            active,
            prefixes,
            gauges,
            ..
        } = self;
        let mut ended = Failed::new();
        for active in standing(active, due, failed) {
            let Some(error) = active.redo.take().filter(|_| active.finished.is_none()) else {
                continue;
            };
            tracing::debug!(%error, request = active.id, "a step is run again");
            if matches!(error, EngineError::OutOfMemory) {
                // What is only kept makes room.
                prefixes.clear();
            }
            gauges.redone();
            // The last token is fed by the step.
            let row = Row::read(active, active.tokens.len() - 1);
            match guarded(|| alone(model, active, &row)) {
                Ok(()) => (active.rows, active.ahead, active.together.begun) = (row.len(), true, false),
                Err(error) => ended.push((active.id, error)),
            }
        }
        failed.append(&mut ended);
    }
}

/// Feeds a row in a step of its own. What a step that failed has left is taken back first, so that nothing is fed twice;
/// where that cannot be, all before is computed anew.
pub(super) fn alone<M: TokenModel>(
    model: &mut M,
    active: &mut Active<M::Sequence>,
    row: &Row,
) -> Result<(), EngineError> {
    if !model.undo(&mut active.sequence, row.from) {
        active.sequence = model.open();
        for chunk in active.tokens[..row.from].chunks(model.prefill_chunk().max(1)) {
            let feed = Feed {
                sequence: &mut active.sequence,
                params: &active.request.params,
                tokens: Some(chunk),
                choices: 0,
                number: 0,
                before: &[],
                prompt_len: active.prompt_len,
            };
            model.feed(&mut [feed]).map_err(|fault| fault.error)?;
        }
    }
    model.feed(&mut [row.feed(active)]).map_err(|fault| fault.error)
}
