//! How models are loaded: from where, on which backend, in which process.

use std::sync::Arc;

#[cfg(feature = "mlx")]
use mlx_engine_core::ModelConfiguration;
use mlx_engine_core::{EngineError, FallbackPolicy, ProgressFn};
use mlx_engine_engine::{Engine, EngineConfig, MockScript};
#[cfg(feature = "mlx")]
use mlx_engine_engine::{MemoryFit, SpeculationConfig};
use mlx_engine_registry::ModelRegistry;

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

impl Settings {
    /// Loads on the backend that choice and policy lead to.
    pub(crate) async fn choose(
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

    /// Has the configuration fit a model into the memory that there is, and says what was chosen.
    #[cfg(feature = "mlx")]
    pub(crate) fn fit(&mut self, model: &str, available: Option<u64>) -> Result<MemoryFit, EngineError> {
        crate::platform().require_mlx()?;
        let needs = |model: &str| {
            let location = crate::locate(model, self.registry())?;
            mlx_engine_engine::memory_needs(&location.path, &self.config)
        };
        let mut needed = needs(model)?;
        if let SpeculationConfig::Draft(draft) = &self.config.speculation {
            needed = needed.with_draft(&needs(&draft.model)?);
        }
        let available = available.or(self.config.memory_limit).or_else(memory_of_models);
        let available = available.ok_or_else(|| EngineError::Unsupported {
            message: "nobody knows how much memory there is for models".to_owned(),
            hint: Some("say how much of the device's memory they may take".to_owned()),
        })?;
        let (config, fit) = self.config.clone().fit(&needed, available)?;
        self.config = config;
        Ok(fit)
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
    config.memory_limit = config.memory_limit.or_else(memory_of_models);
    mlx_engine_engine::load_mlx(path, known, config, progress).await
}

/// What the system has available, where models use its memory.
#[cfg(feature = "mlx")]
fn memory_of_models() -> Option<u64> {
    let shared = crate::platform().device != mlx_engine_core::Device::Cuda;
    crate::platform::available_memory().filter(|_| shared)
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
