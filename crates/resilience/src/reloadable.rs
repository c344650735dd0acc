//! An engine that can be loaded again.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::future::BoxFuture;
use mlx_engine_core::{
    Backend, EngineError, EngineStatistics, EventStream, GenerateParams, LlmEngine, ModelConfiguration,
    Prompt,
};
use tokio::time::timeout;

use crate::{Recover, RecoveryStep};

/// Loads an engine.
type Load<E> = Box<dyn Fn() -> BoxFuture<'static, Result<E, EngineError>> + Send + Sync>;

/// How long an engine may take to give its memory back before the next is loaded beside it. A worker that hangs never
/// does.
const UNLOAD_LIMIT: Duration = Duration::from_secs(10);

/// An engine and the way to load it, so that it can be replaced when it is broken.
///
/// It takes the steps [`ReloadModel`](RecoveryStep::ReloadModel) and, where
/// [`with_fall_back`](Self::with_fall_back) names one, [`FallBack`](RecoveryStep::FallBack). The engine that is
/// replaced gives its memory back first, as two models may not fit; what runs on it ends with an error. After
/// [`unload`](LlmEngine::unload) it can take no step: it stays unloaded.
///
/// ```
/// use mlx_engine_core::{EngineError, LlmEngine};
/// use mlx_engine_resilience::Reloadable;
///
/// async fn watch<E, F>(load: fn() -> F) -> Result<Reloadable<E>, EngineError>
/// where
///     E: LlmEngine,
///     F: Future<Output = Result<E, EngineError>> + Send + 'static,
/// {
///     Reloadable::load(move || Box::pin(load())).await
/// }
/// ```
pub struct Reloadable<E> {
    current: RwLock<Current<E>>,
    load: Load<E>,
    fall_back: Option<Load<E>>,
    unload_limit: Duration,
}

struct Current<E> {
    /// None while it is replaced, and where that failed.
    engine: Option<Arc<E>>,
    /// Whether it was unloaded on purpose.
    unloaded: bool,
    /// Whether it is what is fallen back to.
    fallen: bool,
    /// The name of the last model.
    model: String,
}

impl<E> fmt::Debug for Reloadable<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let model = self
            .current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .model
            .clone();
        f.debug_struct("Reloadable")
            .field("model", &model)
            .finish_non_exhaustive()
    }
}

impl<E: LlmEngine> Reloadable<E> {
    /// Loads the engine, now and whenever it has to be loaded again.
    ///
    /// # Errors
    ///
    /// Those of `load`.
    pub async fn load<F>(load: F) -> Result<Self, EngineError>
    where
        F: Fn() -> BoxFuture<'static, Result<E, EngineError>> + Send + Sync + 'static,
    {
        let engine = load().await?;
        let model = engine.model().map(|model| model.id.clone()).unwrap_or_default();
        Ok(Self {
            current: RwLock::new(Current {
                engine: Some(Arc::new(engine)),
                unloaded: false,
                fallen: false,
                model,
            }),
            load: Box::new(load),
            fall_back: None,
            unload_limit: UNLOAD_LIMIT,
        })
    }

    /// Names what to serve from where the model cannot be loaded again. Recovery goes there only where
    /// [`fall_back`](crate::RecoveryConfiguration::fall_back) allows it.
    pub fn with_fall_back<F>(mut self, load: F) -> Self
    where
        F: Fn() -> BoxFuture<'static, Result<E, EngineError>> + Send + Sync + 'static,
    {
        self.fall_back = Some(Box::new(load));
        self
    }

    /// Sets how long an engine may take to give its memory back before it is
    /// [given up](LlmEngine::abandon) and the next is loaded beside it; 10 seconds unless told.
    pub fn with_unload_limit(mut self, limit: Duration) -> Self {
        self.unload_limit = limit;
        self
    }

    /// The engine that serves now, if one does.
    pub fn engine(&self) -> Option<Arc<E>> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.engine.clone()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Current<E>) -> T) -> T {
        change(&mut self.current.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn not_loaded(&self) -> EngineError {
        EngineError::NotLoaded {
            model: self.change(|current| current.model.clone()),
        }
    }

    /// Replaces the engine.
    async fn replace(&self, load: &Load<E>, fallen: bool) -> Result<(), EngineError> {
        if let Some(engine) = self.change(|current| current.engine.take()) {
            match timeout(self.unload_limit, engine.unload()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the broken engine could not be unloaded"),
                Err(_) => {
                    tracing::warn!("the broken engine does not end, its memory stays taken");
                    engine.abandon();
                }
            }
        }
        let engine = load().await?;
        let late = self.change(|current| {
            if current.unloaded {
                return Some(engine);
            }
            if let Some(model) = engine.model() {
                current.model.clone_from(&model.id);
            }
            current.engine = Some(Arc::new(engine));
            current.fallen = fallen;
            None
        });
        match late {
            // It was unloaded while it was loaded again.
            Some(engine) => {
                engine.unload().await?;
                Err(self.not_loaded())
            }
            None => Ok(()),
        }
    }
}

impl<E: LlmEngine> LlmEngine for Reloadable<E> {
    fn stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        Box::pin(async move {
            let engine = self.engine().ok_or_else(|| self.not_loaded())?;
            engine.stream(prompt, params).await
        })
    }

    fn backend(&self) -> Option<Backend> {
        self.engine()?.backend()
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        self.engine()?.model()
    }

    fn fallback_reason(&self) -> Option<String> {
        let fallen = self.change(|current| current.fallen);
        let own = self.engine()?.fallback_reason();
        own.or_else(|| fallen.then(|| "the engine could not be loaded again".to_owned()))
    }

    fn abandon(&self) {
        if let Some(engine) = self.engine() {
            engine.abandon();
        }
    }

    fn is_apart(&self) -> bool {
        self.engine().is_some_and(|engine| engine.is_apart())
    }

    fn statistics(&self) -> Option<EngineStatistics> {
        self.engine()?.statistics()
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async move {
            let engine = self.change(|current| {
                current.unloaded = true;
                current.engine.take()
            });
            match engine {
                Some(engine) => engine.unload().await,
                None => Ok(()),
            }
        })
    }
}

impl<E: LlmEngine> Recover for Reloadable<E> {
    fn can(&self, step: RecoveryStep) -> bool {
        let unloaded = self.change(|current| current.unloaded);
        match step {
            RecoveryStep::ReloadModel => !unloaded,
            RecoveryStep::FallBack => !unloaded && self.fall_back.is_some(),
            _ => false,
        }
    }

    fn recover(&self, step: RecoveryStep) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async move {
            let load = match step {
                RecoveryStep::ReloadModel => Some(&self.load),
                RecoveryStep::FallBack => self.fall_back.as_ref(),
                _ => None,
            };
            match load {
                Some(load) if self.can(step) => self.replace(load, step == RecoveryStep::FallBack).await,
                _ => Err(EngineError::unsupported(format!("the engine cannot {step}"))),
            }
        })
    }
}
