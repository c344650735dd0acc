//! What keeps a worker well, beside requests: what it writes down of itself, what can be done for it, and how it goes on
//! after a panic.

use std::sync::PoisonError;

use mlx_engine_core::EngineError;

use super::command::Maintenance;
use super::{Worker, guarded, limits};
use crate::TokenModel;
use crate::clock::Clock;
use crate::gauges::Load;
use crate::prefix::PrefixCache;

impl<M: TokenModel, C: Clock> Worker<M, C> {
    /// Writes down what there is.
    pub(super) fn note(&self) {
        let (scored, to_score) = self.scoring.counts();
        self.gauges.load(Load {
            queued: self.waiting.len() + to_score,
            running: self.active.len() + scored,
            kv_reserved_bytes: self.scheduler.reserved(),
            prefix_cache_bytes: self.prefixes.bytes(),
            prefix_cache_sequences: self.prefixes.len(),
        });
    }

    pub(super) fn maintain(&mut self, what: Maintenance) -> Result<(), EngineError> {
        match what {
            Maintenance::ClearCaches => {
                self.prefixes.clear();
                guarded(|| self.model.clear_caches())
            }
            Maintenance::RebuildStream => {
                // What an old stream was to compute goes first.
                if self.model.has_stream() {
                    self.end_running(&EngineError::WorkerLost {
                        message: "its stream on the device was made anew".to_owned(),
                    });
                    self.forget();
                }
                guarded(|| self.model.rebuild_stream())
            }
            Maintenance::Reconfigure { config, now } => {
                if let Some(bytes) = config.memory_limit {
                    guarded(|| self.model.limit_memory(bytes))?;
                }
                let (memory, limits, kept) = limits(&self.model, self.speculation.draft(), &config);
                self.memory = memory.after(&self.memory);
                self.scheduler.set_limits(limits);
                self.prefixes.set_max_bytes(kept);
                self.make_room();
                *now.lock().unwrap_or_else(PoisonError::into_inner) = *config;
                Ok(())
            }
        }
    }

    /// Goes on after a panic. What runs may be half done: it ends with the error. What waits stays, and so does what is
    /// kept, where it is what it should be.
    pub(super) fn revive(&mut self, error: &EngineError) {
        self.gauges.restarted();
        self.end_running(error);
        let Self {
            model,
            prefixes,
            speculation,
            ..
        } = self;
        let sound = guarded(|| Ok(prefixes.is_sound(&speculation.pair(model))));
        if !sound.unwrap_or(false) {
            self.forget();
        }
        self.note();
    }

    /// Ends what runs with an error, and gives up what it computed.
    pub(super) fn end_running(&mut self, error: &EngineError) {
        for active in self.active.drain(..) {
            let _ = active.request.events.send(Err(error.clone()));
            // A sequence that is half written may not even be dropped in peace.
            let _ = guarded(|| {
                drop((active.sequence, active.draft));
                Ok(())
            });
        }
        // Those that run are forgotten all together.
        let _ = self.scoring.fail(error, false);
        self.scheduler.cancel_running();
        self.note();
    }

    /// Ends all that there is.
    pub(super) fn fail_all(&mut self, error: &EngineError) {
        self.end_running(error);
        for (id, request) in self.waiting.drain(..) {
            self.scheduler.cancel(id);
            let _ = request.events.send(Err(error.clone()));
        }
        for id in self.scoring.fail(error, true) {
            self.scheduler.cancel(id);
        }
        self.note();
    }

    /// Forgets all that is kept, pinned or not.
    fn forget(&mut self) {
        let fresh = PrefixCache::new(self.prefixes.max_bytes());
        let kept = std::mem::replace(&mut self.prefixes, fresh);
        self.scheduler.set_taken(0);
        let _ = guarded(|| {
            drop(kept);
            Ok(())
        });
    }
}
