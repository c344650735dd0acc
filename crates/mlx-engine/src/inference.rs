//! The engine that programs hold.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use mlx_engine_core::{
    Backend, EngineError, EventStream, FallbackPolicy, GenerateOutput, GenerateParams, LlmEngine,
    ModelConfiguration, Prompt,
};
use mlx_engine_engine::{Engine, EngineOptions, MockScript, ProgressFn, PromptEncoder, Score};
use mlx_engine_registry::ModelRegistry;

use crate::ChatSession;

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

/// An engine that loads one model at a time and answers with it. Clones share the model.
///
/// ```
/// use mlx_engine::prelude::*;
/// use mlx_engine::MockScript;
///
/// # async fn run() -> Result<(), EngineError> {
/// let engine = InferenceEngine::new().with_backend(BackendChoice::Mock).with_mock(MockScript::reply("Paris"));
/// engine.load_model("any name").await?;
/// let output = engine.generate("What is the capital of France?", GenerateParams::default()).await?;
/// assert_eq!((output.text.as_str(), output.backend), ("Paris", Backend::Mock));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
pub struct InferenceEngine {
    options: EngineOptions,
    choice: BackendChoice,
    fallback: FallbackPolicy,
    mock: MockScript,
    registry: Option<Arc<ModelRegistry>>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
enum State {
    #[default]
    Empty,
    Loading {
        model: String,
    },
    Loaded {
        engine: Arc<Engine>,
        /// Why the mock stands in for the model, where it does.
        fallback_reason: Option<String>,
    },
}

impl fmt::Debug for InferenceEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InferenceEngine")
            .field("choice", &self.choice)
            .field("fallback", &self.fallback)
            .field("backend", &self.backend())
            .finish_non_exhaustive()
    }
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

impl InferenceEngine {
    /// An engine without a model.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how requests are scheduled, for models that are loaded from now on.
    pub fn with_options(mut self, options: EngineOptions) -> Self {
        self.options = options;
        self
    }

    /// Sets which backend models are loaded on.
    pub fn with_backend(mut self, choice: BackendChoice) -> Self {
        self.choice = choice;
        self
    }

    /// Sets when the mock may stand in for a model.
    pub fn with_fallback(mut self, policy: FallbackPolicy) -> Self {
        self.fallback = policy;
        self
    }

    /// Sets how the mock behaves.
    pub fn with_mock(mut self, script: MockScript) -> Self {
        self.mock = script;
        self
    }

    /// Sets the registry that names are looked up in; [`ModelRegistry::builtin`] unless told.
    pub fn with_registry(mut self, registry: ModelRegistry) -> Self {
        self.registry = Some(Arc::new(registry));
        self
    }

    /// Loads a model in place of the one that is loaded: a folder, a `.gguf` file, a name of the registry, or a hub
    /// id that is in the local cache. Dropping the future gives the load up.
    ///
    /// # Errors
    ///
    /// [`EngineError::LoadInProgress`] while another load runs, [`EngineError::ModelNotFound`],
    /// [`EngineError::MlxUnavailable`] where the fallback policy is `Never`, and what is wrong with the model's files.
    /// After an error no model is loaded.
    pub async fn load_model(&self, model: &str) -> Result<Arc<ModelConfiguration>, EngineError> {
        self.load(model, None).await
    }

    /// As [`load_model`](Self::load_model), telling `progress` how far it has come, on a thread of the engine.
    ///
    /// # Errors
    ///
    /// As [`load_model`](Self::load_model).
    pub async fn load_model_with_progress(
        &self,
        model: &str,
        progress: ProgressFn,
    ) -> Result<Arc<ModelConfiguration>, EngineError> {
        self.load(model, Some(progress)).await
    }

    async fn load(
        &self,
        model: &str,
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
        if let State::Loaded { engine, .. } = previous {
            // Two models at once might not fit.
            engine.unload().await?;
        }
        let (engine, fallback_reason) = self.choose(model, progress).await?;
        let configuration = engine
            .model()
            .ok_or_else(|| EngineError::internal("a model was loaded and is gone"))?;
        let mut state = self.state();
        *state = State::Loaded {
            engine: Arc::new(engine),
            fallback_reason,
        };
        guard.disarm();
        drop(state);
        Ok(configuration)
    }

    /// Loads on the backend that choice and policy lead to.
    async fn choose(
        &self,
        model: &str,
        progress: Option<ProgressFn>,
    ) -> Result<(Engine, Option<String>), EngineError> {
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

    async fn load_mock(&self, model: &str) -> Result<Engine, EngineError> {
        Engine::mock(model, self.mock.clone(), self.options.clone()).await
    }

    #[cfg(feature = "mlx")]
    async fn load_mlx(&self, model: &str, progress: Option<ProgressFn>) -> Result<Engine, EngineError> {
        // A model that does not exist is an error on every backend: the mock must not stand in for it.
        let location = crate::locate(model, self.registry())?;
        crate::platform().require_mlx()?;
        mlx_engine_engine::mlx_device()?;
        mlx_engine_engine::load_mlx(
            location.path,
            location.configuration,
            self.options.clone(),
            progress,
        )
        .await
    }

    #[cfg(not(feature = "mlx"))]
    #[expect(clippy::unused_async, reason = "it stands for the one that loads")]
    async fn load_mlx(&self, _model: &str, _progress: Option<ProgressFn>) -> Result<Engine, EngineError> {
        match crate::platform().require_mlx() {
            Err(error) => Err(error),
            Ok(()) => Err(EngineError::internal(
                "this build has no MLX and says that it has",
            )),
        }
    }

    /// Reads the tokenizer and the template of a model without its weights.
    ///
    /// # Errors
    ///
    /// As [`load_model`](Self::load_model).
    #[cfg(feature = "mlx")]
    pub fn load_encoder(&self, model: &str) -> Result<PromptEncoder, EngineError> {
        let location = crate::locate(model, self.registry())?;
        mlx_engine_engine::load_encoder(&location.path, location.configuration.as_ref())
    }

    /// The registry that names are looked up in.
    pub fn registry(&self) -> &ModelRegistry {
        self.registry
            .as_deref()
            .unwrap_or_else(|| ModelRegistry::builtin())
    }

    /// Why the mock stands in for the model, where it does without having been chosen.
    pub fn fallback_reason(&self) -> Option<String> {
        match &*self.state() {
            State::Loaded { fallback_reason, .. } => fallback_reason.clone(),
            _ => None,
        }
    }

    /// The loaded engine.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotLoaded`] and [`EngineError::LoadInProgress`].
    pub fn engine(&self) -> Result<Arc<Engine>, EngineError> {
        match &*self.state() {
            State::Loaded { engine, .. } => Ok(Arc::clone(engine)),
            State::Loading { model } => Err(EngineError::LoadInProgress { model: model.clone() }),
            State::Empty => Err(EngineError::NotLoaded {
                model: "none".to_owned(),
            }),
        }
    }

    /// Answers a prompt; a string is a question to a chat model.
    ///
    /// # Errors
    ///
    /// What is wrong with the request, or what ended it.
    pub async fn generate(
        &self,
        prompt: impl Into<Prompt>,
        params: GenerateParams,
    ) -> Result<GenerateOutput, EngineError> {
        self.engine()?.generate(prompt.into(), params).await
    }

    /// Answers a prompt piece by piece; dropping the stream cancels the request.
    ///
    /// # Errors
    ///
    /// What is wrong with the request.
    pub async fn stream(
        &self,
        prompt: impl Into<Prompt>,
        params: GenerateParams,
    ) -> Result<EventStream, EngineError> {
        self.engine()?.stream(prompt.into(), params).await
    }

    /// The log-probabilities of a text.
    ///
    /// # Errors
    ///
    /// As [`Engine::score`].
    pub async fn score(&self, text: &str) -> Result<Score, EngineError> {
        self.engine()?.score(text).await
    }

    /// A conversation with the model that is loaded.
    pub fn chat(&self) -> ChatSession {
        ChatSession::new(Arc::new(self.clone()))
    }

    /// Ends what is running and gives the memory back.
    ///
    /// # Errors
    ///
    /// [`EngineError::LoadInProgress`], and why the memory could not be given back.
    pub async fn unload(&self) -> Result<(), EngineError> {
        let previous = {
            let mut state = self.state();
            if let State::Loading { model } = &*state {
                return Err(EngineError::LoadInProgress { model: model.clone() });
            }
            std::mem::take(&mut *state)
        };
        match previous {
            State::Loaded { engine, .. } => engine.unload().await,
            _ => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

impl LlmEngine for InferenceEngine {
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

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(InferenceEngine::unload(self))
    }
}
