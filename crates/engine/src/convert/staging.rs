//! A folder that is written beside its place and gets its name when it is whole.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::ConvertError;

/// A folder in the making. Dropping it removes it.
///
/// It is `.NAME.converting` beside its place, held by a lock on a file of that name with `.lock` behind it. The lock ends with the
/// process, however that ends, so that what a killed one left behind is told from what another one is at work on.
#[derive(Debug)]
pub(super) struct Staging {
    folder: PathBuf,
    target: PathBuf,
    lock: PathBuf,
    _held: File,
}

impl Staging {
    /// Makes the folder for `target`, which must not be there or be an empty folder.
    pub(super) fn new(target: &Path) -> Result<Self, ConvertError> {
        check_free(target)?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(ConvertError::Destination {
                path: target.to_owned(),
                reason: "has no name that a folder could get",
            });
        };
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        fs::create_dir_all(parent).map_err(failed("make the folder", parent))?;
        let name = name.to_string_lossy();
        let folder = parent.join(format!(".{name}.converting"));
        let lock = parent.join(format!(".{name}.converting.lock"));
        let held = loop {
            let file = File::create(&lock).map_err(failed("make the file", &lock))?;
            if file.try_lock().is_err() {
                return Err(ConvertError::Busy {
                    path: target.to_owned(),
                });
            }
            // The one that held it may have removed it between the two calls.
            if lock.exists() {
                break file;
            }
        };
        let staging = Self {
            folder,
            target: target.to_owned(),
            lock,
            _held: held,
        };
        if staging.folder.exists() {
            fs::remove_dir_all(&staging.folder).map_err(failed("remove the folder", &staging.folder))?;
        }
        fs::create_dir(&staging.folder).map_err(failed("make the folder", &staging.folder))?;
        Ok(staging)
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a file of the folder.
    pub(super) fn write(&self, name: &str, content: &str) -> Result<(), ConvertError> {
        let path = self.folder.join(name);
        fs::write(&path, content).map_err(failed("write", &path))
    }

    /// Gives the folder its name.
    pub(super) fn finish(self) -> Result<(), ConvertError> {
        // Somebody may have filled it meanwhile.
        check_free(&self.target)?;
        if self.target.exists() {
            fs::remove_dir(&self.target).map_err(failed("replace the empty folder", &self.target))?;
        }
        fs::rename(&self.folder, &self.target).map_err(failed("move the folder to", &self.target))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed now, the next conversion to this place sweeps. After a success there is nothing.
        let _ = fs::remove_dir_all(&self.folder);
        let _ = fs::remove_file(&self.lock);
    }
}

fn check_free(target: &Path) -> Result<(), ConvertError> {
    let refuse = |reason| {
        Err(ConvertError::Destination {
            path: target.to_owned(),
            reason,
        })
    };
    if !target.exists() {
        return Ok(());
    }
    if !target.is_dir() {
        return refuse("is a file");
    }
    let mut entries = fs::read_dir(target).map_err(failed("read the folder", target))?;
    if entries.next().is_some() {
        return refuse("is not empty");
    }
    Ok(())
}

pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ConvertError {
    let path = path.to_owned();
    move |source| ConvertError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("deep/model");
        let staging = Staging::new(&target).unwrap();
        staging.write("config.json", "{}").unwrap();
        assert!(!target.exists());
        drop(staging);
        assert_eq!(names(&place.path().join("deep")), Vec::<String>::new());

        let staging = Staging::new(&target).unwrap();
        staging.write("config.json", "{}").unwrap();
        staging.finish().unwrap();
        assert_eq!(names(&place.path().join("deep")), ["model"]);
        assert_eq!(names(&target), ["config.json"]);
    }

    #[test]
    fn an_empty_folder_is_taken_and_another_one_is_not() {
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("model");
        fs::create_dir(&target).unwrap();
        let staging = Staging::new(&target).unwrap();
        staging.write("a", "b").unwrap();
        staging.finish().unwrap();
        assert_eq!(names(&target), ["a"]);

        let error = Staging::new(&target).unwrap_err().to_string();
        assert!(error.ends_with("/model` is not empty"), "{error}");
        assert_eq!(names(place.path()), ["model"]);
        let error = Staging::new(&target.join("a")).unwrap_err().to_string();
        assert!(error.ends_with("/model/a` is a file"), "{error}");
        let error = Staging::new(Path::new("/")).unwrap_err().to_string();
        assert!(error.contains("`/`"), "{error}");
    }

    #[test]
    fn a_folder_that_is_filled_meanwhile_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("model");
        let staging = Staging::new(&target).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("theirs"), "").unwrap();
        assert!(staging.finish().is_err());
        assert_eq!(names(&target), ["theirs"]);
        assert_eq!(names(place.path()), ["model"]);
    }

    #[test]
    fn two_at_once_are_told_and_what_a_killed_one_left_is_swept() {
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("model");
        let first = Staging::new(&target).unwrap();
        assert!(matches!(Staging::new(&target), Err(ConvertError::Busy { .. })));
        assert!(first.folder().is_dir());
        drop(first);

        fs::create_dir(place.path().join(".model.converting")).unwrap();
        fs::write(place.path().join(".model.converting/half"), "").unwrap();
        fs::write(place.path().join(".model.converting.lock"), "").unwrap();
        let second = Staging::new(&target).unwrap();
        assert_eq!(names(second.folder()), Vec::<String>::new());
    }
}
