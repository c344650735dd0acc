//! Curated MLX models as data, with lookup.
//!
//! [`ModelRegistry::builtin`] knows what `models.toml` lists; [`ModelRegistry::register`] adds to it. A reference is
//! an id, an alias or a name, in any case; a [`ModelQuery`] asks by criteria instead.
//!
//! There is no network, file or MLX access here, so nothing says whether a model is still on the hub, or downloaded.
//! Sizes are approximate: see [`ModelRegistry::builtin`]. There is no estimate of the memory that a context takes
//! either, because it follows from layers and heads, which are known once the checkpoint is read.
//!
//! ```
//! use mlx_engine_core::ModelType;
//! use mlx_engine_registry::{ModelQuery, ModelRegistry};
//!
//! let registry = ModelRegistry::builtin();
//! assert_eq!(registry.get("qwen3-4b")?.id, "mlx-community/Qwen3-4B-4bit");
//!
//! let small_coders = ModelQuery::new().with_type(ModelType::Code).with_max_size_bytes(5_000_000_000);
//! for model in registry.find(&small_coders) {
//!     println!("{}: {} parameters", model.name, model.parameters);
//! }
//! # Ok::<(), mlx_engine_registry::RegistryError>(())
//! ```

mod estimate;
mod query;
mod registry;

mod suggest;

mod error;

pub use error::RegistryError;
pub use estimate::{CacheShape, EstimateError, MemoryEstimate, ModelEstimate};
pub use query::ModelQuery;
pub use registry::ModelRegistry;
