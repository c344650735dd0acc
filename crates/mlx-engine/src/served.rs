//! What serves requests: an engine of this process, or one in a process of its own.

use std::sync::Arc;

use futures::future::BoxFuture;
use mlx_engine_core::{
    Backend, Device, EngineError, EventStream, GenerateParams, LlmEngine, ModelConfiguration, Prompt,
};
use mlx_engine_engine::{Engine, Score};
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
    fn engine(&self) -> &dyn LlmEngine {
        match self {
            Self::Here(engine) => engine,
            #[cfg(unix)]
            Self::Apart(engine) => engine,
        }
    }

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

    pub(crate) async fn score(&self, text: &str) -> Result<Score, EngineError> {
        match self {
            Self::Here(engine) => engine.score(text).await,
            #[cfg(unix)]
            Self::Apart(engine) => apart::score(engine, text).await,
        }
    }
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

impl LlmEngine for Served {
    fn stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        self.engine().stream(prompt, params)
    }

    fn backend(&self) -> Option<Backend> {
        self.engine().backend()
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        self.engine().model()
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        self.engine().unload()
    }
}
