//! From what a user calls a model to the files.

use std::path::{Path, PathBuf};

use mlx_engine_core::{EngineError, ModelConfiguration};
use mlx_engine_hub::{Environment, HubCache, HubReference};
use mlx_engine_registry::{ModelRegistry, RegistryError};

/// A model's files, and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelLocation {
    /// The folder or the `.gguf` file.
    pub path: PathBuf,
    /// The registry's entry, for a model that has one.
    pub configuration: Option<ModelConfiguration>,
}

/// What a user means by the name of a model. Everything that takes a model takes all of these.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ModelReference {
    /// A folder or a `.gguf` file that is there.
    Path(PathBuf),
    /// A repository of the hub, or a file in it, and the registry's entry where it has one.
    Hub(HubReference, Option<Box<ModelConfiguration>>),
}

impl ModelReference {
    /// Reads a path that exists; a name or an alias of the registry; `owner/name`; either of the two with `@revision`;
    /// `hf:owner/name` or `hf:owner/name/file.gguf`, where nothing else is meant.
    ///
    /// ```
    /// use mlx_engine::{ModelReference, ModelRegistry};
    ///
    /// let reference = ModelReference::parse("hf:owner/name@v1/model.gguf", ModelRegistry::builtin())?;
    /// assert!(matches!(reference, ModelReference::Hub(hub, None) if hub.revision.as_str() == "v1"));
    /// # Ok::<(), mlx_engine::EngineError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`EngineError::ModelNotFound`] with what may have been meant.
    pub fn parse(reference: &str, registry: &ModelRegistry) -> Result<Self, EngineError> {
        let path = Path::new(reference);
        if path.exists() {
            return Ok(Self::Path(path.to_owned()));
        }
        if reference.starts_with("hf:") {
            let found: HubReference = reference
                .parse()
                .map_err(|error: mlx_engine_hub::HubError| not_found(reference, error.to_string()))?;
            let entry = registry.get(found.repo.as_str()).ok();
            let entry = entry.filter(|_| found.file.is_none()).cloned().map(Box::new);
            return Ok(Self::Hub(found, entry));
        }
        let looks_like_path = path.is_absolute()
            || reference.starts_with(['.', '~'])
            || path
                .extension()
                .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if looks_like_path {
            return Err(not_found(reference, "there is no such file or folder".to_owned()));
        }
        let (name, revision) = match reference.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (reference, None),
        };
        match registry.get(name) {
            Ok(entry) => {
                let text = match revision {
                    Some(revision) => format!("{}@{revision}", entry.id),
                    None => entry.id.clone(),
                };
                let found = text
                    .parse()
                    .map_err(|error: mlx_engine_hub::HubError| not_found(reference, error.to_string()))?;
                Ok(Self::Hub(found, Some(Box::new(entry.clone()))))
            }
            Err(error @ RegistryError::Ambiguous { .. }) => Err(error.into()),
            Err(error) => match reference.parse() {
                Ok(found) => Ok(Self::Hub(found, None)),
                Err(_) => Err(error.into()),
            },
        }
    }
}

fn not_found(reference: &str, hint: String) -> EngineError {
    EngineError::ModelNotFound {
        reference: reference.to_owned(),
        hint: Some(hint),
    }
}

/// Finds a model that is on this machine: a path, or what a name means in the hub's local cache. Nobody is asked for it.
///
/// # Errors
///
/// [`EngineError::ModelNotFound`] with where was looked and what may have been meant.
///
/// ```
/// use mlx_engine::{ModelRegistry, locate};
///
/// let error = locate("nobody/no-such-model", ModelRegistry::builtin()).unwrap_err();
/// assert!(error.hint().is_some());
/// ```
pub fn locate(reference: &str, registry: &ModelRegistry) -> Result<ModelLocation, EngineError> {
    locate_in(reference, registry, hub_cache().as_deref())
}

fn locate_in(
    reference: &str,
    registry: &ModelRegistry,
    hub: Option<&Path>,
) -> Result<ModelLocation, EngineError> {
    let (found, entry) = match ModelReference::parse(reference, registry)? {
        ModelReference::Path(path) => {
            return Ok(ModelLocation {
                path,
                configuration: None,
            });
        }
        ModelReference::Hub(found, entry) => (found, entry),
    };
    let Some(hub) = hub else {
        return Err(not_found(
            reference,
            "HOME is not set, so there is no cache to look in; give a path".to_owned(),
        ));
    };
    match HubCache::new(hub).find(&found) {
        Ok(path) => Ok(ModelLocation {
            path,
            configuration: entry.map(|entry| *entry),
        }),
        Err(_) => Err(not_found(
            reference,
            format!(
                "`{found}` is not in the cache at {}; fetch it first (`mlx-engine models pull {found}`), or give the path \
                 of a folder or a .gguf file",
                hub.display()
            ),
        )),
    }
}

/// The variable that names a user's own list of models.
pub const MODELS_VARIABLE: &str = "MLX_ENGINE_MODELS";

/// The built-in registry, and over it the list of the file that the variable [`MODELS_VARIABLE`] names, where it does.
///
/// # Errors
///
/// [`RegistryError::Unreadable`] and what [`ModelRegistry::layer`] refuses.
pub fn user_registry() -> Result<ModelRegistry, RegistryError> {
    let mut registry = ModelRegistry::builtin().clone();
    if let Some(path) = std::env::var_os(MODELS_VARIABLE).filter(|path| !path.is_empty()) {
        registry.layer_file(Path::new(&path))?;
    }
    Ok(registry)
}

/// The hub's cache, by the variables that Python's `huggingface_hub` reads.
pub fn hub_cache() -> Option<PathBuf> {
    Environment::read().cache
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "95d09f2b10159347eece71399a7e2e907ea3df4f";

    fn error(reference: &str, hub: &Path) -> String {
        let error = locate_in(reference, ModelRegistry::builtin(), Some(hub)).unwrap_err();
        format!("{error}: {}", error.hint().unwrap_or_default())
    }

    #[test]
    fn paths_names_and_hub_ids_are_found() {
        let hub = tempfile::tempdir().unwrap();
        let registry = ModelRegistry::builtin();
        let here = hub.path().to_str().unwrap();
        assert_eq!(locate_in(here, registry, None).unwrap().path, hub.path());

        let known = registry.models().next().unwrap();
        for id in [known.id.as_str(), "someone/some-model"] {
            let repository = hub.path().join(format!("models--{}", id.replace('/', "--")));
            std::fs::create_dir_all(repository.join("refs")).unwrap();
            let snapshot = repository.join("snapshots").join(COMMIT);
            std::fs::create_dir_all(&snapshot).unwrap();
            std::fs::write(repository.join("refs/main"), COMMIT).unwrap();
            for file in ["config.json", "model.safetensors", "some.gguf"] {
                std::fs::write(snapshot.join(file), "{}").unwrap();
            }
        }
        let found = locate_in(&known.id, registry, Some(hub.path())).unwrap();
        assert_eq!(found.configuration.as_ref(), Some(known));
        let found = locate_in("someone/some-model", registry, Some(hub.path())).unwrap();
        assert!(
            found
                .path
                .ends_with(format!("models--someone--some-model/snapshots/{COMMIT}"))
                && found.configuration.is_none()
        );
        let find = |reference: &str| locate_in(reference, registry, Some(hub.path())).unwrap();
        assert_eq!(find("someone/some-model@main"), found);
        assert_eq!(find(&format!("someone/some-model@{COMMIT}")), found);
        assert_eq!(find("hf:someone/some-model"), found);
        let file = find("hf:someone/some-model/some.gguf").path;
        assert_eq!(file, found.path.join("some.gguf"));
        let entry = find(&format!("hf:{}", known.id)).configuration;
        assert_eq!(entry.as_ref(), Some(known));
        if let Some(alias) = known.aliases.first() {
            assert_eq!(find(&format!("{alias}@main")).configuration.as_ref(), Some(known));
        }
    }

    #[test]
    fn what_is_not_found_says_where_was_looked() {
        let hub = tempfile::tempdir().unwrap();
        let found = error("./no/such.gguf", hub.path());
        assert_eq!(
            found,
            "model `./no/such.gguf` not found: there is no such file or folder"
        );
        let found = error("someone/else", hub.path());
        assert!(
            found.contains("`someone/else` is not in the cache at "),
            "{found}"
        );
        let id = &ModelRegistry::builtin().models().next().unwrap().id;
        let found = error(&id[..id.len() - 1], hub.path());
        assert!(found.contains("not found"), "{found}");
        let found = error("../../etc/passwd/../x", hub.path());
        assert!(found.contains("there is no such file or folder"), "{found}");
        assert!(error("smollm2", hub.path()).contains("smollm2"));
        let found = error("hf:someone/else/../x.gguf", hub.path());
        assert!(found.contains("it would lead out of its folder"), "{found}");
        let found = error(&format!("{id}@.."), hub.path());
        assert!(found.contains("revision `..` is refused"), "{found}");
    }
}
