//! What serves requests: an engine of this process, or one in a process of its own.

use std::sync::Arc;

use mlx_engine_core::{Device, EngineError, EngineWrapper, LlmEngine, Prompt};
use mlx_engine_engine::{Engine, EngineConfig, PrefixCacheReport, Score, UnloadMode};
#[cfg(unix)]
use mlx_engine_resilience::Supervised;

#[cfg(unix)]
use crate::apart;

/// What serves requests.
#[derive(Clone, Debug)]
pub(crate) enum Served {
    Here(Arc<Engine>),
    #[cfg(unix)]
    Apart(Arc<Supervised>),
}

impl Served {
    pub(crate) fn device(&self) -> Option<Device> {
        match self {
            Self::Here(engine) => Some(engine.device()),
            #[cfg(unix)]
            Self::Apart(engine) => Some(apart::details(engine)?.device),
        }
    }

    pub(crate) fn load_seconds(&self) -> Option<f64> {
        match self {
            Self::Here(engine) => Some(engine.load_seconds()),
            #[cfg(unix)]
            Self::Apart(engine) => Some(apart::details(engine)?.load_s),
        }
    }

    pub(crate) fn peak_memory_bytes(&self) -> Option<u64> {
        match self {
            Self::Here(engine) => Some(engine.peak_memory_bytes()),
            #[cfg(unix)]
            Self::Apart(engine) => Some(apart::details(engine)?.peak_memory_bytes),
        }
    }

    /// Schedules by this configuration from now on, and forgets what was computed and how much memory that took.
    pub(crate) async fn prepare(&self, config: &EngineConfig) -> Result<(), EngineError> {
        match self {
            Self::Here(engine) => prepare(engine, config.clone()).await,
            #[cfg(unix)]
            Self::Apart(engine) => apart::prepare(engine, config).await,
        }
    }

    pub(crate) async fn score(&self, text: &str) -> Result<Score, EngineError> {
        match self {
            Self::Here(engine) => engine.score(text).await,
            #[cfg(unix)]
            Self::Apart(engine) => apart::score(engine, text).await,
        }
    }

    pub(crate) async fn prefix_cache(&self) -> Result<PrefixCacheReport, EngineError> {
        match self {
            Self::Here(engine) => engine.prefix_cache().await,
            #[cfg(unix)]
            Self::Apart(engine) => apart::prefix_cache(engine).await,
        }
    }

    pub(crate) async fn clear_prefix_cache(&self) -> Result<u64, EngineError> {
        match self {
            Self::Here(engine) => engine.clear_prefix_cache().await,
            #[cfg(unix)]
            Self::Apart(engine) => apart::clear_prefix_cache(engine).await,
        }
    }

    pub(crate) async fn pin_prefix(&self, prompt: Prompt) -> Result<(), EngineError> {
        match self {
            Self::Here(engine) => engine.pin_prefix(prompt).await,
            #[cfg(unix)]
            Self::Apart(engine) => apart::pin_prefix(engine, &prompt).await,
        }
    }

    pub(crate) async fn unpin_prefix(&self, prompt: Prompt) -> Result<bool, EngineError> {
        match self {
            Self::Here(engine) => engine.unpin_prefix(prompt).await,
            #[cfg(unix)]
            Self::Apart(engine) => apart::unpin_prefix(engine, &prompt).await,
        }
    }

    /// Whether it is the same engine.
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Here(engine), Self::Here(other)) => Arc::ptr_eq(engine, other),
            #[cfg(unix)]
            (Self::Apart(engine), Self::Apart(other)) => Arc::ptr_eq(engine, other),
            #[cfg(unix)]
            _ => false,
        }
    }

    pub(crate) async fn unload_with(&self, mode: UnloadMode) -> Result<(), EngineError> {
        match self {
            Self::Here(engine) => engine.unload_with(mode).await,
            #[cfg(unix)]
            Self::Apart(engine) if mode == UnloadMode::Drain => engine.drain().await,
            #[cfg(unix)]
            Self::Apart(engine) => engine.unload().await,
        }
    }
}

/// See [`Served::prepare`].
pub(crate) async fn prepare(engine: &Engine, mut config: EngineConfig) -> Result<(), EngineError> {
    // Where none is told, the limit is what was there to be had at the load.
    let now = engine.config();
    config.memory_limit = config.memory_limit.or(now.memory_limit);
    // A draft model is known by where its files are.
    config.speculation = now.speculation;
    engine.reconfigure(config).await?;
    engine.clear_caches().await?;
    engine.reset_peak_memory();
    Ok(())
}

impl From<Engine> for Served {
    fn from(engine: Engine) -> Self {
        Self::Here(Arc::new(engine))
    }
}

#[cfg(unix)]
impl From<Supervised> for Served {
    fn from(engine: Supervised) -> Self {
        Self::Apart(Arc::new(engine))
    }
}

impl EngineWrapper for Served {
    type Inner = dyn LlmEngine;

    fn inner(&self) -> &(dyn LlmEngine + 'static) {
        match self {
            Self::Here(engine) => engine,
            #[cfg(unix)]
            Self::Apart(engine) => engine,
        }
    }
}
