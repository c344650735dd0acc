//! The life cycle of a request.
//!
//! An [`Engine`] holds one model on one worker thread. Requests reach it over a bounded channel and wait in the
//! scheduler, which decides what runs when: prompts are fed in chunks, and the running requests go forward together, one
//! token a turn. What it runs is a [`TokenModel`]: an MLX
//! decoder with the feature `mlx`, or the scripted [`MockModel`], which lives below the scheduler so that streaming,
//! cancelling and recovery are the same code for both.
//!
//! ```
//! use mlx_engine_core::{GenerateParams, LlmEngine, Prompt};
//! use mlx_engine_engine::{Engine, EngineConfig, MockScript};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let engine = Engine::mock("demo", MockScript::reply("Hello from the script"), EngineConfig::default()).await?;
//! let output = engine.generate(Prompt::user("Hi"), GenerateParams::default()).await?;
//! assert_eq!(output.text, "Hello from the script");
//! assert_eq!(output.backend.to_string(), "mock");
//! # Ok::<(), mlx_engine_core::EngineError>(())
//! # }).unwrap();
//! ```

mod call_id;
mod clock;
mod config;
mod constraint;
#[cfg(feature = "mlx")]
mod convert;
mod described;
mod disk;
mod engine;
#[cfg(test)]
mod faults;
#[cfg(feature = "mlx")]
mod fingerprint;
mod fit;
mod gauges;
mod lost;
#[cfg(feature = "mlx")]
mod mlx;
mod mock;
mod model;
mod output;
mod prefix;
mod prompt;
mod request;
mod scheduler;
mod speculation;
mod worker;

pub use config::{DiskCacheConfig, EngineConfig, PrefixCacheConfig};
#[cfg(feature = "mlx")]
pub use convert::{ConvertError, ConvertReport, Origin, convert_model};
pub use engine::{Engine, Score, UnloadMode};
pub use fit::{KvWindow, MemoryFit, MemoryNeeds};
#[cfg(feature = "mlx")]
pub use mlx::{cpu_kernels, load_encoder, load_mlx, memory_needs, mlx_device};
#[cfg(feature = "mlx")]
pub use mlx_engine_checkpoint::FloatType;
#[cfg(feature = "mlx")]
pub use mlx_engine_models::{Conversion, ConvertOptions, ConvertProgress, Recipe, WeightBits};
pub use mock::{MockFault, MockModel, MockScript};
pub use model::{Chosen, Feed, FeedError, TokenModel};
pub use prefix::{PrefixCacheReport, PrefixEntry};
pub use prompt::PromptEncoder;
pub use speculation::{DraftConfig, LookupConfig, SpeculationConfig};
