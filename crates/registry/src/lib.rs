//! Curated MLX models as data, finding and choosing them, and estimates for any other.
//!
//! [`ModelRegistry::builtin`] knows what `models.toml` lists, [`ModelRegistry::layer`] puts a user's own list over it.
//! A reference is an id, an alias or a name, in any case ([`ModelRegistry::get`]); [`ModelRegistry::search_models`]
//! asks by text and criteria, [`ModelRegistry::recommended_models`] by use and device. [`ModelEstimate`] reads from a
//! `config.json` what its model takes, whether it is in the list or not.
//!
//! There is no network or MLX access here, so nothing says whether a model is still on the hub, or downloaded. The
//! only file that is ever read is the user's list. Speeds are estimates from bandwidth, see
//! [`Fit::tokens_per_second`], and no quality was measured.
//!
//! ```
//! use mlx_engine_core::ModelType;
//! use mlx_engine_registry::{ModelRegistry, SearchCriteria};
//!
//! let registry = ModelRegistry::builtin();
//! assert_eq!(registry.get("qwen3-4b")?.id, "mlx-community/Qwen3-4B-4bit");
//!
//! let small_coders = SearchCriteria {
//!     model_type: Some(ModelType::Code),
//!     max_size_bytes: Some(5_000_000_000),
//!     ..SearchCriteria::default()
//! };
//! for model in registry.search_models(&small_coders) {
//!     println!("{}: {} parameters", model.name, model.parameters);
//! }
//! # Ok::<(), mlx_engine_registry::RegistryError>(())
//! ```

mod criteria;
mod entry;
mod estimate;
mod fit;
mod recommend;
mod registry;
mod relevance;
mod suggest;
mod user;

mod error;

pub use criteria::{SearchCriteria, SortBy, Weights};
pub use entry::{Capability, ModelEntry, Sampling};
pub use error::RegistryError;
pub use estimate::{CacheShape, EstimateError, MemoryEstimate, ModelEstimate};
pub use fit::{Compatibility, DeviceDescription, Fit};
pub use recommend::{Recommendation, UseCase};
pub use registry::ModelRegistry;
