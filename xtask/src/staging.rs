//! Half-made things live in a folder of their own, and reach their place by one rename.
//!
//! A staging folder `.staging-N` is held through a lock on the file `.staging-N.lock` beside it. The lock ends with the
//! process, however that ends, so the next set-up can tell what an interrupted one left behind from what another one is
//! working on.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Context, Result};

const PREFIX: &str = ".staging-";

/// A folder that goes away with this value.
pub(crate) struct Staging {
    folder: PathBuf,
    lock: PathBuf,
    _held: File,
}

/// What became of something moved to its place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Placed {
    Here,
    /// Another set-up was faster; its copy stays.
    Already,
}

impl Staging {
    /// Makes a new staging folder in the cache.
    pub(crate) fn new(cache: &Path) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        fs::create_dir_all(cache).context("make the folder", cache)?;
        loop {
            let name = format!(
                "{PREFIX}{}-{}",
                std::process::id(),
                COUNT.fetch_add(1, Ordering::Relaxed)
            );
            let lock = cache.join(format!("{name}.lock"));
            let held = match File::create_new(&lock) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.context("write", &lock)?,
            };
            // A sweep between the two calls may have taken the file for an abandoned one.
            if held.try_lock().is_err() || !lock.exists() {
                continue;
            }
            let folder = cache.join(name);
            fs::create_dir(&folder).context("make the folder", &folder)?;
            return Ok(Self {
                folder,
                lock,
                _held: held,
            });
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    /// A new folder in this one.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        fs::create_dir(&folder).context("make the folder", &folder)?;
        Ok(folder)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed now, the next set-up sweeps.
        let _ = fs::remove_dir_all(&self.folder);
        let _ = fs::remove_file(&self.lock);
    }
}

/// Removes the staging folders that interrupted set-ups left.
pub(crate) fn sweep(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let lock = entry.path();
        let named = lock
            .file_name()
            .and_then(OsStr::to_str)
            .is_some_and(|name| name.starts_with(PREFIX));
        if !named || lock.extension() != Some(OsStr::new("lock")) {
            continue;
        }
        let Ok(file) = File::open(&lock) else { continue };
        if file.try_lock().is_ok() {
            // A failure leaves the folder to the next sweep.
            let folder = lock.with_extension("");
            if !folder.exists() || fs::remove_dir_all(folder).is_ok() {
                let _ = fs::remove_file(&lock);
            }
        }
    }
}

/// Moves a finished file or folder to its place. What is there already stays.
pub(crate) fn place(from: &Path, to: &Path) -> Result<Placed> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).context("make the folder", parent)?;
    }
    if to.exists() {
        return Ok(Placed::Already);
    }
    match fs::rename(from, to) {
        Ok(()) => Ok(Placed::Here),
        Err(_) if to.exists() => Ok(Placed::Already),
        Err(error) => Err(error).context("put in place", to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_is_left_when_it_goes() {
        let cache = tempfile::tempdir().unwrap();
        let staging = Staging::new(cache.path()).unwrap();
        fs::write(staging.folder("a").unwrap().join("b"), "c").unwrap();
        assert_eq!(names(cache.path()).len(), 2);
        drop(staging);
        assert_eq!(names(cache.path()), Vec::<String>::new());
    }

    #[test]
    fn two_at_once_do_not_touch_each_other() {
        let cache = tempfile::tempdir().unwrap();
        let one = Staging::new(cache.path()).unwrap();
        let two = Staging::new(cache.path()).unwrap();
        assert_ne!(one.path(), two.path());
        assert!(one.path().is_dir() && two.path().is_dir());
    }

    #[test]
    fn what_an_interrupted_one_left_is_swept() {
        let cache = tempfile::tempdir().unwrap();
        fs::create_dir_all(cache.path().join(".staging-1-0/half")).unwrap();
        fs::write(cache.path().join(".staging-1-0.lock"), "").unwrap();
        fs::write(cache.path().join("other.lock"), "").unwrap();
        let at_work = Staging::new(cache.path()).unwrap();
        sweep(cache.path());
        assert!(at_work.path().is_dir());
        drop(at_work);
        assert_eq!(names(cache.path()), ["other.lock"]);
    }

    #[test]
    fn the_loser_of_a_race_keeps_the_winners_copy() {
        let cache = tempfile::tempdir().unwrap();
        let at = |name: &str| cache.path().join(name);
        for (folder, text) in [("one", "first"), ("two", "second")] {
            fs::create_dir(at(folder)).unwrap();
            fs::write(at(folder).join("file"), text).unwrap();
        }
        assert_eq!(place(&at("one"), &at("deep/place")).unwrap(), Placed::Here);
        assert_eq!(place(&at("two"), &at("deep/place")).unwrap(), Placed::Already);
        assert_eq!(fs::read_to_string(at("deep/place/file")).unwrap(), "first");
    }
}
