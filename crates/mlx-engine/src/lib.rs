//! An embeddable LLM engine on Apple's MLX.
//!
//! ```no_run
//! use mlx_engine::prelude::*;
//!
//! # async fn run() -> Result<(), EngineError> {
//! let engine = InferenceEngine::new();
//! engine.load_model("SmolLM2-135M-Instruct.Q4_1.gguf").await?;
//! let output = engine.generate("What is the capital of France?", GenerateParams::default()).await?;
//! println!("{} ({})", output.text, output.backend);
//! # Ok(())
//! # }
//! ```
//!
//! A model is a folder in MLX's or Hugging Face's layout, a `.gguf` file, the name of a model in the
//! [registry](ModelRegistry), a hub id with or without a `@revision`, or one file of a repository (`hf:owner/name/file.gguf`).
//!
//! Where MLX cannot run, a scripted mock may take its place ([`FallbackPolicy`]); whatever it says is marked as
//! [`Backend::Mock`], and [`InferenceEngine::fallback_reason`] tells why.
//!
//! # Features
//!
//! `grammar` (default) lets answers keep to a JSON schema, a regular expression or a grammar
//! ([`GenerateParams::constraint`]); without it such requests are refused.
//!
//! `hub` brings the network: models that are not in the local cache are fetched from the Hugging Face hub when they are
//! loaded (`FetchPolicy`), and `hub::Hub` searches it. It is off by default, because it brings a TLS stack; the cache
//! ([`hub::HubCache`]) is looked in without it.
//!
//! `metrics` hands every request that ends to whatever recorder of the `metrics` facade the program has installed. `tracing` opens a
//! span for every request and writes an event for every change of health, for the program's own subscriber; `otlp`, which includes it, sends
//! spans of requests and steps to a collector.
//!
//! `schemars` (default) brings `InferenceEngine::generate_as`, which answers with a value of a type that has a JSON schema.
//!
//! `mlx` (default) brings MLX. Without it everything builds and runs on the mock alone, with nothing else than
//! Rust and a C compiler.

#[cfg(unix)]
mod apart;
#[cfg(doctest)]
mod book;
mod chat;
#[cfg(feature = "mlx")]
mod convert;
mod describe;
pub mod environment;
#[cfg(feature = "hub")]
mod fetch;
mod inference;
mod optimize;
#[cfg(feature = "otlp")]
pub mod otlp;
mod platform;
mod resolve;
mod served;
mod settings;
mod slot;
#[cfg(feature = "schemars")]
mod typed;

#[cfg(unix)]
pub use apart::{serve_child, serve_child_then};
pub use chat::{ChatSession, ChatStream};
#[cfg(feature = "mlx")]
pub use convert::convert;
#[cfg(feature = "hub")]
pub use describe::describe;
pub use describe::{DescribedFile, ModelDescription, describe_local};
#[cfg(all(feature = "hub", feature = "mlx"))]
pub use fetch::FetchPolicy;
#[cfg(feature = "hub")]
pub use fetch::{fetch, find_or_fetch, find_or_fetch_tokenizer};
pub use inference::{EngineStatus, InferenceEngine};
pub use mlx_engine_core::*;
#[cfg(feature = "mlx")]
pub use mlx_engine_engine::{
    Conversion, ConvertError, ConvertOptions, ConvertProgress, ConvertReport, FloatType, Origin, Recipe,
    WeightBits, cpu_kernels, memory_needs, mlx_device,
};
pub use mlx_engine_engine::{
    DiskCacheConfig, DraftConfig, Engine, EngineConfig, KvWindow, LookupConfig, MemoryFit, MemoryNeeds,
    MockFault, MockScript, PrefixCacheConfig, PrefixCacheReport, PrefixEntry, PromptEncoder, Score,
    SpeculationConfig, UnloadMode,
};
/// Models on the Hugging Face hub, and in its cache on this machine.
pub use mlx_engine_hub as hub;
/// Metrics and health of any [`LlmEngine`], also alone.
pub use mlx_engine_monitor as monitor;
pub use mlx_engine_monitor::{
    DetailedStatus, Distribution, EngineHealth, HealthConfiguration, HealthEvent, HealthEvents, HealthReason,
    HealthReport, InferenceMetrics,
};
pub use mlx_engine_registry::{
    CacheShape, Capability, Compatibility, DeviceDescription, Fit, MemoryEstimate, ModelEntry, ModelEstimate,
    ModelRegistry, Recommendation, RegistryError, SearchCriteria, SortBy, UseCase, Weights,
};
/// Retries, limits and recovery of any [`LlmEngine`], also alone, and an engine in a process of its own.
pub use mlx_engine_resilience as resilience;
pub use mlx_engine_resilience::{
    BreakerConfiguration, BreakerState, BudgetConfiguration, BulkheadConfiguration, RecoveryConfiguration,
    RecoveryReport, RecoveryStep, ResilienceConfiguration, ResilienceCounts, ResilienceStatus,
    RetryConfiguration, StepOutcome, StepReport, TimeoutConfiguration,
};
#[cfg(unix)]
pub use mlx_engine_resilience::{ChildState, Program, SupervisedStatus, SupervisorConfiguration};
pub use optimize::{Measured, OptimizeGoal, OptimizeOptions, OptimizeOutcome, OptimizeReport, Trial};
pub use platform::platform;
pub use resolve::{MODELS_VARIABLE, ModelLocation, ModelReference, hub_cache, locate, user_registry};
pub use settings::BackendChoice;
#[cfg(feature = "schemars")]
pub use typed::{TypedError, schema_of};

/// What most programs use.
pub mod prelude {
    pub use crate::{
        Backend, BackendChoice, ChatMessage, ChatSession, EngineError, FallbackPolicy, GenerateOutput,
        GenerateParams, GenerationEvent, InferenceEngine, LlmEngine, ModelRegistry, Prompt, ToolChoice,
        ToolDefinition,
    };
}
