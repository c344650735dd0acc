//! From any model to a folder in MLX's layout.

use std::ops::ControlFlow;
use std::path::Path;

use mlx_engine_engine::{
    ConvertError, ConvertOptions, ConvertProgress, ConvertReport, Origin, convert_model,
};
use mlx_engine_registry::ModelRegistry;

use crate::locate;

/// Converts a model into the new folder `target`, which mlx-lm loads too.
///
/// `reference` is a model folder in Hugging Face's or MLX's layout, a `.gguf` file, a name of the registry, or a hub id that is in
/// the local cache. It works on the calling thread, uses no MLX, and takes the memory of a few rows of the largest matrix. What it
/// writes gets its name when it is whole; [`ControlFlow::Break`] from `progress` gives it up.
///
/// ```no_run
/// use std::ops::ControlFlow;
/// use mlx_engine::{ConvertOptions, WeightBits, convert};
///
/// let options = ConvertOptions {
///     bits: WeightBits::Uniform { bits: 4, group_size: 64 },
///     ..ConvertOptions::default()
/// };
/// let report = convert("./Qwen3-0.6B", "./Qwen3-0.6B-4bit".as_ref(), &options, &mut |_| ControlFlow::Continue(()))?;
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
    target: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(ConvertProgress<'_>) -> ControlFlow<()>,
) -> Result<ConvertReport, ConvertError> {
    let registry = ModelRegistry::builtin();
    let location = locate(reference, registry)?;
    let is_path = Path::new(reference).exists();
    let id = location.configuration.as_ref().map(|known| known.id.clone());
    let licence = registry.entry(reference).ok().filter(|_| !is_path);
    let licence = licence.map(|entry| entry.licence.clone());
    let origin = Origin {
        base_model: id.or_else(|| (!is_path).then(|| repository(reference))),
        licence: licence.filter(|licence| !licence.is_empty()),
    };
    convert_model(&location.path, target, options, &origin, progress)
}

/// The repository of a reference to the hub, such as `hf:owner/name@revision/file.gguf`.
fn repository(reference: &str) -> String {
    let parts = reference.trim_start_matches("hf:").split('/').take(2);
    let parts: Vec<&str> = parts
        .map(|part| part.split('@').next().unwrap_or_default())
        .collect();
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_card_names_the_repository() {
        for reference in ["owner/name", "owner/name@v1", "hf:owner/name@v1/file.gguf"] {
            assert_eq!(repository(reference), "owner/name");
        }
    }
}
