//! Locks between processes, on the files that Python's `huggingface_hub` locks too.
//!
//! A lock ends with its process, however that ends. Who holds one writes its name into the file, for those who wait.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};

/// A lock that is held until this value goes.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    named: bool,
}

/// What came of trying to take a lock.
#[derive(Debug)]
pub(crate) enum Attempt {
    Held(Lock),
    /// Someone else has it; who, as far as is known.
    Busy(String),
}

impl Lock {
    /// Tries to have the lock alone.
    pub(crate) fn try_alone(path: &Path) -> Result<Attempt> {
        Self::attempt(path, false)
    }

    /// Tries to have the lock together with others who share it.
    #[cfg(feature = "fetch")]
    pub(crate) fn try_shared(path: &Path) -> Result<Attempt> {
        Self::attempt(path, true)
    }

    fn attempt(path: &Path, shared: bool) -> Result<Attempt> {
        let folder = path.parent().unwrap_or(path);
        loop {
            fs::create_dir_all(folder).context("make the folder", folder)?;
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .context("open", path)?;
            let taken = if shared {
                file.try_lock_shared()
            } else {
                file.try_lock()
            };
            match taken {
                // Who removed the file between the two calls left us a lock that nobody else sees.
                Ok(()) if !is_at(&file, path) => {}
                Ok(()) => {
                    let mut lock = Self { file, named: !shared };
                    lock.sign();
                    return Ok(Attempt::Held(lock));
                }
                Err(TryLockError::WouldBlock) => return Ok(Attempt::Busy(holder(path))),
                Err(TryLockError::Error(source)) => return Err(source).context("lock", path),
            }
        }
    }

    /// Writes down who holds it. It is for people: where it fails, they are told less.
    fn sign(&mut self) {
        if self.named && self.file.set_len(0).is_ok() && self.file.rewind().is_ok() {
            let _ = write!(self.file, "{}", std::process::id());
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.named {
            let _ = self.file.set_len(0);
        }
        let _ = self.file.unlock();
    }
}

/// The locks below a folder that someone holds, with who does.
pub(crate) fn held_below(folder: &Path, except: &Path) -> Option<String> {
    let entries = fs::read_dir(folder).ok()?;
    let locks = entries.flatten().map(|entry| entry.path());
    locks.filter(|path| path != except).find_map(|path| {
        let file = File::open(&path).ok()?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Some(holder(&path)),
            _ => None,
        }
    })
}

/// Whether an open file is still the one at its path.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let same =
        |held: fs::Metadata, found: fs::Metadata| (held.dev(), held.ino()) == (found.dev(), found.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(found)) => same(held, found),
        _ => false,
    }
}

/// An open file cannot be removed here.
#[cfg(not(unix))]
fn is_at(_file: &File, path: &Path) -> bool {
    path.exists()
}

/// Who wrote a name into a lock's file.
fn holder(path: &Path) -> String {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(32).read_to_string(&mut text));
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(process)) if may_run(process) => format!("process {process}"),
        _ => "another program".to_owned(),
    }
}

/// Whether a process may be running, as far as the system tells: one that was killed could not take its name away.
fn may_run(process: u32) -> bool {
    let processes = PathBuf::from("/proc");
    !processes.join("self").exists() || processes.join(process.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(path: &Path) -> Option<String> {
        match Lock::try_alone(path).unwrap() {
            Attempt::Held(_) => None,
            Attempt::Busy(holder) => Some(holder),
        }
    }

    #[test]
    fn a_lock_says_who_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/x.lock");
        let Attempt::Held(lock) = Lock::try_alone(&path).unwrap() else {
            panic!("it is free")
        };
        let me = format!("process {}", std::process::id());
        assert_eq!(busy(&path), Some(me.clone()));
        assert_eq!(held_below(path.parent().unwrap(), Path::new("")), Some(me));
        assert_eq!(held_below(path.parent().unwrap(), &path), None);
        drop(lock);
        assert_eq!(busy(&path), None);
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_name_that_is_no_process_is_not_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.lock");
        let file = File::create(&path).unwrap();
        file.lock().unwrap();
        for content in ["", "\u{1b}[2J", "4294967295"] {
            fs::write(&path, content).unwrap();
            if content.is_empty() || cfg!(target_os = "linux") {
                assert_eq!(busy(&path).as_deref(), Some("another program"));
            }
        }
    }

    #[cfg(feature = "fetch")]
    #[test]
    fn those_who_share_keep_out_who_wants_it_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.lock");
        let first = Lock::try_shared(&path).unwrap();
        let second = Lock::try_shared(&path).unwrap();
        assert!(matches!((&first, &second), (Attempt::Held(_), Attempt::Held(_))));
        drop(first);
        assert!(busy(&path).is_some());
        drop(second);
        assert_eq!(busy(&path), None);
    }
}
