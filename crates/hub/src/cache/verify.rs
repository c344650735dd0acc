//! Whether the files are still what they were.

use std::fs::File;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;

use serde::Serialize;

use super::{HubCache, shards};
use crate::error::{Context, Result};
use crate::names::{HubReference, RepoId, RepoPath};
use crate::{BlobHash, HubError};

/// How a file of the cache is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum FileState {
    /// Its content has the hash that its blob is named by.
    Sound,
    /// Its content has another hash.
    Damaged {
        /// The hash of the content.
        got: String,
    },
    /// It is not there.
    Missing,
    /// Its blob is not named by a hash, or it has none, so that there is nothing to compare with.
    Unknown,
}

/// What a comparison of all files with their hashes found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Verification {
    /// The repository.
    pub repo: RepoId,
    /// The commit.
    pub commit: String,
    /// Every file with its state, by path.
    pub files: Vec<(RepoPath, FileState)>,
}

impl Verification {
    /// Whether no file is damaged or missing.
    pub fn is_sound(&self) -> bool {
        self.broken().next().is_none()
    }

    /// The files that are damaged or missing.
    pub fn broken(&self) -> impl Iterator<Item = &RepoPath> {
        let broken = |state: &FileState| matches!(state, FileState::Damaged { .. } | FileState::Missing);
        self.files
            .iter()
            .filter(move |(_, state)| broken(state))
            .map(|(path, _)| path)
    }
}

impl HubCache {
    /// Reads every file of a cached revision, or the one that the reference names, and compares it with the hash that its
    /// blob is named by. It blocks.
    ///
    /// `progress` is told the bytes read so far and those of all files, and ends the work with
    /// [`ControlFlow::Break`].
    ///
    /// # Errors
    ///
    /// [`HubError::NotCached`], [`HubError::Cancelled`], and what the disk says.
    pub fn verify(
        &self,
        reference: &HubReference,
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Verification> {
        let not_cached = || HubError::NotCached {
            what: reference.to_string(),
            cache: self.root().to_owned(),
        };
        let commit = self.commit(reference).ok_or_else(not_cached)?;
        let cached = self.repository(&reference.repo)?.ok_or_else(not_cached)?;
        let revision = cached
            .revisions
            .into_iter()
            .find(|revision| revision.commit == commit);
        let revision = revision.ok_or_else(not_cached)?;
        let folder = self.folder(&reference.repo);
        let wanted = |path: &RepoPath| reference.file.as_ref().is_none_or(|file| file == path);
        let all = revision.files.iter().filter(|file| wanted(&file.path));
        let total: u64 = all.filter_map(|file| file.bytes).sum();
        let mut read = 0;
        let mut files = Vec::with_capacity(revision.files.len());
        for file in revision.files {
            if !wanted(&file.path) {
                continue;
            }
            let expected = file
                .blob
                .as_deref()
                .and_then(|blob| blob.parse::<BlobHash>().ok());
            let state = match (file.bytes, expected) {
                (None, _) => FileState::Missing,
                (_, None) => FileState::Unknown,
                (Some(_), Some(expected)) => {
                    let got = hash(&folder.blob(&expected), &expected, &mut |bytes| {
                        read += bytes;
                        progress(read, total)
                    })?;
                    if got == expected {
                        FileState::Sound
                    } else {
                        FileState::Damaged { got: got.to_string() }
                    }
                }
            };
            files.push((file.path, state));
        }
        let index = folder.snapshot(&commit).join("model.safetensors.index.json");
        for shard in std::fs::read(index)
            .ok()
            .and_then(|index| shards(&index))
            .unwrap_or_default()
        {
            if wanted(&shard) && !files.iter().any(|(path, _)| *path == shard) {
                files.push((shard, FileState::Missing));
            }
        }
        if files.is_empty() {
            return Err(not_cached());
        }
        files.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(Verification {
            repo: reference.repo.clone(),
            commit,
            files,
        })
    }
}

/// The hash of a file, of the same kind as `like`.
fn hash(path: &Path, like: &BlobHash, tell: &mut dyn FnMut(u64) -> ControlFlow<()>) -> Result<BlobHash> {
    let mut file = File::open(path).context("read", path)?;
    let mut hasher = like.hasher(file.metadata().context("read", path)?.len());
    let mut buffer = vec![0; 1 << 18];
    loop {
        let count = file.read(&mut buffer).context("read", path)?;
        if count == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..count]);
        if tell(count as u64).is_break() {
            return Err(HubError::Cancelled);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{COMMIT, fill, set_ref};
    use super::*;

    #[test]
    fn a_changed_byte_and_a_lost_blob_are_found() {
        let root = tempfile::tempdir().unwrap();
        let cache = HubCache::new(root.path());
        let index = r#"{"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}"#;
        let files = [
            ("config.json", "{}"),
            ("lost.json", "[]"),
            ("model-1.safetensors", "weights"),
            ("model.safetensors.index.json", index),
        ];
        fill(&cache, "a/b", COMMIT, &files);
        set_ref(&cache, "a/b", "main", COMMIT);
        let reference: HubReference = "a/b".parse().unwrap();
        let folder = cache.folder(&reference.repo);
        let blob = |file: &str| std::fs::canonicalize(folder.snapshot(COMMIT).join(file)).unwrap();
        std::fs::write(blob("model-1.safetensors"), "weighty").unwrap();
        std::fs::remove_file(blob("lost.json")).unwrap();

        let mut seen = Vec::new();
        let found = cache
            .verify(&reference, |done, total| {
                seen.push((done, total));
                ControlFlow::Continue(())
            })
            .unwrap();
        let states: Vec<_> = found
            .files
            .iter()
            .map(|(path, state)| (path.as_str(), state))
            .collect();
        // From `git hash-object`.
        let got = "eee70783412698612fa8210943dfe274bbc8083a".to_owned();
        assert_eq!(states[2], ("model-1.safetensors", &FileState::Damaged { got }));
        assert_eq!(
            [states[0], states[1], states[3], states[4]],
            [
                ("config.json", &FileState::Sound),
                ("lost.json", &FileState::Missing),
                ("model-2.safetensors", &FileState::Missing),
                ("model.safetensors.index.json", &FileState::Sound),
            ]
        );
        assert!(!found.is_sound());
        assert_eq!(found.broken().count(), 3);
        assert_eq!(
            seen.last(),
            Some(&(9 + index.len() as u64, 9 + index.len() as u64))
        );

        let one: HubReference = "hf:a/b/model-1.safetensors".parse().unwrap();
        let mut last = None;
        let found = cache
            .verify(&one, |done, total| {
                last = Some((done, total));
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(
            (found.files.len(), last),
            (1, Some((7, 7))),
            "the one that is named"
        );
        let none: HubReference = "hf:a/b/other.gguf".parse().unwrap();
        assert!(matches!(
            cache.verify(&none, |_, _| ControlFlow::Continue(())),
            Err(HubError::NotCached { .. })
        ));

        let stopped = cache.verify(&reference, |_, _| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(HubError::Cancelled)));
        assert!(matches!(
            cache.verify(&"a/c".parse().unwrap(), |_, _| ControlFlow::Continue(())),
            Err(HubError::NotCached { .. })
        ));
    }
}
