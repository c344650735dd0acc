//! The place of the model: what is loaded there, how it came, and how it comes again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use mlx_engine_core::{
    Backend, EngineError, EngineStatistics, EventStream, FallbackPolicy, GenerateParams, LlmEngine,
    ModelConfiguration, Prompt,
};
use mlx_engine_engine::{Engine, EngineConfig, MockScript, ProgressFn, SpeculationConfig};
use mlx_engine_registry::ModelRegistry;
use mlx_engine_resilience::{Recover, RecoveryStep};

#[cfg(unix)]
use crate::apart::{Apart, Setup};
use crate::served::Served;

/// Which backend to load a model on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// MLX, and the mock where the [`FallbackPolicy`] allows it.
    #[default]
    Auto,
    /// MLX or an error.
    Mlx,
    /// The mock.
    Mock,
}

/// How models are loaded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub(crate) config: EngineConfig,
    pub(crate) choice: BackendChoice,
    pub(crate) fallback: FallbackPolicy,
    pub(crate) mock: MockScript,
    /// What recovery may serve from in place of the model.
    pub(crate) fallback_model: Option<String>,
    pub(crate) registry: Option<Arc<ModelRegistry>>,
    /// Whether a model may be fetched, and from where.
    #[cfg(all(feature = "hub", feature = "mlx"))]
    pub(crate) fetch: crate::FetchPolicy,
    #[cfg(all(feature = "hub", feature = "mlx"))]
    pub(crate) hub: Option<crate::hub::Hub>,
    /// Where the engine is to have a process of its own.
    #[cfg(unix)]
    pub(crate) apart: Option<Apart>,
}

/// Where one model is loaded at a time.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    state: Mutex<State>,
    /// What was loaded last, and how, until it is unloaded: recovery loads it again.
    last: Mutex<Option<(String, Settings)>>,
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

impl Settings {
    /// Loads on the backend that choice and policy lead to.
    async fn choose(
        &self,
        model: &str,
        progress: Option<ProgressFn>,
    ) -> Result<(Served, Option<String>), EngineError> {
        if self.choice == BackendChoice::Mock {
            return Ok((self.load_mock(model).await?, None));
        }
        let error = match self.load_mlx(model, progress).await {
            Ok(engine) => return Ok((engine, None)),
            Err(error) => error,
        };
        let allowed = match self.fallback {
            _ if self.choice == BackendChoice::Mlx => false,
            FallbackPolicy::Never => false,
            FallbackPolicy::WhenMlxUnavailable => matches!(error, EngineError::MlxUnavailable { .. }),
            FallbackPolicy::OnLoadFailure => !matches!(error, EngineError::Cancelled),
        };
        if !allowed {
            return Err(error);
        }
        let reason = chain(&error);
        tracing::warn!(model, reason, "the mock stands in for the model");
        Ok((self.load_mock(model).await?, Some(reason)))
    }

    async fn load_mock(&self, model: &str) -> Result<Served, EngineError> {
        #[cfg(unix)]
        if let Some(apart) = &self.apart {
            let setup = Setup::Mock {
                name: model.to_owned(),
                script: Box::new(self.mock.clone()),
                config: self.config.clone(),
            };
            return Ok(apart.start(&setup, None).await?.into());
        }
        Ok(Engine::mock(model, self.mock.clone(), self.config.clone())
            .await?
            .into())
    }

    #[cfg(feature = "mlx")]
    async fn load_mlx(&self, model: &str, progress: Option<ProgressFn>) -> Result<Served, EngineError> {
        #[cfg(feature = "hub")]
        let mut progress = progress;
        // A model that does not exist is an error on every backend: the mock must not stand in for it.
        #[cfg(feature = "hub")]
        let location = self.found(model, &mut progress).await?;
        #[cfg(not(feature = "hub"))]
        let location = crate::locate(model, self.registry())?;
        let (path, known, mut config) = (location.path, location.configuration, self.config.clone());
        if let SpeculationConfig::Draft(draft) = &mut config.speculation {
            #[cfg(feature = "hub")]
            let location = self.found(&draft.model, &mut progress).await?;
            #[cfg(not(feature = "hub"))]
            let location = crate::locate(&draft.model, self.registry())?;
            draft.model = location.path.display().to_string();
        }
        #[cfg(unix)]
        if let Some(apart) = &self.apart {
            let setup = Setup::Mlx {
                path,
                configuration: known.map(Box::new),
                config,
            };
            return Ok(apart.start(&setup, progress).await?.into());
        }
        Ok(load_here(path, known, config, progress).await?.into())
    }

    #[cfg(not(feature = "mlx"))]
    #[expect(clippy::unused_async, reason = "it stands for the one that loads")]
    async fn load_mlx(&self, _model: &str, _progress: Option<ProgressFn>) -> Result<Served, EngineError> {
        match crate::platform().require_mlx() {
            Err(error) => Err(error),
            Ok(()) => Err(EngineError::internal(
                "this build has no MLX and says that it has",
            )),
        }
    }

    /// The model's files, fetched where they are not here and may be.
    #[cfg(all(feature = "mlx", feature = "hub"))]
    async fn found(
        &self,
        model: &str,
        progress: &mut Option<ProgressFn>,
    ) -> Result<crate::ModelLocation, EngineError> {
        // What cannot run here is not fetched.
        let runs = crate::platform().require_mlx().is_ok() && mlx_engine_engine::mlx_device().is_ok();
        if self.fetch == crate::FetchPolicy::Never || !runs {
            return crate::locate(model, self.registry());
        }
        crate::fetch::find_or_fetch_with_progress(model, self.registry(), self.hub.as_ref(), progress).await
    }

    /// The registry that names are looked up in.
    pub(crate) fn registry(&self) -> &ModelRegistry {
        self.registry
            .as_deref()
            .unwrap_or_else(|| ModelRegistry::builtin())
    }
}

/// Loads a model on MLX in this process.
#[cfg(feature = "mlx")]
pub(crate) async fn load_here(
    path: std::path::PathBuf,
    known: Option<ModelConfiguration>,
    mut config: EngineConfig,
    progress: Option<ProgressFn>,
) -> Result<Engine, EngineError> {
    crate::platform().require_mlx()?;
    mlx_engine_engine::mlx_device()?;
    // What the system says is a limit where the device uses its memory.
    if config.memory_limit.is_none() && crate::platform().device != mlx_engine_core::Device::Cuda {
        config.memory_limit = crate::platform::available_memory();
    }
    mlx_engine_engine::load_mlx(path, known, config, progress).await
}

impl Slot {
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
            retire(&engine).await?;
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

/// Ends an engine, and gives it up where it hangs.
async fn retire(engine: &Served) -> Result<(), EngineError> {
    if let Ok(unloaded) = tokio::time::timeout(UNLOAD_LIMIT, engine.unload()).await {
        return unloaded;
    }
    tracing::error!("the engine does not end and is given up, its memory stays taken");
    engine.abandon();
    Ok(())
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
                (RecoveryStep::ReloadModel, _, Some((model, settings))) => self.again(&model, settings).await,
                (RecoveryStep::FallBack, _, Some((model, settings))) => {
                    self.fall_back(&model, settings).await
                }
                _ => Err(EngineError::internal(format!("the engine cannot {step}"))),
            }
        })
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
        let loaded = self.load(&model, &changed, None).await;
        if loaded.is_err() {
            *self.last() = Some((model, settings));
        }
        loaded.map(drop)
    }

    /// Loads what was loaded last.
    async fn again(&self, model: &str, settings: Settings) -> Result<(), EngineError> {
        let loaded = self.load(model, &settings, None).await;
        if loaded.is_err() {
            // It may be tried again.
            *self.last() = Some((model.to_owned(), settings));
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
        let loaded = self.load(&name, &instead, None).await;
        // The next recovery is about the model that was asked for.
        *self.last() = Some((model.to_owned(), settings));
        loaded?;
        tracing::warn!(model, instead = name, "recovery fell back");
        if let State::Loaded { fallback_reason, .. } = &mut *self.state() {
            *fallback_reason = Some(format!("`{model}` could not be brought back"));
        }
        Ok(())
    }
}

/// An error with its sources, in one line.
fn chain(error: &EngineError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
