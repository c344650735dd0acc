//! What is on this machine already.

mod list;
mod remove;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};

pub use list::{CachedFile, CachedRepository, CachedRevision};
pub use remove::{Freed, PruneReport};
pub use verify::{FileState, Verification};

use crate::error::Result;
use crate::layout::RepoFolder;
use crate::names::{HubReference, RepoId, RepoPath};
use crate::{Environment, HubError};

/// The local cache of the hub, in the layout of Python's `huggingface_hub`. It asks no network for anything.
///
/// ```no_run
/// use mlx_engine_hub::HubCache;
///
/// let cache = HubCache::from_env()?;
/// for model in cache.repositories()? {
///     println!("{} {} MB", model.repo, model.bytes / 1_000_000);
/// }
/// let folder = cache.find(&"mlx-community/Qwen3-0.6B-4bit".parse()?)?;
/// # Ok::<(), mlx_engine_hub::HubError>(())
/// ```
#[derive(Clone, Debug)]
pub struct HubCache {
    root: PathBuf,
}

impl HubCache {
    /// The cache in a folder, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The cache that the environment names.
    ///
    /// # Errors
    ///
    /// [`HubError::NoCache`] where it names none.
    pub fn from_env() -> Result<Self> {
        Environment::read().cache.map(Self::new).ok_or(HubError::NoCache)
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn folder(&self, repo: &RepoId) -> RepoFolder {
        RepoFolder::new(&self.root, repo)
    }

    /// The folder of a model that is here whole, or the one file that the reference names. A snapshot that Python made
    /// is as good as one of ours.
    ///
    /// # Errors
    ///
    /// [`HubError::NotCached`] where it is not here, or not all of it.
    pub fn find(&self, reference: &HubReference) -> Result<PathBuf> {
        let folder = self.folder(&reference.repo);
        let found = folder.commit(&reference.revision).and_then(|commit| {
            let snapshot = folder.snapshot(&commit);
            match &reference.file {
                Some(file) => Some(snapshot.join(file.to_path())).filter(|path| path.is_file()),
                None => is_whole(&folder, &commit).then_some(snapshot),
            }
        });
        found.ok_or_else(|| HubError::NotCached {
            what: reference.to_string(),
            cache: self.root.clone(),
        })
    }

    /// The commit that a revision stood at when it was fetched last.
    pub fn commit(&self, reference: &HubReference) -> Option<String> {
        self.folder(&reference.repo).commit(&reference.revision)
    }
}

/// Whether the engine reads a file of a repository: weights as safetensors, and JSON and templates beside them. Never
/// what Python would run, such as pickles.
pub fn engine_reads(path: &RepoPath) -> bool {
    let weights = path.has_extension("safetensors") && path.as_str().starts_with("model");
    path.is_top_level() && (weights || path.has_extension("json") || path.has_extension("jinja"))
}

/// Whether a snapshot has all that a model needs.
fn is_whole(folder: &RepoFolder, commit: &str) -> bool {
    let snapshot = folder.snapshot(commit);
    // Python may be at it, and may have written the ref before the files.
    if !snapshot.join("config.json").is_file() {
        return false;
    }
    if let Some(files) = files_of_tree(folder, commit) {
        return files
            .iter()
            .filter(|path| engine_reads(path))
            .all(|path| snapshot.join(path.to_path()).is_file());
    }
    if let Ok(index) = fs::read(snapshot.join("model.safetensors.index.json")) {
        return shards(&index).is_some_and(|shards| {
            shards
                .iter()
                .all(|shard| snapshot.join(shard.to_path()).is_file())
        });
    }
    let names = fs::read_dir(&snapshot).into_iter().flatten().flatten();
    let mut weights = names
        .filter_map(|entry| entry.file_name().into_string().ok()?.parse::<RepoPath>().ok())
        .filter(|path| engine_reads(path) && path.has_extension("safetensors"))
        .peekable();
    weights.peek().is_some() && weights.all(|path| snapshot.join(path.to_path()).is_file())
}

/// The shards that an index of weights names.
fn shards(index: &[u8]) -> Option<Vec<RepoPath>> {
    let index: serde_json::Value = serde_json::from_slice(index).ok()?;
    let names = index.get("weight_map")?.as_object()?.values();
    let mut names: Vec<RepoPath> = names
        .map(|name| name.as_str()?.parse().ok())
        .collect::<Option<_>>()?;
    names.sort();
    names.dedup();
    Some(names)
}

/// All files of a commit, where Python has written them down.
fn files_of_tree(folder: &RepoFolder, commit: &str) -> Option<Vec<RepoPath>> {
    let text = fs::read(folder.tree(commit)).ok()?;
    let tree: serde_json::Value = serde_json::from_slice(&text).ok()?;
    if tree.get("format_version")? != 1 {
        return None;
    }
    let names = tree.get("files")?.as_object()?.keys();
    names.map(|name| name.parse().ok()).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::BlobHash;

    pub(crate) const COMMIT: &str = "95d09f2b10159347eece71399a7e2e907ea3df4f";

    /// Puts files into a cache, each with its blob under git's hash.
    pub(crate) fn fill(cache: &HubCache, repo: &str, commit: &str, files: &[(&str, &str)]) {
        let folder = cache.folder(&repo.parse().unwrap());
        fs::create_dir_all(folder.blobs()).unwrap();
        let kind = BlobHash::GitSha1([0; 20]);
        for (path, content) in files {
            let mut hasher = kind.hasher(content.len() as u64);
            hasher.update(content.as_bytes());
            let hash = hasher.finish();
            fs::write(folder.blob(&hash), content).unwrap();
            folder.link(commit, &path.parse().unwrap(), &hash).unwrap();
        }
    }

    pub(crate) fn set_ref(cache: &HubCache, repo: &str, name: &str, commit: &str) {
        let folder = cache.folder(&repo.parse().unwrap());
        crate::layout::write::write_whole(&folder.refs().join(name), commit.as_bytes()).unwrap();
    }

    #[test]
    fn a_model_is_found_when_it_is_whole() {
        let root = tempfile::tempdir().unwrap();
        let cache = HubCache::new(root.path());
        let found = |reference: &str| {
            let path = cache.find(&reference.parse().unwrap()).ok()?;
            Some(
                path.strip_prefix(root.path())
                    .unwrap()
                    .to_string_lossy()
                    .into_owned(),
            )
        };
        let snapshot = format!("models--a--b/snapshots/{COMMIT}");
        fill(&cache, "a/b", COMMIT, &[("config.json", "{}")]);
        assert_eq!(found("a/b"), None, "no ref and no weights");
        set_ref(&cache, "a/b", "main", COMMIT);
        assert_eq!(found("a/b"), None, "no weights");
        fill(&cache, "a/b", COMMIT, &[("model.safetensors", "w")]);
        assert_eq!(found("a/b"), Some(snapshot.clone()));
        assert_eq!(found(&format!("a/b@{COMMIT}")), Some(snapshot.clone()));
        assert_eq!(found("a/b@other"), None);
        assert_eq!(
            found("hf:a/b/config.json"),
            Some(format!("{snapshot}/config.json"))
        );
        assert_eq!(found("hf:a/b/other.gguf"), None);

        let index = r#"{"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}"#;
        let files = [
            ("model.safetensors.index.json", index),
            ("model-1.safetensors", "1"),
        ];
        fill(&cache, "a/b", COMMIT, &files);
        assert_eq!(found("a/b"), None, "a shard is missing");
        fill(&cache, "a/b", COMMIT, &[("model-2.safetensors", "2")]);
        assert_eq!(found("a/b"), Some(snapshot.clone()));
        let hostile = r#"{"weight_map": {"x": "../../../secret"}}"#;
        fill(
            &cache,
            "a/b",
            COMMIT,
            &[("model.safetensors.index.json", hostile)],
        );
        assert_eq!(found("a/b"), None, "an index that leads out of the folder");
    }

    #[test]
    fn pythons_list_of_files_tells_what_is_missing() {
        let root = tempfile::tempdir().unwrap();
        let cache = HubCache::new(root.path());
        let files = [("config.json", "{}"), ("model.safetensors", "w")];
        fill(&cache, "a/b", COMMIT, &files);
        set_ref(&cache, "a/b", "main", COMMIT);
        let whole = |tree: &str| {
            let folder = cache.folder(&"a/b".parse().unwrap());
            crate::layout::write::write_whole(&folder.tree(COMMIT), tree.as_bytes()).unwrap();
            cache.find(&"a/b".parse().unwrap()).is_ok()
        };
        let tree = |file: &str| {
            format!(r#"{{"format_version": 1, "files": {{"config.json": {{}}, "{file}": {{}}}}}}"#)
        };
        assert!(whole(&tree("pytorch_model.bin")), "which nobody here reads");
        assert!(!whole(&tree("tokenizer.json")));
        assert!(whole("{}"), "a list of another kind counts for nothing");
    }

    #[test]
    fn the_engine_reads_no_pickles() {
        let reads = |path: &str| engine_reads(&path.parse().unwrap());
        for path in [
            "config.json",
            "model.safetensors",
            "model-00001-of-2.safetensors",
            "chat_template.jinja",
        ] {
            assert!(reads(path), "{path}");
        }
        for path in [
            "pytorch_model.bin",
            "model.pt",
            "onnx/config.json",
            "README.md",
            "consolidated.safetensors",
            "modeling.py",
            "model.gguf",
            "training_args.pkl",
        ] {
            assert!(!reads(path), "{path}");
        }
    }
}
