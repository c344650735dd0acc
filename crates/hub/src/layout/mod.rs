//! The folders of the cache, as Python's `huggingface_hub` lays them out.
//!
//! ```text
//! models--owner--name/
//!   blobs/HASH                      the content of a file
//!   blobs/HASH.incomplete           what has come of it
//!   snapshots/COMMIT/PATH           a link to ../../blobs/HASH
//!   refs/REVISION                   the commit that a branch or tag stood at
//!   trees/COMMIT.json               all files of a commit, where Python wrote it
//! .locks/models--owner--name/HASH.lock
//! ```

#[cfg(any(feature = "fetch", test))]
pub(crate) mod write;

use std::fs;
use std::path::{Path, PathBuf};

use crate::BlobHash;
use crate::names::{RepoId, Revision, is_commit};

/// What the name of a half-made blob ends with.
pub(crate) const INCOMPLETE: &str = ".incomplete";

/// What the name of a file begins with that is being made beside its place.
pub(crate) const BESIDE: &str = ".mlx-engine-";

/// The folder of a repository in the cache.
#[derive(Clone, Debug)]
pub(crate) struct RepoFolder {
    pub(crate) root: PathBuf,
    pub(crate) locks: PathBuf,
}

impl RepoFolder {
    pub(crate) fn new(cache: &Path, repo: &RepoId) -> Self {
        let name = repo.folder_name();
        Self {
            root: cache.join(&name),
            locks: cache.join(".locks").join(name),
        }
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    pub(crate) fn blob(&self, hash: &BlobHash) -> PathBuf {
        self.blobs().join(hash.to_string())
    }

    #[cfg(feature = "fetch")]
    pub(crate) fn incomplete(&self, hash: &BlobHash) -> PathBuf {
        self.blobs().join(format!("{hash}{INCOMPLETE}"))
    }

    /// The lock of whoever writes a blob.
    #[cfg(feature = "fetch")]
    pub(crate) fn blob_lock(&self, hash: &BlobHash) -> PathBuf {
        self.locks.join(format!("{hash}.lock"))
    }

    /// The lock that those who add to the repository share, and who removes from it has alone.
    pub(crate) fn lock(&self) -> PathBuf {
        self.locks.join("repository.lock")
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.snapshots().join(commit)
    }

    pub(crate) fn refs(&self) -> PathBuf {
        self.root.join("refs")
    }

    pub(crate) fn tree(&self, commit: &str) -> PathBuf {
        self.root.join("trees").join(format!("{commit}.json"))
    }

    /// The commit that a revision stood at when it was fetched last.
    pub(crate) fn commit(&self, revision: &Revision) -> Option<String> {
        if revision.is_commit() {
            return Some(revision.to_string());
        }
        let text = fs::read_to_string(self.refs().join(revision.as_str())).ok()?;
        let commit = text.trim();
        // It becomes part of a path.
        is_commit(commit).then(|| commit.to_owned())
    }
}
