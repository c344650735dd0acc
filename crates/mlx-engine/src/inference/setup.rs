//! What an engine is told before a model is loaded.

use std::sync::Arc;

use mlx_engine_core::{EngineError, FallbackPolicy};
#[cfg(feature = "mlx")]
use mlx_engine_engine::MemoryFit;
use mlx_engine_engine::{EngineConfig, MockScript};
use mlx_engine_monitor::{HealthConfiguration, Monitored};
use mlx_engine_registry::ModelRegistry;
#[cfg(unix)]
use mlx_engine_resilience::{Program, SupervisorConfiguration};
use mlx_engine_resilience::{ResilienceConfiguration, Resilient};

use super::InferenceEngine;
#[cfg(unix)]
use crate::apart::Apart;
use crate::settings::BackendChoice;
use crate::slot::Slot;

impl InferenceEngine {
    /// Sets how requests are scheduled and computed, for models that are loaded from now on; a value out of its range is
    /// an error of the load.
    pub fn with_config(mut self, config: EngineConfig) -> Self {
        self.settings.config = config;
        self
    }

    /// Chooses the longest context and the largest batch, up to what [`with_config`](Self::with_config) asks for, with which a model
    /// fits into `available` bytes, and says what it chose: [`EngineConfig::fit`], by the headers of the model's files. Where
    /// no bytes are told, it is what the system has available now. The model, and one that guesses for it, have to be on this machine.
    ///
    /// # Errors
    ///
    /// As [`load_model`](Self::load_model), [`EngineError::InsufficientMemory`] where not even a short context fits, and
    /// [`EngineError::Unsupported`] where the memory has to be told: that of a GPU that does not share the system's.
    #[cfg(feature = "mlx")]
    pub fn fitted(mut self, model: &str, available: Option<u64>) -> Result<(Self, MemoryFit), EngineError> {
        let fit = self.settings.fit(model, available)?;
        Ok((self, fit))
    }

    /// Sets which backend models are loaded on.
    pub fn with_backend(mut self, choice: BackendChoice) -> Self {
        self.settings.choice = choice;
        self
    }

    /// Sets when the mock may stand in for a model.
    pub fn with_fallback(mut self, policy: FallbackPolicy) -> Self {
        self.settings.fallback = policy;
        self
    }

    /// Names a smaller model, or another file of the same one, that recovery serves from where the model cannot be brought back:
    /// only where [`RecoveryConfiguration::fall_back`](crate::RecoveryConfiguration::fall_back) allows it. Health is degraded
    /// then, and [`fallback_reason`](Self::fallback_reason) tells why. Without a name recovery falls back to the mock, where the
    /// policy is [`FallbackPolicy::OnLoadFailure`] too.
    pub fn with_fallback_model(mut self, model: impl Into<String>) -> Self {
        self.settings.fallback_model = Some(model.into());
        self
    }

    /// Sets how the mock behaves.
    pub fn with_mock(mut self, script: MockScript) -> Self {
        self.settings.mock = script;
        self
    }

    /// Loads models in a process of their own from now on, so that an abort or a kill of it costs only the requests that run
    /// there. `program` has to call [`serve_child`](crate::serve_child); what may be wrong with `supervisor` is an error of
    /// the load.
    ///
    /// ```no_run
    /// use mlx_engine::{InferenceEngine, Program, SupervisorConfiguration};
    ///
    /// # fn run() -> std::io::Result<()> {
    /// let engine = InferenceEngine::new()
    ///     .with_child_process(Program::this()?.arg("engine"), SupervisorConfiguration::default());
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(unix)]
    pub fn with_child_process(mut self, program: Program, supervisor: SupervisorConfiguration) -> Self {
        self.settings.apart = Some(Apart { program, supervisor });
        self
    }

    /// Sets the registry that names are looked up in; [`ModelRegistry::builtin`] unless told.
    pub fn with_registry(mut self, registry: ModelRegistry) -> Self {
        self.settings.registry = Some(Arc::new(registry));
        self
    }

    /// Sets whether loading a model may fetch it from the hub.
    #[cfg(all(feature = "hub", feature = "mlx"))]
    pub fn with_fetch(mut self, policy: crate::FetchPolicy) -> Self {
        self.settings.fetch = policy;
        self
    }

    /// Sets where models are fetched from; the hub of the environment unless told.
    #[cfg(all(feature = "hub", feature = "mlx"))]
    pub fn with_hub(mut self, hub: crate::hub::Hub) -> Self {
        self.settings.hub = Some(hub);
        self
    }

    /// Sets from where on the engine is not well. What was counted so far stays with the clones made before.
    ///
    /// # Errors
    ///
    /// [`EngineError::InvalidParameter`] for a field that is out of its range.
    pub fn with_health(mut self, health: HealthConfiguration) -> Result<Self, EngineError> {
        self.engine = self.wrapped(health.clone(), self.engine.configuration().clone())?;
        self.health = health;
        Ok(self)
    }

    /// Sets the limits, the retries and the recovery of requests. What was counted so far stays with the clones made
    /// before.
    ///
    /// # Errors
    ///
    /// [`EngineError::InvalidParameter`] for a field that is out of its range.
    pub fn with_resilience(mut self, resilience: ResilienceConfiguration) -> Result<Self, EngineError> {
        self.engine = self.wrapped(self.health.clone(), resilience)?;
        Ok(self)
    }

    /// The slot, seen through new wrappers.
    pub(super) fn wrapped(
        &self,
        health: HealthConfiguration,
        resilience: ResilienceConfiguration,
    ) -> Result<Resilient<Monitored<Arc<Slot>>>, EngineError> {
        let monitored = Monitored::builder(Arc::clone(self.slot()))
            .health(health)
            .build()?;
        let resilient = Resilient::builder(monitored).configuration(resilience);
        Ok(resilient.recoverable().build()?)
    }
}
