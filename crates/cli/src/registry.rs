//! The models that names are looked up in.

use std::sync::OnceLock;

use mlx_engine::{EngineError, ModelRegistry, user_registry};

use crate::failure::Failure;

/// The built-in registry, with the user's own list over it where `MLX_ENGINE_MODELS` names one.
pub(crate) fn registry() -> Result<&'static ModelRegistry, Failure> {
    static REGISTRY: OnceLock<ModelRegistry> = OnceLock::new();
    if let Some(registry) = REGISTRY.get() {
        return Ok(registry);
    }
    let registry = user_registry().map_err(EngineError::from)?;
    Ok(REGISTRY.get_or_init(|| registry))
}
