//! How what is loaded comes again, or something else in its place.

use std::sync::atomic::Ordering;

use futures::future::BoxFuture;
use mlx_engine_core::{Backend, EngineError, FallbackPolicy, LlmEngine};
use mlx_engine_engine::{EngineConfig, SpeculationConfig};
use mlx_engine_resilience::{Recover, RecoveryStep};

use super::{Slot, State};
use crate::served::Served;
use crate::settings::{BackendChoice, Settings};

impl Recover for Slot {
    fn can(&self, step: RecoveryStep) -> bool {
        let last = self.last();
        let Some((_, settings)) = &*last else {
            // What was unloaded on purpose stays so.
            return false;
        };
        let falls_back =
            settings.fallback_model.is_some() || settings.fallback == FallbackPolicy::OnLoadFailure;
        let fallen = self.fallback_reason().is_some();
        match (step, self.engine()) {
            (RecoveryStep::ClearCaches, Ok(Served::Here(_))) => true,
            (RecoveryStep::RebuildStream, Ok(Served::Here(engine))) => engine.backend() == Some(Backend::Mlx),
            #[cfg(unix)]
            (RecoveryStep::RestartWorker, Ok(Served::Apart(engine))) => engine.can(step),
            (RecoveryStep::ReloadModel, _) => true,
            (RecoveryStep::FallBack, _) => falls_back && !fallen,
            _ => false,
        }
    }

    fn recover(&self, step: RecoveryStep) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async move {
            let last = self.last().clone();
            match (step, self.engine(), last) {
                (RecoveryStep::ClearCaches, Ok(Served::Here(engine)), _) => engine.clear_caches().await,
                (RecoveryStep::RebuildStream, Ok(Served::Here(engine)), _) => engine.rebuild_stream().await,
                #[cfg(unix)]
                (RecoveryStep::RestartWorker, Ok(Served::Apart(engine)), _) => engine.restart().await,
                (RecoveryStep::ReloadModel, _, Some((model, settings))) => {
                    let last = (model.clone(), settings.clone());
                    self.load_again(&model, &settings, last).await
                }
                (RecoveryStep::FallBack, _, Some((model, settings))) => {
                    self.fall_back(&model, settings).await
                }
                _ => Err(EngineError::unsupported(format!("the engine cannot {step}"))),
            }
        })
    }

    fn renewals(&self) -> u64 {
        self.renewals.load(Ordering::Relaxed)
    }
}

impl Slot {
    /// Loads what was loaded last with another configuration. Where that fails, the one that it had is the one that is tried
    /// next.
    pub(crate) async fn reload(&self, config: &EngineConfig) -> Result<(), EngineError> {
        let last = self.last().clone();
        let Some((model, settings)) = last else {
            return Err(EngineError::NotLoaded {
                model: "none".to_owned(),
            });
        };
        let mut changed = settings.clone();
        changed.config = config.clone();
        self.load_again(&model, &changed, (model.clone(), settings)).await
    }

    /// Loads a model, and remembers `last` where that comes to nothing, also by being dropped: recovery may try it again.
    async fn load_again(
        &self,
        model: &str,
        settings: &Settings,
        last: (String, Settings),
    ) -> Result<(), EngineError> {
        let mut kept = Kept {
            slot: self,
            last: Some(last),
        };
        let loaded = self.load(model, settings, None).await;
        if let Err(EngineError::LoadInProgress { .. }) = &loaded {
            // Whoever loads now says what was loaded last.
            kept.last = None;
        }
        loaded.map(drop)
    }

    /// Serves from a smaller model, or from the mock, in place of `model`.
    async fn fall_back(&self, model: &str, settings: Settings) -> Result<(), EngineError> {
        let (name, instead) = if let Some(smaller) = &settings.fallback_model {
            let mut instead = settings.clone();
            if matches!(instead.config.speculation, SpeculationConfig::Draft(_)) {
                // A draft model has the vocabulary of the model that was asked for.
                instead.config.speculation = SpeculationConfig::Off;
            }
            (smaller.clone(), instead)
        } else {
            let mock = Settings {
                choice: BackendChoice::Mock,
                ..settings.clone()
            };
            (model.to_owned(), mock)
        };
        let last = (model.to_owned(), settings);
        self.load_again(&name, &instead, last.clone()).await?;
        // The next recovery is about the model that was asked for.
        *self.last() = Some(last);
        tracing::warn!(model, instead = name, "recovery fell back");
        if let State::Loaded { fallback_reason, .. } = &mut *self.state() {
            *fallback_reason = Some(format!("`{model}` could not be brought back"));
        }
        Ok(())
    }
}

/// What was loaded last, while it is loaded again.
struct Kept<'a> {
    slot: &'a Slot,
    last: Option<(String, Settings)>,
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        let mut last = self.slot.last();
        if last.is_none() {
            *last = self.last.take();
        }
    }
}
