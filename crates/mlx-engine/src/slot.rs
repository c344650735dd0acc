//! The place of the model: what is loaded there, and how it comes and goes.

mod recovery;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use mlx_engine_core::{
    Backend, EngineError, EngineStatistics, EventStream, GenerateParams, LlmEngine, ModelConfiguration,
    ProgressFn, Prompt,
};
use mlx_engine_engine::EngineConfig;

use crate::served::Served;
use crate::settings::Settings;

/// Where one model is loaded at a time.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    state: Mutex<State>,
    /// What was loaded last, and how, until it is unloaded: recovery loads it again.
    last: Mutex<Option<(String, Settings)>>,
    /// How often somebody has loaded a model.
    renewals: AtomicU64,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Empty,
    Loading {
        model: String,
    },
    Loaded {
        engine: Served,
        /// Why the mock stands in for the model, where it does.
        fallback_reason: Option<String>,
    },
}

/// Puts the state back where a load fails or is dropped.
struct LoadGuard<'a>(Option<&'a Mutex<State>>);

impl LoadGuard<'_> {
    /// The load is over: what is `Loading` from now on is another one.
    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for LoadGuard<'_> {
    fn drop(&mut self) {
        if let Some(state) = self.0 {
            *state.lock().unwrap_or_else(PoisonError::into_inner) = State::Empty;
        }
    }
}

impl Slot {
    /// Somebody has loaded a model, and not recovery the same one again.
    pub(crate) fn renew(&self) {
        self.renewals.fetch_add(1, Ordering::Relaxed);
    }

    /// The configuration of the model that was loaded last, until it is unloaded.
    pub(crate) fn config(&self) -> Option<EngineConfig> {
        let last = self.last();
        last.as_ref().map(|(_, settings)| settings.config.clone())
    }

    /// Loads with this configuration from now on where recovery loads the model again.
    pub(crate) fn keep_config(&self, config: &EngineConfig) {
        if let Some((_, settings)) = &mut *self.last() {
            settings.config = config.clone();
        }
    }

    /// Loads a model in place of the one that is there.
    pub(crate) async fn load(
        &self,
        model: &str,
        settings: &Settings,
        progress: Option<ProgressFn>,
    ) -> Result<Arc<ModelConfiguration>, EngineError> {
        let previous = {
            let mut state = self.state();
            if let State::Loading { model } = &*state {
                return Err(EngineError::LoadInProgress { model: model.clone() });
            }
            std::mem::replace(
                &mut *state,
                State::Loading {
                    model: model.to_owned(),
                },
            )
        };
        let mut guard = LoadGuard(Some(&self.state));
        *self.last() = None;
        if let State::Loaded { engine, .. } = previous {
            // Two models at once might not fit.
            retire(&engine).await;
        }
        let (engine, fallback_reason) = settings.choose(model, progress).await?;
        let configuration = engine
            .model()
            .ok_or_else(|| EngineError::internal("a model was loaded and is gone"))?;
        *self.last() = Some((model.to_owned(), settings.clone()));
        let mut state = self.state();
        *state = State::Loaded {
            engine,
            fallback_reason,
        };
        guard.disarm();
        drop(state);
        Ok(configuration)
    }

    /// Has nothing loaded any more where it has this engine.
    pub(crate) fn forget(&self, engine: &Served) {
        let mut state = self.state();
        if matches!(&*state, State::Loaded { engine: loaded, .. } if loaded.is(engine)) {
            *self.last() = None;
            *state = State::Empty;
        }
    }

    /// The loaded engine.
    pub(crate) fn engine(&self) -> Result<Served, EngineError> {
        match &*self.state() {
            State::Loaded { engine, .. } => Ok(engine.clone()),
            State::Loading { model } => Err(EngineError::LoadInProgress { model: model.clone() }),
            State::Empty => Err(EngineError::NotLoaded {
                model: "none".to_owned(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last(&self) -> MutexGuard<'_, Option<(String, Settings)>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long an engine may take over its last step before it counts as hanging, and the next is loaded beside it.
const UNLOAD_LIMIT: Duration = Duration::from_secs(30);

/// Ends an engine, and gives it up where it hangs. One that is broken must not be in the way of the next.
async fn retire(engine: &Served) {
    match tokio::time::timeout(UNLOAD_LIMIT, engine.unload()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the engine could not be unloaded"),
        Err(_) => {
            tracing::error!("the engine does not end and is given up, its memory stays taken");
            engine.abandon();
        }
    }
}

impl LlmEngine for Slot {
    fn stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        Box::pin(async move { self.engine()?.stream(prompt, params).await })
    }

    fn backend(&self) -> Option<Backend> {
        self.engine().ok()?.backend()
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        self.engine().ok()?.model()
    }

    fn fallback_reason(&self) -> Option<String> {
        match &*self.state() {
            State::Loaded { fallback_reason, .. } => fallback_reason.clone(),
            _ => None,
        }
    }

    fn is_apart(&self) -> bool {
        self.engine().is_ok_and(|engine| engine.is_apart())
    }

    fn abandon(&self) {
        if let Ok(engine) = self.engine() {
            engine.abandon();
        }
    }

    fn statistics(&self) -> Option<EngineStatistics> {
        self.engine().ok()?.statistics()
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async move {
            let previous = {
                let mut state = self.state();
                if let State::Loading { model } = &*state {
                    return Err(EngineError::LoadInProgress { model: model.clone() });
                }
                *self.last() = None;
                std::mem::take(&mut *state)
            };
            match previous {
                State::Loaded { engine, .. } => engine.unload().await,
                _ => Ok(()),
            }
        })
    }
}

#[cfg(all(test, unix))]
mod tests;
