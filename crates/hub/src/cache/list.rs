//! What the cache holds, and how much room it takes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::HubCache;
use crate::error::{Context, Result};
use crate::layout::{BESIDE, INCOMPLETE, RepoFolder};
use crate::names::{RepoId, RepoPath, is_commit};

/// Folders within folders are followed so deep.
const MAX_DEPTH: usize = 32;

/// A model's repository in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CachedRepository {
    /// Its id.
    pub repo: RepoId,
    /// Its folder.
    pub path: PathBuf,
    /// Bytes of its files; what several revisions share counts once.
    pub bytes: u64,
    /// Bytes of downloads that did not end.
    pub incomplete_bytes: u64,
    /// Bytes of blobs that no revision has.
    pub unreferenced_bytes: u64,
    /// When a file came last, in seconds since 1970.
    pub last_modified: Option<u64>,
    /// Its revisions, by commit.
    pub revisions: Vec<CachedRevision>,
}

/// One commit of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CachedRevision {
    /// The commit.
    pub commit: String,
    /// Branches and tags that stood there.
    pub refs: Vec<String>,
    /// Its files, by path.
    pub files: Vec<CachedFile>,
    /// Bytes of its files.
    pub bytes: u64,
}

/// A file of a revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CachedFile {
    /// Its path in the repository.
    pub path: RepoPath,
    /// Its length; none where the link leads nowhere.
    pub bytes: Option<u64>,
    /// The name of its blob, which is the hash of its content. None for a file that is no link to one.
    pub blob: Option<String>,
}

impl HubCache {
    /// The models in the cache, by id. What is no model's repository is left out.
    ///
    /// # Errors
    ///
    /// [`HubError::Io`](crate::HubError::Io) where a folder cannot be read. A cache that is not there is empty.
    pub fn repositories(&self) -> Result<Vec<CachedRepository>> {
        let mut found = Vec::new();
        for name in names(self.root())? {
            if let Some(repo) = RepoId::from_folder_name(&name) {
                found.extend(self.repository(&repo)?);
            }
        }
        found.sort_by(|one, other| one.repo.cmp(&other.repo));
        Ok(found)
    }

    /// One model in the cache, where it is there.
    ///
    /// # Errors
    ///
    /// As [`repositories`](Self::repositories).
    pub fn repository(&self, repo: &RepoId) -> Result<Option<CachedRepository>> {
        let folder = self.folder(repo);
        if !folder.root.is_dir() {
            return Ok(None);
        }
        let mut refs = BTreeMap::<String, Vec<String>>::new();
        for (name, path) in walk(&folder.refs())? {
            // What is no commit leads nowhere, and text it need not be.
            let commit = fs::read(&path).context("read", &path)?;
            refs.entry(String::from_utf8_lossy(&commit).trim().to_owned())
                .or_default()
                .push(name.to_string());
        }
        let mut revisions = Vec::new();
        // Every blob once, and every file that is none.
        let mut counted = BTreeSet::new();
        let mut bytes = 0;
        let mut last_modified = None;
        for commit in names(&folder.snapshots())?
            .into_iter()
            .filter(|name| is_commit(name))
        {
            let mut files = Vec::new();
            for (path, on_disk) in walk(&folder.snapshot(&commit))? {
                let blob = blob_of(&folder, &on_disk);
                let meta = fs::metadata(&on_disk).ok();
                let key = blob
                    .clone()
                    .unwrap_or_else(|| on_disk.to_string_lossy().into_owned());
                if let Some(meta) = &meta {
                    if counted.insert(key) {
                        bytes += meta.len();
                    }
                    last_modified = last_modified.max(meta.modified().ok());
                }
                files.push(CachedFile {
                    path,
                    bytes: meta.map(|meta| meta.len()),
                    blob,
                });
            }
            revisions.push(CachedRevision {
                refs: refs.remove(&commit).unwrap_or_default(),
                bytes: files.iter().filter_map(|file| file.bytes).sum(),
                commit,
                files,
            });
        }
        let (mut incomplete_bytes, mut unreferenced_bytes) = (0, 0);
        for (name, length) in blobs(&folder)? {
            if name.ends_with(INCOMPLETE) {
                incomplete_bytes += length;
            } else if !counted.contains(&name) {
                unreferenced_bytes += length;
            }
        }
        Ok(Some(CachedRepository {
            repo: repo.clone(),
            path: folder.root,
            bytes,
            incomplete_bytes,
            unreferenced_bytes,
            last_modified: last_modified.and_then(seconds),
            revisions,
        }))
    }
}

fn seconds(time: SystemTime) -> Option<u64> {
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

/// The name of the blob that a file of a snapshot is a link to.
fn blob_of(folder: &RepoFolder, file: &Path) -> Option<String> {
    let link = fs::read_link(file).ok()?;
    let target = file.parent()?.join(&link);
    let name = link.file_name()?.to_str()?.to_owned();
    // Compared as the system sees it: the link has `..` in it.
    let found = fs::canonicalize(target.parent()?).ok()?;
    let blobs = fs::canonicalize(folder.blobs()).ok()?;
    (found == blobs).then_some(name)
}

/// The blobs of a repository with their lengths, half-made ones too.
pub(super) fn blobs(folder: &RepoFolder) -> Result<Vec<(String, u64)>> {
    let blobs = folder.blobs();
    let mut found = Vec::new();
    for name in names(&blobs)? {
        // A blob that vanishes meanwhile has no length any more.
        if let Ok(meta) = fs::metadata(blobs.join(&name))
            && meta.is_file()
        {
            found.push((name, meta.len()));
        }
    }
    Ok(found)
}

/// The names in a folder, sorted; none where there is no folder.
pub(super) fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("read the folder", folder),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.context("read the folder", folder)?;
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// The files below a folder, by path; links are files and are not followed.
pub(super) fn walk(folder: &Path) -> Result<Vec<(RepoPath, PathBuf)>> {
    let mut found = Vec::new();
    let mut folders = vec![(String::new(), 0)];
    while let Some((prefix, depth)) = folders.pop() {
        let here = folder.join(&prefix);
        for name in names(&here)? {
            let path = format!("{prefix}{name}");
            let on_disk = here.join(&name);
            let is_folder = fs::symlink_metadata(&on_disk).is_ok_and(|meta| meta.is_dir());
            if is_folder && depth < MAX_DEPTH {
                folders.push((format!("{path}/"), depth + 1));
            } else if !is_folder && !name.starts_with(BESIDE) {
                // A name that nobody could have fetched is none of ours.
                found.extend(path.parse().ok().map(|path| (path, on_disk)));
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{COMMIT, fill, set_ref};
    use super::*;

    #[test]
    fn what_revisions_share_counts_once() {
        let root = tempfile::tempdir().unwrap();
        let cache = HubCache::new(root.path().join("hub"));
        assert_eq!(cache.repositories().unwrap(), []);
        let other = "1111111111111111111111111111111111111111";
        fill(
            &cache,
            "a/b",
            COMMIT,
            &[("config.json", "{}"), ("deep/er/x.json", "12345")],
        );
        fill(
            &cache,
            "a/b",
            other,
            &[("config.json", "{}"), ("new.json", "123")],
        );
        fill(&cache, "gpt2", COMMIT, &[]);
        set_ref(&cache, "a/b", "main", other);
        set_ref(&cache, "a/b", "refs/pr/1", other);
        let folder = cache.folder(&"a/b".parse().unwrap());
        fs::write(folder.blobs().join("abc.incomplete"), "1234567").unwrap();
        fs::write(folder.blobs().join("nobodys"), "12").unwrap();
        fs::write(folder.refs().join("no-text"), [0xff, 0xfe]).unwrap();
        fs::create_dir_all(cache.root().join("datasets--a--b")).unwrap();

        let found = cache.repositories().unwrap();
        assert_eq!(
            found.iter().map(|found| found.repo.as_str()).collect::<Vec<_>>(),
            ["a/b", "gpt2"]
        );
        let model = &found[0];
        assert_eq!(
            (model.bytes, model.incomplete_bytes, model.unreferenced_bytes),
            (10, 7, 2)
        );
        let [first, second] = &model.revisions[..] else {
            panic!("two revisions: {model:?}")
        };
        assert_eq!(
            (first.commit.as_str(), first.bytes, &first.refs[..]),
            (other, 5, &["main".to_owned(), "refs/pr/1".to_owned()][..])
        );
        assert_eq!((second.bytes, second.refs.len()), (7, 0));
        assert_eq!(second.files[1].path.as_str(), "deep/er/x.json");
        assert_eq!(second.files[1].blob.as_ref().map(String::len), Some(40));
    }

    #[test]
    fn a_link_out_of_the_repository_is_no_blob() {
        let root = tempfile::tempdir().unwrap();
        let cache = HubCache::new(root.path().join("hub"));
        fill(&cache, "a/b", COMMIT, &[("config.json", "{}")]);
        let folder = cache.folder(&"a/b".parse().unwrap());
        fs::write(root.path().join("secret"), "s").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink("../../../../secret", folder.snapshot(COMMIT).join("x.json")).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink("../../blobs/gone", folder.snapshot(COMMIT).join("y.json")).unwrap();
        let found = cache.repository(&"a/b".parse().unwrap()).unwrap().unwrap();
        let files = &found.revisions[0].files;
        assert_eq!((files[1].blob.as_deref(), files[1].bytes), (None, Some(1)));
        assert_eq!((files[2].blob.as_deref(), files[2].bytes), (Some("gone"), None));
    }
}
