//! Making room.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::Serialize;

use super::HubCache;
use super::list::{CachedFile, CachedRepository, CachedRevision, blobs};
use crate::HubError;
use crate::error::{Context, Result};
use crate::layout::{INCOMPLETE, RepoFolder};
use crate::lock::{Attempt, Lock, held_below};
use crate::names::{HubReference, RepoId, RepoPath};

/// What was removed, or would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Freed {
    /// The repository.
    pub repo: RepoId,
    /// The commits whose snapshots went.
    pub revisions: Vec<String>,
    /// How many blobs went, half-made ones among them.
    pub blobs: usize,
    /// The bytes of these.
    pub bytes: u64,
}

/// What a pruning removed, or would.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PruneReport {
    /// The repositories that something was removed from.
    pub freed: Vec<Freed>,
    /// Repositories that were left alone because someone works on them, and who.
    pub busy: Vec<(RepoId, String)>,
}

impl PruneReport {
    /// Bytes in total.
    pub fn bytes(&self) -> u64 {
        self.freed.iter().map(|freed| freed.bytes).sum()
    }
}

impl HubCache {
    /// Removes a model, or, where `all_revisions` is false, the one revision of the reference, or the one file that it
    /// names. Blobs that another file has stay.
    ///
    /// # Errors
    ///
    /// [`HubError::NotCached`], [`HubError::Busy`] while someone fetches it, and what the disk says.
    pub fn remove(&self, reference: &HubReference, all_revisions: bool) -> Result<Freed> {
        let not_cached = || HubError::NotCached {
            what: reference.to_string(),
            cache: self.root().to_owned(),
        };
        let folder = self.folder(&reference.repo);
        if !folder.root.is_dir() {
            return Err(not_cached());
        }
        let _alone = alone(&folder, &reference.repo)?;
        let cached = self.repository(&reference.repo)?.ok_or_else(not_cached)?;
        if let Some(path) = &reference.file {
            let commit = self.commit(reference).ok_or_else(not_cached)?;
            let freed = remove_one(&folder, &cached, &commit, path)?;
            return freed.ok_or_else(not_cached);
        }
        let gone: Vec<CachedRevision> = if all_revisions {
            cached.revisions.clone()
        } else {
            let commit = self.commit(reference).ok_or_else(not_cached)?;
            let named = |revision: &&CachedRevision| revision.commit == commit;
            let one = cached.revisions.iter().find(named).ok_or_else(not_cached)?;
            vec![one.clone()]
        };
        if gone.len() == cached.revisions.len() {
            return remove_all(&folder, &cached, false);
        }
        // Blobs of nobody are left for `prune`: a download that was stopped may go on with its own.
        let of_gone: BTreeSet<&str> = blobs_of(&gone).collect();
        let stay: Vec<_> = cached
            .revisions
            .iter()
            .filter(|revision| !gone.contains(revision))
            .cloned()
            .collect();
        let of_stay: BTreeSet<&str> = blobs_of(&stay).collect();
        let unshared = |name: &str| of_gone.contains(name) && !of_stay.contains(name);
        remove_some(&folder, &cached, &gone, unshared, false)
    }

    /// Removes what nobody refers to: revisions without a branch or a tag, blobs without a revision, and downloads that
    /// did not end. `dry_run` only says what would go.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn prune(&self, dry_run: bool) -> Result<PruneReport> {
        let mut report = PruneReport::default();
        for found in self.repositories()? {
            let folder = self.folder(&found.repo);
            let _alone = match alone(&folder, &found.repo) {
                Ok(lock) => lock,
                Err(HubError::Busy { holder, .. }) => {
                    report.busy.push((found.repo, holder));
                    continue;
                }
                Err(error) => return Err(error),
            };
            // Again, now that nobody changes it.
            let Some(cached) = self.repository(&found.repo)? else {
                continue;
            };
            let (stay, gone): (Vec<_>, Vec<_>) = cached
                .revisions
                .iter()
                .cloned()
                .partition(|revision| !revision.refs.is_empty());
            let freed = if stay.is_empty() {
                remove_all(&folder, &cached, dry_run)?
            } else {
                let of_stay: BTreeSet<&str> = blobs_of(&stay).collect();
                remove_some(&folder, &cached, &gone, |name| !of_stay.contains(name), dry_run)?
            };
            if freed.blobs > 0 || !freed.revisions.is_empty() || stay.is_empty() {
                report.freed.push(freed);
            }
        }
        Ok(report)
    }

    /// Removes the blobs of damaged files, so that they are fetched anew.
    #[cfg(feature = "fetch")]
    pub(crate) fn discard(&self, repo: &RepoId, names: &BTreeSet<String>) -> Result<()> {
        let folder = self.folder(repo);
        let _alone = alone(&folder, repo)?;
        names
            .iter()
            .try_for_each(|name| remove_file(&folder.blobs().join(name)))
    }
}

/// The lock of who removes, while nobody adds.
fn alone(folder: &RepoFolder, repo: &RepoId) -> Result<Lock> {
    let busy = |holder| HubError::Busy {
        what: repo.to_string(),
        holder,
    };
    // Whoever fetches a file holds its lock; Python holds nothing else.
    if let Some(holder) = held_below(&folder.locks, &folder.lock()) {
        return Err(busy(holder));
    }
    match Lock::try_alone(&folder.lock())? {
        Attempt::Held(lock) => Ok(lock),
        Attempt::Busy(holder) => Err(busy(holder)),
    }
}

fn blobs_of(revisions: &[CachedRevision]) -> impl Iterator<Item = &str> {
    revisions
        .iter()
        .flat_map(|revision| &revision.files)
        .filter_map(|file| file.blob.as_deref())
}

/// Removes the folder of a repository.
fn remove_all(folder: &RepoFolder, cached: &CachedRepository, dry_run: bool) -> Result<Freed> {
    let blobs = blobs(folder)?;
    if !dry_run {
        // In this order nobody finds a revision whose files are gone.
        for part in [
            folder.refs(),
            folder.snapshots(),
            folder.root.clone(),
            folder.locks.clone(),
        ] {
            remove_folder(&part)?;
        }
    }
    Ok(Freed {
        repo: cached.repo.clone(),
        revisions: cached
            .revisions
            .iter()
            .map(|revision| revision.commit.clone())
            .collect(),
        blobs: blobs.len(),
        bytes: blobs.iter().map(|(_, length)| length).sum(),
    })
}

/// Removes some revisions of a repository, and the blobs that a function chooses.
fn remove_some(
    folder: &RepoFolder,
    cached: &CachedRepository,
    gone: &[CachedRevision],
    chosen: impl Fn(&str) -> bool,
    dry_run: bool,
) -> Result<Freed> {
    let mut freed = Freed {
        repo: cached.repo.clone(),
        revisions: gone.iter().map(|revision| revision.commit.clone()).collect(),
        blobs: 0,
        bytes: 0,
    };
    if !dry_run {
        for revision in gone {
            for name in &revision.refs {
                remove_file(&folder.refs().join(name))?;
            }
            remove_folder(&folder.snapshot(&revision.commit))?;
            remove_file(&folder.tree(&revision.commit))?;
        }
    }
    for (name, length) in blobs(folder)? {
        if !chosen(&name) {
            continue;
        }
        if !dry_run {
            remove_file(&folder.blobs().join(&name))?;
            let hash = name.strip_suffix(INCOMPLETE).unwrap_or(&name);
            remove_file(&folder.locks.join(format!("{hash}.lock")))?;
        }
        freed.blobs += 1;
        freed.bytes += length;
    }
    Ok(freed)
}

/// Removes one file of a revision, and its blob where no other file has it; none where it is not there. The last file of a
/// repository takes the rest with it.
fn remove_one(
    folder: &RepoFolder,
    cached: &CachedRepository,
    commit: &str,
    path: &RepoPath,
) -> Result<Option<Freed>> {
    let all = cached
        .revisions
        .iter()
        .flat_map(|revision| revision.files.iter().map(|file| (&*revision.commit, file)));
    let is_it = |(at, file): &(&str, &CachedFile)| *at == commit && file.path == *path;
    let (it, others): (Vec<_>, Vec<_>) = all.partition(is_it);
    let Some((_, file)) = it.first() else {
        return Ok(None);
    };
    if others.is_empty() {
        return remove_all(folder, cached, false).map(Some);
    }
    let mut freed = Freed {
        repo: cached.repo.clone(),
        revisions: Vec::new(),
        blobs: 0,
        bytes: 0,
    };
    remove_file(&folder.snapshot(commit).join(path.to_path()))?;
    if let Some(blob) = file.blob.as_ref()
        && !others.iter().any(|(_, other)| other.blob.as_ref() == Some(blob))
    {
        remove_file(&folder.blobs().join(blob))?;
        remove_file(&folder.locks.join(format!("{blob}.lock")))?;
        freed.blobs = 1;
        freed.bytes = file.bytes.unwrap_or_default();
    }
    Ok(Some(freed))
}

/// What is gone already is removed.
fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove", path),
        _ => Ok(()),
    }
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove", path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{COMMIT, fill, set_ref};
    use super::*;

    const OTHER: &str = "1111111111111111111111111111111111111111";

    /// Two revisions that share a file, and what nobody refers to.
    fn filled() -> (tempfile::TempDir, HubCache) {
        let root = tempfile::tempdir().unwrap();
        let cache = HubCache::new(root.path());
        fill(
            &cache,
            "a/b",
            COMMIT,
            &[("config.json", "{}"), ("model.safetensors", "old")],
        );
        fill(
            &cache,
            "a/b",
            OTHER,
            &[("config.json", "{}"), ("model.safetensors", "newer")],
        );
        set_ref(&cache, "a/b", "main", OTHER);
        let folder = cache.folder(&"a/b".parse().unwrap());
        fs::write(folder.blobs().join(format!("{OTHER}{INCOMPLETE}")), "half").unwrap();
        (root, cache)
    }

    fn reads(cache: &HubCache, reference: &str) -> Option<String> {
        let path = cache.find(&reference.parse().unwrap()).ok()?;
        fs::read_to_string(path.join("model.safetensors")).ok()
    }

    #[test]
    fn a_shared_blob_stays() {
        let (_root, cache) = filled();
        let old: HubReference = format!("a/b@{COMMIT}").parse().unwrap();
        let freed = cache.remove(&old, false).unwrap();
        assert_eq!(
            (freed.revisions, freed.blobs, freed.bytes),
            (vec![COMMIT.to_owned()], 1, 3)
        );
        assert_eq!(reads(&cache, "a/b").as_deref(), Some("newer"));
        assert_eq!(reads(&cache, &format!("a/b@{COMMIT}")), None);
        let left = cache.repository(&old.repo).unwrap().unwrap();
        assert_eq!((left.bytes, left.incomplete_bytes), (7, 4));
        assert!(matches!(
            cache.remove(&old, false),
            Err(HubError::NotCached { .. })
        ));

        let freed = cache.remove(&"a/b".parse().unwrap(), false).unwrap();
        assert_eq!(
            (freed.blobs, freed.bytes),
            (3, 11),
            "the last revision takes all with it"
        );
        assert_eq!(cache.repositories().unwrap(), []);
        assert!(matches!(
            cache.remove(&"a/b".parse().unwrap(), true),
            Err(HubError::NotCached { .. })
        ));
    }

    #[test]
    fn one_file_goes_and_what_others_have_stays() {
        let (_root, cache) = filled();
        let remove = |reference: &str| cache.remove(&reference.parse().unwrap(), true);
        let gone =
            |freed: Result<Freed>| freed.map(|freed| (freed.revisions.len(), freed.blobs, freed.bytes));
        assert!(matches!(
            remove("hf:a/b/no.gguf"),
            Err(HubError::NotCached { .. })
        ));
        assert_eq!(
            gone(remove("hf:a/b/config.json")).unwrap(),
            (0, 0, 0),
            "the other revision has it"
        );
        assert_eq!(gone(remove("hf:a/b/model.safetensors")).unwrap(), (0, 1, 5));
        assert!(matches!(
            remove("hf:a/b/model.safetensors"),
            Err(HubError::NotCached { .. })
        ));
        let of_old = |file: &str| format!("hf:a/b@{COMMIT}/{file}");
        assert_eq!(reads(&cache, &format!("a/b@{COMMIT}")).as_deref(), Some("old"));
        assert_eq!(gone(remove(&of_old("model.safetensors"))).unwrap(), (0, 1, 3));
        // The last one takes the folder with it, and the download that was begun.
        assert_eq!(gone(remove(&of_old("config.json"))).unwrap(), (2, 2, 6));
        assert_eq!(cache.repositories().unwrap(), []);
    }

    #[test]
    fn pruning_leaves_what_a_ref_leads_to() {
        let (_root, cache) = filled();
        fill(&cache, "a/detached", COMMIT, &[("config.json", "[1]")]);
        let planned = cache.prune(true).unwrap();
        assert_eq!(planned.bytes(), 3 + 4 + 3);
        assert_eq!(cache.repositories().unwrap().len(), 2, "nothing went");
        assert_eq!(cache.prune(false).unwrap(), planned);
        assert_eq!(cache.repositories().unwrap().len(), 1);
        assert_eq!(reads(&cache, "a/b").as_deref(), Some("newer"));
        assert_eq!(cache.prune(false).unwrap(), PruneReport::default());
    }

    #[test]
    fn what_someone_fetches_is_left_alone() {
        let (_root, cache) = filled();
        let reference: HubReference = "a/b".parse().unwrap();
        let folder = cache.folder(&reference.repo);
        for lock in [folder.locks.join("x.lock"), folder.lock()] {
            let held = Lock::try_alone(&lock).unwrap();
            assert!(matches!(held, Attempt::Held(_)));
            let error = cache.remove(&reference, true).unwrap_err().to_string();
            let me = std::process::id();
            assert_eq!(error, format!("`a/b` is being used by process {me}"));
            assert_eq!(cache.prune(false).unwrap().busy.len(), 1);
        }
        assert!(cache.remove(&reference, true).is_ok());
    }
}
