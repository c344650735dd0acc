//! The thread that runs processes, one after the other, until the engine is unloaded.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use mlx_engine_core::ProgressFn;
use serde_json::Value;

use super::configuration::RestartPolicy;
use super::launch::Launch;
use super::shared::Shared;
use super::status::{ChildState, lost};

impl Shared {
    /// Runs processes, one after the other, until the engine is unloaded.
    pub(super) fn supervise(
        &self,
        mut launch: Box<dyn Launch>,
        setup: &Value,
        mut progress: Option<ProgressFn>,
    ) {
        let origin = Instant::now();
        let mut policy = RestartPolicy::new(self.configuration.clone());
        loop {
            let end = self.run(&mut *launch, setup, progress.take());
            let error = end.failure.unwrap_or_else(|| lost(&end.how));
            let mut state = self.lock();
            if state.stopping {
                return;
            }
            if !state.restart {
                state.last_end = Some(end.how.clone());
            }
            state.requests.lost(&lost(&end.how));
            self.tell_who_drains(&state);
            if state.starts == 1 && !end.was_ready {
                self.stage(&state, ChildState::GivenUp, Some(error));
                return;
            }
            let mut wait = policy.ended(origin.elapsed());
            if state.restart {
                policy.forgive();
                wait = Some(Duration::ZERO);
            }
            if let Some(wait) = wait {
                tracing::warn!(
                    end = end.how,
                    ?wait,
                    "the engine's process ended and is started again"
                );
                self.stage(&state, ChildState::Waiting, None);
            } else {
                tracing::error!(
                    end = end.how,
                    "the engine's process ended too often and stays ended"
                );
                state.requests.fail_all(&error);
                self.tell_who_drains(&state);
                self.stage(&state, ChildState::GivenUp, Some(error));
            }
            let until = wait.map(|wait| Instant::now() + wait);
            while !state.stopping && !state.restart {
                state = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                    Some(Duration::ZERO) => break,
                    Some(left) => {
                        let woken = self.changed.wait_timeout(state, left);
                        woken.unwrap_or_else(PoisonError::into_inner).0
                    }
                    None => {
                        let woken = self.changed.wait(state);
                        woken.unwrap_or_else(PoisonError::into_inner)
                    }
                };
            }
            if state.stopping {
                return;
            }
            if wait.is_none() {
                policy.forgive();
            }
        }
    }
}

/// Marks the end of the supervisor's thread, however it comes.
pub(super) struct Over<'a>(pub(super) &'a Shared);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.over = true;
        state.ready = None;
        state.link = None;
        let error = state.not_loaded();
        state.requests.fail_all(&error);
        let given_up = self.0.stage.borrow().error.clone();
        self.0.stage(&state, ChildState::Unloaded, given_up);
        drop(state);
        self.0.changed.notify_all();
    }
}
