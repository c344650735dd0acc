//! What is known of a model before it is loaded, and before it is fetched.

use std::path::{Path, PathBuf};

use mlx_engine_core::{EngineError, ModelConfiguration, ModelType};
#[cfg(feature = "hub")]
use mlx_engine_hub::{Hub, HubReference, ModelInfo, RepoPath};
use mlx_engine_registry::{Compatibility, DeviceDescription, ModelEntry, ModelEstimate, ModelRegistry};
use serde::Serialize;

use crate::{ModelReference, locate};

/// A file of a model.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct DescribedFile {
    /// Its path in the model's folder or repository.
    pub path: String,
    /// Its length.
    pub bytes: u64,
}

/// What is known of a model that need not be in the registry.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ModelDescription {
    /// What it was asked for by.
    pub reference: String,
    /// The registry's entry, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<ModelEntry>,
    /// Where it is on this machine, whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// What the hub says of its repository; none for a path, and where the hub could not be asked.
    #[cfg(feature = "hub")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hub: Option<ModelInfo>,
    /// Its files, by path.
    pub files: Vec<DescribedFile>,
    /// What it takes, by its `config.json` or, for a GGUF file on this machine, by the tensors in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimate: Option<ModelEstimate>,
    /// Why there is no estimate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_estimated: Option<String>,
}

impl ModelDescription {
    fn new(reference: &str) -> Self {
        Self {
            reference: reference.to_owned(),
            entry: None,
            path: None,
            #[cfg(feature = "hub")]
            hub: None,
            files: Vec::new(),
            estimate: None,
            not_estimated: None,
        }
    }

    /// The bytes of all files; those of a repository are what the hub claims.
    pub fn bytes(&self) -> u64 {
        self.files
            .iter()
            .fold(0, |sum, file| sum.saturating_add(file.bytes))
    }

    /// How it would fit a device, with a sequence of 8192 tokens or of its whole context where that is less.
    pub fn compatibility(&self, device: &DeviceDescription) -> Compatibility {
        let Some(estimate) = &self.estimate else {
            return Compatibility::Unknown;
        };
        let mut entry = ModelEntry::from(ModelConfiguration {
            parameters: estimate.parameters,
            active_parameters: Some(estimate.active_parameters),
            size_bytes: estimate.weight_bytes,
            context_length: estimate
                .context_length
                .map_or(0, |tokens| u32::try_from(tokens).unwrap_or(u32::MAX)),
            ..ModelConfiguration::new(self.reference.clone(), ModelType::Base)
        });
        entry.cache = Some(estimate.cache);
        ModelRegistry::builtin().compatibility(&entry, device)
    }

    /// Takes in what a `config.json` says.
    fn configured(&mut self, text: &str) {
        match ModelEstimate::from_config_text(text) {
            Ok(estimate) => self.estimate = Some(estimate),
            Err(error) => self.not_estimated = Some(error.to_string()),
        }
    }

    /// Takes in what a folder or a file on this machine is.
    fn on_disk(&mut self, path: &Path) -> Result<(), EngineError> {
        let unreadable = |error: std::io::Error| EngineError::model_load(self.reference.clone(), error);
        self.files = files_of(path).map_err(unreadable)?;
        self.path = Some(path.to_owned());
        if path.is_file() {
            self.of_file(path);
            return Ok(());
        }
        match std::fs::read_to_string(path.join("config.json")) {
            Ok(text) => self.configured(&text),
            Err(error) => self.not_estimated = Some(format!("`config.json` cannot be read: {error}")),
        }
        Ok(())
    }

    #[cfg(feature = "mlx")]
    fn of_file(&mut self, path: &Path) {
        match gguf::estimate(path) {
            Ok(estimate) => self.estimate = Some(estimate),
            Err(error) => self.not_estimated = Some(error.to_string()),
        }
    }

    #[cfg(not(feature = "mlx"))]
    fn of_file(&mut self, _path: &Path) {
        self.not_estimated = Some("this build reads no model files".to_owned());
    }
}

/// The files of a folder, not of those in it, or the one that a path is.
fn files_of(path: &Path) -> std::io::Result<Vec<DescribedFile>> {
    let described = |path: &Path| -> std::io::Result<Option<DescribedFile>> {
        let meta = std::fs::metadata(path)?;
        let name = path.file_name().unwrap_or(path.as_os_str());
        Ok(meta.is_file().then(|| DescribedFile {
            path: name.to_string_lossy().into_owned(),
            bytes: meta.len(),
        }))
    };
    let mut files = Vec::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            // A link that leads nowhere is no file.
            files.extend(described(&entry?.path()).ok().flatten());
        }
    } else {
        files.extend(described(path)?);
    }
    files.sort();
    Ok(files)
}

/// Describes a model that is on this machine, whatever it is called by. Nobody is asked for it.
///
/// ```no_run
/// use mlx_engine::{ModelRegistry, describe_local};
///
/// let model = describe_local("./Qwen3-0.6B-4bit", ModelRegistry::builtin())?;
/// println!("{} files, {} bytes", model.files.len(), model.bytes());
/// if let Some(estimate) = &model.estimate {
///     println!("{} parameters, {} bytes at 8192 tokens", estimate.parameters, estimate.memory(8192).total());
/// }
/// # Ok::<(), mlx_engine::EngineError>(())
/// ```
///
/// # Errors
///
/// [`EngineError::ModelNotFound`], and [`EngineError::ModelLoad`] where its folder cannot be read. A model whose
/// configuration says too little is described without an estimate.
pub fn describe_local(reference: &str, registry: &ModelRegistry) -> Result<ModelDescription, EngineError> {
    let location = locate(reference, registry)?;
    let mut description = ModelDescription::new(reference);
    if let ModelReference::Hub(model, _) = ModelReference::parse(reference, registry)? {
        description.entry = registry.entry(model.repo.as_str()).ok().cloned();
    }
    description.on_disk(&location.path)?;
    Ok(description)
}

/// Describes a model: a path by what is there, anything else by what the hub says of it, with the estimates of its
/// `config.json`. Nothing is fetched into the cache; where the hub cannot be asked, what the cache has is described.
///
/// # Errors
///
/// [`EngineError::ModelNotFound`] and [`EngineError::ModelFetch`]; as [`describe_local`] for a path.
#[cfg(feature = "hub")]
pub async fn describe(
    reference: &str,
    registry: &ModelRegistry,
    hub: &Hub,
) -> Result<ModelDescription, EngineError> {
    let (model, _) = match ModelReference::parse(reference, registry)? {
        ModelReference::Path(_) => return describe_local(reference, registry),
        ModelReference::Hub(model, entry) => (model, entry),
    };
    let mut description = ModelDescription::new(reference);
    description.entry = registry.entry(model.repo.as_str()).ok().cloned();
    let here = hub.cache().find(&model);
    let info = match hub.info(&model).await {
        Ok(info) => info,
        Err(error) => match here {
            Ok(path) if error.is_about_the_way() => {
                description.on_disk(&path)?;
                return Ok(description);
            }
            _ => return Err(crate::fetch::failed(&model, error)),
        },
    };
    of_hub(&mut description, &model, &info, hub).await?;
    if let Ok(path) = here {
        if path.is_file() {
            description.of_file(&path);
        }
        description.path = Some(path);
    }
    description.hub = Some(info);
    Ok(description)
}

/// Takes in what the hub says.
#[cfg(feature = "hub")]
async fn of_hub(
    description: &mut ModelDescription,
    model: &HubReference,
    info: &ModelInfo,
    hub: &Hub,
) -> Result<(), EngineError> {
    let wanted = |path: &RepoPath| model.file.as_ref().is_none_or(|file| file == path);
    description.files = info
        .files
        .iter()
        .filter(|file| wanted(&file.path))
        .map(|file| DescribedFile {
            path: file.path.to_string(),
            bytes: file.bytes,
        })
        .collect();
    if let Some(file) = &model.file {
        if description.files.is_empty() {
            return Err(EngineError::ModelNotFound {
                reference: model.to_string(),
                hint: Some(format!(
                    "`{}` has no such file; `models show {}` lists those that it has",
                    model.repo, model.repo
                )),
            });
        }
        description.not_estimated = Some(format!("`{file}` says it, which is not here"));
        return Ok(());
    }
    let config = info.files.iter().find(|file| file.path.as_str() == "config.json");
    let Some(config) = config else {
        description.not_estimated = Some("it has no `config.json`".to_owned());
        return Ok(());
    };
    match hub.read(info, &config.path).await {
        Ok(text) => description.configured(&String::from_utf8_lossy(&text)),
        // The page is worth having without it: terms that nobody accepted keep files back, not their list.
        Err(error) => description.not_estimated = Some(error.to_string()),
    }
    Ok(())
}

/// GGUF files, by their own tensors.
#[cfg(feature = "mlx")]
mod gguf {
    use std::path::Path;

    use mlx_engine_checkpoint::{CheckpointError, GgufFile, Metadata};
    use mlx_engine_registry::{CacheShape, ModelEstimate};

    /// Counts the tensors. What a sequence keeps follows from the metadata, for an attention that sees everything.
    pub(super) fn estimate(path: &Path) -> Result<ModelEstimate, CheckpointError> {
        let file = GgufFile::open(path)?;
        let metadata = file.metadata();
        let family = metadata.string("general.architecture")?;
        let parameters = file.tensors().map(|tensor| tensor.elements() as u64).sum();
        let experts = metadata.optional_u64(&format!("{family}.expert_count"))?;
        let context_length = metadata.optional_u64(&format!("{family}.context_length"))?;
        let token_bytes = token_bytes(metadata, family)?;
        Ok(ModelEstimate {
            model_type: family.to_owned(),
            // Which of the experts take part is not counted here.
            is_exact: experts.is_none_or(|count| count == 0) && token_bytes.is_some(),
            parameters,
            active_parameters: parameters,
            vision_parameters: 0,
            weight_bytes: file.total_bytes(),
            step_bytes: file.total_bytes(),
            bits: None,
            cache: CacheShape {
                token_bytes: token_bytes.unwrap_or_default(),
                ..CacheShape::default()
            },
            context_length,
        })
    }

    /// Bytes of keys and values of a token in all layers, 16 bits a number.
    fn token_bytes(metadata: &Metadata, family: &str) -> Result<Option<u64>, CheckpointError> {
        let number = |name: &str| metadata.optional_u64(&format!("{family}.{name}"));
        let (Some(layers), Some(hidden)) = (number("block_count")?, number("embedding_length")?) else {
            return Ok(None);
        };
        // A list of a number for each layer is none of these.
        let Some(heads) = number("attention.head_count")?.filter(|heads| *heads > 0) else {
            return Ok(None);
        };
        let kv_heads = number("attention.head_count_kv")?.unwrap_or(heads);
        let keys = number("attention.key_length")?.unwrap_or(hidden / heads);
        let values = number("attention.value_length")?.unwrap_or(hidden / heads);
        let numbers = keys
            .saturating_add(values)
            .saturating_mul(kv_heads)
            .saturating_mul(layers);
        Ok(Some(numbers.saturating_mul(2)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "mlx")]
    #[test]
    fn a_gguf_file_is_described_by_its_own_tensors() {
        let model = std::env::var("MLX_ENGINE_TEST_MODEL");
        let model =
            model.expect("MLX_ENGINE_TEST_MODEL names the test model; run the tests by `cargo xtask test`");
        let described = describe_local(&model, ModelRegistry::builtin()).unwrap();
        let estimate = described.estimate.clone().unwrap();
        assert_eq!((&*estimate.model_type, estimate.is_exact), ("llama", true));
        // As its maker counts them, and 30 layers of 3 heads with 64 numbers of 2 bytes, for keys and for values.
        assert_eq!(estimate.parameters, 134_515_008);
        assert_eq!(estimate.cache.token_bytes, 30 * 3 * 64 * 2 * 2);
        assert_eq!(estimate.context_length, Some(8192));
        assert_eq!(estimate.weight_bytes, described.bytes(), "the whole file");
        assert_eq!(described.files.len(), 1);

        let folder = tempfile::tempdir().unwrap();
        let broken = folder.path().join("broken.gguf");
        std::fs::write(&broken, "GGUF").unwrap();
        let described = describe_local(broken.to_str().unwrap(), ModelRegistry::builtin()).unwrap();
        assert!(described.not_estimated.is_some() && described.estimate.is_none());
        assert_eq!(described.bytes(), 4);
    }

    #[test]
    fn what_is_not_there_is_not_described() {
        let error = describe_local("/no/such/model.gguf", ModelRegistry::builtin()).unwrap_err();
        assert!(matches!(error, EngineError::ModelNotFound { .. }), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_that_leads_nowhere_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/no/such/blob", folder.path().join("model.safetensors")).unwrap();
        std::fs::write(folder.path().join("a.txt"), "a").unwrap();
        let model = describe_local(folder.path().to_str().unwrap(), ModelRegistry::builtin()).unwrap();
        assert_eq!(model.files.len(), 1);
        assert_eq!(model.files[0].path, "a.txt");
    }

    #[test]
    fn a_folder_is_described_by_its_files_and_its_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().to_str().unwrap();
        let described = || describe_local(here, ModelRegistry::builtin()).unwrap();
        assert!(
            described()
                .not_estimated
                .unwrap()
                .contains("`config.json` cannot be read")
        );
        std::fs::create_dir(folder.path().join("onnx")).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), "weights").unwrap();
        let config = include_str!("../../registry/tests/fixtures/published/Qwen3-8B.json");
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let model = described();
        let names: Vec<_> = model.files.iter().map(|file| (&*file.path, file.bytes)).collect();
        assert_eq!(
            names,
            [("config.json", config.len() as u64), ("model.safetensors", 7)]
        );
        assert_eq!(model.bytes(), config.len() as u64 + 7);
        assert_eq!(model.estimate.as_ref().unwrap().parameters, 8_190_735_360);
        let fits = |gigabytes: u64| {
            model
                .compatibility(&DeviceDescription::new(gigabytes << 30, 0))
                .is_possible()
        };
        assert!(fits(64) && !fits(16));
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let model = described();
        assert_eq!(
            model.not_estimated.as_deref(),
            Some("the configuration has no `model_type`")
        );
        assert_eq!(
            model.compatibility(&DeviceDescription::new(1 << 40, 0)),
            Compatibility::Unknown
        );
    }
}
