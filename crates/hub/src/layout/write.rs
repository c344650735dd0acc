//! Adding to the folders of the cache, so that nobody sees half of anything.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Context, Result};
use crate::layout::{BESIDE, RepoFolder};
use crate::names::RepoPath;
use crate::{BlobHash, HubError};

impl RepoFolder {
    /// Writes down the commit of a branch or tag.
    #[cfg(feature = "fetch")]
    pub(crate) fn set_commit(&self, revision: &crate::Revision, commit: &str) -> Result<()> {
        if revision.is_commit() || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_whole(&self.refs().join(revision.as_str()), commit.as_bytes())
    }

    /// Puts a link to a blob into a snapshot, in place of whatever is there.
    pub(crate) fn link(&self, commit: &str, path: &RepoPath, hash: &BlobHash) -> Result<()> {
        let target = self.snapshot(commit).join(path.to_path());
        let up = "../".repeat(path.components().count() + 1);
        let blob = PathBuf::from(format!("{up}blobs/{hash}"));
        if fs::read_link(&target).is_ok_and(|found| found == blob) {
            return Ok(());
        }
        let folder = target.parent().unwrap_or(&target);
        fs::create_dir_all(folder).context("make the folder", folder)?;
        let beside = beside(&target);
        link_or_copy(&blob, &self.blob(hash), &beside).context("write", &beside)?;
        replace(&beside, &target)
    }
}

#[cfg(unix)]
fn link_or_copy(relative: &Path, _blob: &Path, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(relative, at)
}

/// Where links need a privilege, the snapshot has a copy; Python does so too.
#[cfg(not(unix))]
fn link_or_copy(_relative: &Path, blob: &Path, at: &Path) -> io::Result<()> {
    fs::copy(blob, at).map(drop)
}

/// Moves what was made beside a place into it.
fn replace(beside: &Path, target: &Path) -> Result<()> {
    fs::rename(beside, target).map_err(|source| {
        // Nobody looks for it any more.
        let _ = fs::remove_file(beside);
        HubError::Io {
            action: "write",
            path: target.to_owned(),
            source,
        }
    })
}

/// Writes a small file so that nobody sees half of it.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).context("make the folder", folder)?;
    let beside = beside(path);
    let written = File::create_new(&beside).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written.context("write", &beside)?;
    replace(&beside, path)
}

/// A name beside a file that nobody else takes.
fn beside(path: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!("{BESIDE}{}-{count}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Revision;

    const COMMIT: &str = "95d09f2b10159347eece71399a7e2e907ea3df4f";

    #[test]
    fn links_are_relative_and_replace_what_was_there() {
        let cache = tempfile::tempdir().unwrap();
        let folder = RepoFolder::new(cache.path(), &"a/b".parse().unwrap());
        let (first, second): (BlobHash, BlobHash) = (
            "1111111111111111111111111111111111111111".parse().unwrap(),
            "2222222222222222222222222222222222222222".parse().unwrap(),
        );
        fs::create_dir_all(folder.blobs()).unwrap();
        fs::write(folder.blob(&first), "one").unwrap();
        fs::write(folder.blob(&second), "two").unwrap();
        let path: RepoPath = "deep/er/file.json".parse().unwrap();
        let file = folder.snapshot(COMMIT).join("deep/er/file.json");
        for (hash, content) in [(&first, "one"), (&first, "one"), (&second, "two")] {
            folder.link(COMMIT, &path, hash).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), content);
        }
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_ref_that_is_no_commit_is_not_followed() {
        let cache = tempfile::tempdir().unwrap();
        let folder = RepoFolder::new(cache.path(), &"a/b".parse().unwrap());
        let main = Revision::default();
        assert_eq!(folder.commit(&main), None);
        for (text, expected) in [(COMMIT, Some(COMMIT)), ("../../../etc", None), ("", None)] {
            write_whole(&folder.refs().join("main"), text.as_bytes()).unwrap();
            assert_eq!(folder.commit(&main).as_deref(), expected);
        }
        assert_eq!(folder.commit(&COMMIT.parse().unwrap()).as_deref(), Some(COMMIT));
    }
}
