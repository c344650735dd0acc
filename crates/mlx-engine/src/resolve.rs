//! From what a user calls a model to the files.

use std::path::{Path, PathBuf};

use mlx_engine_core::{EngineError, ModelConfiguration};
use mlx_engine_registry::{ModelRegistry, RegistryError};

/// A model's files, and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelLocation {
    /// The folder or the `.gguf` file.
    pub path: PathBuf,
    /// The registry's entry, for a model that has one.
    pub configuration: Option<ModelConfiguration>,
}

/// Finds a model: a path that exists, a model of the registry, or a hub id, both in the hub's local cache.
///
/// # Errors
///
/// [`EngineError::ModelNotFound`] with where was looked and what may have been meant.
pub fn locate(reference: &str, registry: &ModelRegistry) -> Result<ModelLocation, EngineError> {
    locate_in(reference, registry, hub_cache().as_deref())
}

fn locate_in(
    reference: &str,
    registry: &ModelRegistry,
    hub: Option<&Path>,
) -> Result<ModelLocation, EngineError> {
    let path = Path::new(reference);
    if path.exists() {
        return Ok(ModelLocation {
            path: path.to_owned(),
            configuration: None,
        });
    }
    let not_found = |hint: String| EngineError::ModelNotFound {
        reference: reference.to_owned(),
        hint: Some(hint),
    };
    let looks_like_path = path.is_absolute()
        || reference.starts_with('.')
        || reference.starts_with('~')
        || path
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if looks_like_path {
        return Err(not_found("there is no such file or folder".to_owned()));
    }
    let (id, configuration) = match registry.get(reference) {
        Ok(entry) => (entry.id.clone(), Some(entry.clone())),
        Err(error @ RegistryError::Ambiguous { .. }) => return Err(error.into()),
        Err(_) if is_hub_id(reference) => (reference.to_owned(), None),
        Err(error) => return Err(error.into()),
    };
    let Some(hub) = hub else {
        return Err(not_found(
            "HOME is not set, so there is no cache to look in; give a path".to_owned(),
        ));
    };
    match snapshot(hub, &id) {
        Some(path) => Ok(ModelLocation { path, configuration }),
        None => Err(not_found(format!(
            "`{id}` is not in the cache at {}; fetch it there first, or give the path of a folder or a .gguf file",
            hub.display()
        ))),
    }
}

/// `owner/name`, as the hub allows them.
fn is_hub_id(reference: &str) -> bool {
    let valid = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|character| character.is_ascii_alphanumeric() || "-_.".contains(character))
    };
    reference
        .split_once('/')
        .is_some_and(|(owner, name)| valid(owner) && valid(name))
}

/// The folder of a cached repository's main revision, in the layout of Python's `huggingface_hub`.
fn snapshot(hub: &Path, id: &str) -> Option<PathBuf> {
    let repository = hub.join(format!("models--{}", id.replace('/', "--")));
    let commit = std::fs::read_to_string(repository.join("refs/main")).ok()?;
    let folder = repository.join("snapshots").join(commit.trim());
    folder.join("config.json").exists().then_some(folder)
}

/// The hub's cache, by the variables that Python's `huggingface_hub` reads.
pub fn hub_cache() -> Option<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("HF_HUB_CACHE")
        .or_else(|| set("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            std::fs::create_dir_all(repository.join("snapshots/abc")).unwrap();
            std::fs::write(repository.join("refs/main"), "abc\n").unwrap();
            std::fs::write(repository.join("snapshots/abc/config.json"), "{}").unwrap();
        }
        let found = locate_in(&known.id, registry, Some(hub.path())).unwrap();
        assert_eq!(found.configuration.as_ref(), Some(known));
        let found = locate_in("someone/some-model", registry, Some(hub.path())).unwrap();
        assert!(
            found.path.ends_with("models--someone--some-model/snapshots/abc")
                && found.configuration.is_none()
        );
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
    }
}
