//! The vocabulary of MLXEngine: what a model is, what a request asks for, what comes back, what can go wrong, and
//! the [`LlmEngine`] trait that everything above and below agrees on.
//!
//! There is no inference here, and no tokio, MLX, file or network access. A type lives in this crate when two layers
//! have to name it.
//!
//! ```
//! use mlx_engine_core::{ChatMessage, GenerateParams, OutputConstraint, Prompt};
//!
//! let prompt = Prompt::chat([
//!     ChatMessage::system("Answer in one sentence."),
//!     ChatMessage::user("Why is the sky blue?"),
//! ]);
//! let params = GenerateParams::default().with_max_tokens(64).with_temperature(0.0);
//!
//! assert!(!prompt.is_empty());
//! params.validate()?;
//! # Ok::<(), mlx_engine_core::ParamError>(())
//! ```

mod model;

mod kv;
mod message;
mod param_error;
mod params;
mod priority;
mod tool;

mod backend;
mod platform;
mod progress;
mod speculation;
mod statistics;

mod event;
mod output;

mod error;
mod error_source;

mod engine;

pub use backend::{Backend, FallbackPolicy};
pub use engine::{EngineWrapper, EventStream, LlmEngine, collect_events};
pub use error::EngineError;
pub use error_source::ErrorSource;
pub use event::{
    FinishReason, GenerateSummary, GenerationEvent, Timings, TokenInfo, TokenLogprob, TopLogprob, Usage,
};
pub use kv::KvConfig;
pub use message::{ChatMessage, Prompt, Role};
pub use model::{ModelConfiguration, ModelType, Quantization};
pub use output::{GenerateOutput, PartialOutput};
pub use param_error::ParamError;
pub use params::{GenerateParams, OutputConstraint};
pub use platform::{Device, Platform};
pub use priority::Priority;
pub use progress::{LoadProgress, ProgressFn};
pub use speculation::{SpeculationOff, SpeculationReport};
pub use statistics::{BatchSizes, DeviceMemory, EngineStatistics, next_load};
pub use tool::{ToolCall, ToolChoice, ToolDefinition};
