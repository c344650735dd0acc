//! The engine that programs hold.

mod setup;

use std::fmt;
use std::sync::Arc;

use mlx_engine_core::{
    Device, EngineError, EngineWrapper, EventStream, GenerateOutput, GenerateParams, LlmEngine,
    ModelConfiguration, ProgressFn, Prompt,
};
#[cfg(feature = "mlx")]
use mlx_engine_engine::PromptEncoder;
use mlx_engine_engine::{Engine, PrefixCacheReport, Score, UnloadMode};
use mlx_engine_monitor::{
    DetailedStatus, HealthConfiguration, HealthEvents, HealthReport, InferenceMetrics, Monitored,
};
use mlx_engine_registry::ModelRegistry;
#[cfg(unix)]
use mlx_engine_resilience::SupervisedStatus;
use mlx_engine_resilience::{RecoveryReport, ResilienceConfiguration, ResilienceStatus, Resilient};

use serde::{Deserialize, Serialize};

use crate::ChatSession;
use crate::optimize::{self, OptimizeOptions, OptimizeReport};
use crate::served::Served;
use crate::settings::Settings;
use crate::slot::Slot;

/// Everything that is known of an [`InferenceEngine`], at one moment. As JSON it is one object, with the fields of
/// [`DetailedStatus`] and these beside them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// How it is, and what was measured.
    #[serde(flatten)]
    pub engine: DetailedStatus,
    /// How the circuit breaker, the limits and recovery stand.
    pub resilience: ResilienceStatus,
    /// How its process is, where it has one of its own.
    #[cfg(unix)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub child: Option<SupervisedStatus>,
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
/// # tokio::runtime::Runtime::new().unwrap().block_on(run()).unwrap();
/// ```
#[derive(Clone)]
pub struct InferenceEngine {
    settings: Settings,
    health: HealthConfiguration,
    engine: Resilient<Monitored<Arc<Slot>>>,
}

impl Default for InferenceEngine {
    fn default() -> Self {
        let engine = Resilient::new(Monitored::new(Arc::new(Slot::default())));
        let mut this = Self {
            settings: Settings::default(),
            health: HealthConfiguration::default(),
            engine,
        };
        // Defaults are in their ranges, which tests of both crates prove. Without these wrappers there would be no recovery.
        if let Ok(engine) = this.wrapped(HealthConfiguration::default(), ResilienceConfiguration::default()) {
            this.engine = engine;
        }
        this
    }
}

impl fmt::Debug for InferenceEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InferenceEngine")
            .field("choice", &self.settings.choice)
            .field("fallback", &self.settings.fallback)
            .field("backend", &self.backend())
            .finish_non_exhaustive()
    }
}

impl InferenceEngine {
    /// An engine without a model.
    pub fn new() -> Self {
        Self::default()
    }

    fn slot(&self) -> &Arc<Slot> {
        self.engine.engine().engine()
    }

    /// Loads a model in place of the one that is loaded: whatever a [`ModelReference`](crate::ModelReference) can be. With
    /// the feature `hub` a model that is not in the local cache is fetched first. Dropping the future gives the load up.
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
        let loaded = self.slot().load(model, &self.settings, progress).await;
        if loaded.is_ok() {
            self.slot().renew();
        }
        // Who listens hears of what is there now.
        self.engine.engine().health();
        loaded
    }

    /// Reads the tokenizer and the template of a model without its weights.
    ///
    /// # Errors
    ///
    /// As [`load_model`](Self::load_model).
    #[cfg(feature = "mlx")]
    pub fn load_encoder(&self, model: &str) -> Result<PromptEncoder, EngineError> {
        Self::load_encoder_at(&crate::locate(model, self.registry())?)
    }

    /// As [`load_encoder`](Self::load_encoder), of a model that was found.
    ///
    /// # Errors
    ///
    /// As [`load_model`](Self::load_model).
    #[cfg(feature = "mlx")]
    pub fn load_encoder_at(location: &crate::ModelLocation) -> Result<PromptEncoder, EngineError> {
        mlx_engine_engine::load_encoder(&location.path, location.configuration.as_ref())
    }

    /// The registry that names are looked up in.
    pub fn registry(&self) -> &ModelRegistry {
        self.settings.registry()
    }

    /// Why the mock or another model stands in for the model, where one does without having been chosen.
    pub fn fallback_reason(&self) -> Option<String> {
        self.slot().fallback_reason()
    }

    /// The loaded engine, without retries, limits and counts around it.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotLoaded`], [`EngineError::LoadInProgress`], and [`EngineError::Unsupported`] where it is in a process of its
    /// own, whose engine only the methods here reach.
    pub fn engine(&self) -> Result<Arc<Engine>, EngineError> {
        match self.slot().engine()? {
            Served::Here(engine) => Ok(engine),
            #[cfg(unix)]
            Served::Apart(_) => Err(EngineError::Unsupported {
                message: "the engine is in a process of its own and cannot be handed out".to_owned(),
                hint: Some(
                    "ask `InferenceEngine`, whose methods reach it there, or load without `with_child_process`"
                        .to_owned(),
                ),
            }),
        }
    }

    /// What the model runs on; `None` where none is loaded.
    pub fn device(&self) -> Option<Device> {
        self.slot().engine().ok()?.device()
    }

    /// Seconds that loading the model took; `None` where none is loaded.
    pub fn load_seconds(&self) -> Option<f64> {
        self.slot().engine().ok()?.load_seconds()
    }

    /// The most bytes that models had allocated at once in the engine's process, loading included; 0 on the mock, `None`
    /// where no model is loaded. From a process of its own it is known as of a moment ago.
    pub fn peak_memory_bytes(&self) -> Option<u64> {
        self.slot().engine().ok()?.peak_memory_bytes()
    }

    /// How the engine's process is; `None` where it has none of its own, or no model is loaded.
    #[cfg(unix)]
    pub fn child_status(&self) -> Option<SupervisedStatus> {
        match self.slot().engine().ok()? {
            Served::Here(_) => None,
            Served::Apart(engine) => Some(engine.status()),
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
        self.engine.generate(prompt.into(), params).await
    }

    /// Answers a prompt with a value of a type: the answer is held to the JSON schema of the type, token by token.
    ///
    /// ```
    /// # use mlx_engine::prelude::*;
    /// # use mlx_engine::MockScript;
    /// #[derive(Debug, serde::Deserialize, schemars::JsonSchema)]
    /// struct City {
    ///     name: String,
    ///     capital: bool,
    /// }
    ///
    /// # async fn run() -> Result<(), mlx_engine::TypedError> {
    /// # let script = MockScript::reply(r#"{"name":"Paris","capital":true}"#);
    /// # let engine = InferenceEngine::new().with_backend(BackendChoice::Mock).with_mock(script);
    /// # engine.load_model("any name").await?;
    /// let city: City = engine.generate_as("Name a city as JSON.", GenerateParams::default()).await?;
    /// assert!(city.capital && city.name == "Paris");
    /// # Ok(())
    /// # }
    /// # tokio::runtime::Runtime::new().unwrap().block_on(run()).unwrap();
    /// ```
    ///
    /// # Errors
    ///
    /// [`TypedError::Engine`](crate::TypedError::Engine) with what is wrong with the request, the schema or the engine, and
    /// [`TypedError::Unreadable`](crate::TypedError::Unreadable) with the text of an answer that is no such value, as of one
    /// that was cut off.
    #[cfg(feature = "schemars")]
    pub async fn generate_as<T: schemars::JsonSchema + serde::de::DeserializeOwned>(
        &self,
        prompt: impl Into<Prompt>,
        params: GenerateParams,
    ) -> Result<T, crate::TypedError> {
        crate::typed::generate_as(self, prompt.into(), params).await
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
        self.engine.stream(prompt.into(), params).await
    }

    /// As [`generate`](Self::generate), trying again what may succeed later.
    ///
    /// # Errors
    ///
    /// The error of the last try.
    pub async fn generate_with_retry(
        &self,
        prompt: impl Into<Prompt>,
        params: GenerateParams,
    ) -> Result<GenerateOutput, EngineError> {
        self.engine.generate_with_retry(prompt.into(), params).await
    }

    /// As [`stream`](Self::stream), trying again until the first token is there: never what the caller has seen.
    ///
    /// # Errors
    ///
    /// The error of the last try.
    pub async fn stream_with_retry(
        &self,
        prompt: impl Into<Prompt>,
        params: GenerateParams,
    ) -> Result<EventStream, EngineError> {
        self.engine.stream_with_retry(prompt.into(), params).await
    }

    /// What was counted and measured since the engine was made, and in the last minute.
    pub fn performance_metrics(&self) -> InferenceMetrics {
        self.engine.engine().metrics()
    }

    /// The same as text that Prometheus reads.
    pub fn prometheus(&self) -> String {
        let mut page = self.engine.engine().prometheus();
        page.push_str(&self.engine.status().prometheus());
        page
    }

    /// How the engine is, by what was measured so far; at once.
    pub fn health(&self) -> HealthReport {
        self.engine.engine().health()
    }

    /// How the engine is, after one token of the real model.
    pub async fn check_health(&self) -> HealthReport {
        self.engine.engine().check_health().await
    }

    /// Changes of health from now on.
    pub fn health_events(&self) -> HealthEvents {
        self.engine.engine().subscribe()
    }

    /// Everything that is known, in one report that can be written as JSON.
    pub fn detailed_status(&self) -> EngineStatus {
        EngineStatus {
            engine: self.engine.engine().detailed_status(),
            resilience: self.resilience_status(),
            #[cfg(unix)]
            child: self.child_status(),
        }
    }

    /// How the circuit breaker, the limits and recovery stand.
    pub fn resilience_status(&self) -> ResilienceStatus {
        self.engine.status()
    }

    /// Brings a broken engine back, and says what it did and whether a token of the model proved it: gives caches back, makes a new
    /// stream on the device, restarts a process of its own, loads the model again, and falls back where that is allowed,
    /// until one of these helps. A working engine is left alone. Needs a tokio runtime.
    pub async fn attempt_recovery(&self) -> RecoveryReport {
        self.engine.attempt_recovery().await
    }

    /// Measures which configuration serves a goal best on this machine and model, within a time limit, and puts it to use where it
    /// proved better than the one in use, measured in turn. The report tells what was tried and what it gained; its
    /// `config` can be written to a file and given to [`with_config`](Self::with_config) at the next start.
    ///
    /// Tried are how prompts are cut, how many requests run at once, the threads of a CPU and, where
    /// [`sample`](OptimizeOptions::sample) says what is asked, guessing ahead: nothing that changes an answer, but for rounding where
    /// requests run together on a GPU. [`kv_integers`](OptimizeOptions::kv_integers) allows keys and values as integers too, which do. For
    /// threads, keys and values and guesses the model is loaded again. Other requests would
    /// disturb the measuring and be disturbed by it. What was kept of earlier requests is forgotten. Dropping the future ends the
    /// search after the measurement that runs, and the engine keeps the configuration that it had. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// A field of the options that is out of its range, [`EngineError::NotLoaded`], [`EngineError::Unavailable`] while requests
    /// run, [`EngineError::PromptTooLong`] where the context has no room, and what a request may meet.
    pub async fn optimize_performance(
        &self,
        options: OptimizeOptions,
    ) -> Result<OptimizeReport, EngineError> {
        optimize::optimize(self.slot(), options).await
    }

    /// The log-probabilities of a text.
    ///
    /// # Errors
    ///
    /// As [`Engine::score`].
    pub async fn score(&self, text: &str) -> Result<Score, EngineError> {
        self.slot().engine()?.score(text).await
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
        self.engine.unload().await
    }

    /// Gives the memory back after the requests that the engine has taken are answered, or at once.
    ///
    /// # Errors
    ///
    /// As [`unload`](Self::unload).
    pub async fn unload_with(&self, mode: UnloadMode) -> Result<(), EngineError> {
        // What is not there or not ready is what unloading is about.
        let Ok(engine) = self.slot().engine() else {
            return self.unload().await;
        };
        engine.unload_with(mode).await?;
        // Another may have been loaded meanwhile.
        self.slot().forget(&engine);
        Ok(())
    }

    /// What is kept of requests for those that begin alike.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotLoaded`] and [`EngineError::LoadInProgress`].
    pub async fn prefix_cache(&self) -> Result<PrefixCacheReport, EngineError> {
        self.slot().engine()?.prefix_cache().await
    }

    /// Gives up what is kept and not pinned, and says how many bytes that were.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotLoaded`] and [`EngineError::LoadInProgress`].
    pub async fn clear_prefix_cache(&self) -> Result<u64, EngineError> {
        self.slot().engine()?.clear_prefix_cache().await
    }

    /// Keeps the keys and values of a prompt, such as a long system prompt, until it is unpinned.
    ///
    /// # Errors
    ///
    /// As [`prefix_cache`](Self::prefix_cache) and [`Engine::pin_prefix`].
    pub async fn pin_prefix(&self, prompt: impl Into<Prompt>) -> Result<(), EngineError> {
        self.slot().engine()?.pin_prefix(prompt.into()).await
    }

    /// Lets a prompt go that was pinned; `false` where it is not pinned.
    ///
    /// # Errors
    ///
    /// As [`prefix_cache`](Self::prefix_cache) and [`Engine::unpin_prefix`].
    pub async fn unpin_prefix(&self, prompt: impl Into<Prompt>) -> Result<bool, EngineError> {
        self.slot().engine()?.unpin_prefix(prompt.into()).await
    }
}

impl EngineWrapper for InferenceEngine {
    type Inner = dyn LlmEngine;

    fn inner(&self) -> &(dyn LlmEngine + 'static) {
        &self.engine
    }
}
