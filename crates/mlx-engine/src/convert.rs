//! From any model to a folder in MLX's layout.

use std::ops::ControlFlow;
use std::path::Path;

use mlx_engine_engine::{
    ConvertError, ConvertOptions, ConvertProgress, ConvertReport, Origin, convert_model,
};
use mlx_engine_registry::ModelRegistry;

use crate::{ModelReference, locate};

/// Converts a model into the new folder `target`, which mlx-lm loads too.
///
/// `reference` is a model folder in Hugging Face's or MLX's layout, a `.gguf` file, a name of `registry`, or a hub id, whose model
/// has to be in the local cache (`find_or_fetch` brings it there). It works on the calling thread, uses no MLX, and takes the
/// memory of a few rows of the largest matrix. What it writes gets its name when it is whole; [`ControlFlow::Break`] from
/// `progress` gives it up.
///
/// ```no_run
/// use std::ops::ControlFlow;
/// use mlx_engine::{ConvertOptions, ModelRegistry, WeightBits, convert};
///
/// let options = ConvertOptions {
///     bits: WeightBits::Uniform { bits: 4, group_size: 64 },
///     ..ConvertOptions::default()
/// };
/// let registry = ModelRegistry::builtin();
/// let report = convert("./Qwen3-0.6B", registry, "./Qwen3-4bit".as_ref(), &options, &mut |_| ControlFlow::Continue(()))?;
/// println!("{} bytes, without loss: {}", report.bytes, report.is_exact());
/// # Ok::<(), mlx_engine::ConvertError>(())
/// ```
///
/// # Errors
///
/// Where the model is not found, `target` is there and not empty, a value does not fit what is asked for, or a file cannot be read
/// or written. `target` is not there then.
pub fn convert(
    reference: &str,
    registry: &ModelRegistry,
    target: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(ConvertProgress<'_>) -> ControlFlow<()>,
) -> Result<ConvertReport, ConvertError> {
    let origin = origin(&ModelReference::parse(reference, registry)?, registry);
    let location = locate(reference, registry)?;
    convert_model(&location.path, target, options, &origin, progress)
}

/// What the model card says of where a model came from.
fn origin(reference: &ModelReference, registry: &ModelRegistry) -> Origin {
    let ModelReference::Hub(model, _) = reference else {
        return Origin {
            base_model: None,
            licence: None,
        };
    };
    let entry = registry.entry(model.repo.as_str()).ok();
    let licence = entry.map(|entry| entry.licence.clone());
    Origin {
        base_model: Some(model.repo.to_string()),
        licence: licence.filter(|licence| !licence.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_card_names_the_repository_and_its_licence() {
        let registry = ModelRegistry::builtin();
        let of = |reference: &str| origin(&ModelReference::parse(reference, registry).unwrap(), registry);
        for reference in ["owner/name", "owner/name@v1", "hf:owner/name@v1/file.gguf"] {
            let origin = of(reference);
            assert_eq!(
                (origin.base_model.as_deref(), origin.licence),
                (Some("owner/name"), None)
            );
        }
        for reference in ["qwen3-4b", "qwen3-4b@main", "hf:mlx-community/Qwen3-4B-4bit"] {
            let origin = of(reference);
            assert_eq!(origin.base_model.as_deref(), Some("mlx-community/Qwen3-4B-4bit"));
            assert_eq!(origin.licence.as_deref(), Some("apache-2.0"), "{reference}");
        }
        assert_eq!(of(".").base_model, None);
    }
}
