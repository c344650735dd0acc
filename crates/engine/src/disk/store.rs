//! A folder of files, up to so many bytes, those used last.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::chain::Name;
use crate::config::DiskCacheConfig;

/// What the names of files end with.
const ENDING: &str = "safetensors";

/// What the names of files end with that are not whole.
const UNFINISHED: &str = "part";

#[derive(Clone, Copy, Debug)]
struct Entry {
    bytes: u64,
    used: SystemTime,
}

/// Says how many bytes are free where a folder is.
pub(crate) type FreeSpace = dyn Fn(&Path) -> io::Result<u64> + Send + Sync;

/// Gives what a file has.
pub(crate) type ReadFile = dyn Fn(&Path) -> io::Result<Vec<u8>> + Send + Sync;

/// How a disk is asked.
pub(crate) struct Access {
    /// Bytes that are free where a folder is.
    pub(crate) free: Box<FreeSpace>,
    pub(crate) read: Box<ReadFile>,
    /// How long who ends waits for what is being written.
    pub(crate) patience: Duration,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            free: Box::new(|folder| fs4::available_space(folder)),
            read: Box::new(|path| fs::read(path)),
            patience: Duration::from_secs(10),
        }
    }
}

/// The folder. One thread of ours reads, and one writes; other processes may do both.
pub(super) struct Store {
    folder: PathBuf,
    max_bytes: u64,
    min_free_bytes: u64,
    entries: Mutex<HashMap<Name, Entry>>,
    access: Access,
}

/// The files that are there. `unfinished` hears of those that are not whole.
fn scan(folder: &Path, unfinished: impl Fn(&Path)) -> io::Result<HashMap<Name, Entry>> {
    let mut entries = HashMap::new();
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending == Some(UNFINISHED) {
            unfinished(&path);
            continue;
        }
        let name = path.file_stem().and_then(|stem| Name::parse(stem.to_str()?));
        let metadata = fs::metadata(&path);
        if let (Some(name), Some(ENDING), Ok(metadata)) = (name, ending, metadata) {
            let entry = Entry {
                bytes: metadata.len(),
                used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            };
            entries.insert(name, entry);
        }
    }
    Ok(entries)
}

impl Store {
    pub(super) fn open(config: &DiskCacheConfig, access: Access) -> io::Result<Self> {
        fs::create_dir_all(&config.folder)?;
        // Of a process that was ended while it wrote, or of one that writes now and will miss it.
        let entries = scan(&config.folder, remove_file)?;
        Ok(Self {
            folder: config.folder.clone(),
            max_bytes: config.max_bytes,
            min_free_bytes: config.min_free_bytes,
            entries: Mutex::new(entries),
            access,
        })
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<Name, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn path(&self, name: &Name) -> PathBuf {
        self.folder.join(format!("{name}.{ENDING}"))
    }

    pub(super) fn has(&self, name: &Name) -> bool {
        self.entries().contains_key(name)
    }

    pub(super) fn read(&self, name: &Name) -> io::Result<Vec<u8>> {
        (self.access.read)(&self.path(name))
    }

    /// Writes a file beside its place and moves it there. `false` where there is no room for it.
    pub(super) fn write(&self, name: &Name, file: &[u8]) -> io::Result<bool> {
        let bytes = file.len() as u64;
        if bytes > self.max_bytes
            || (self.access.free)(&self.folder)? < self.min_free_bytes.saturating_add(bytes)
        {
            return Ok(false);
        }
        // Other processes keep to the same limit with the same folder.
        *self.entries() = scan(&self.folder, |_| {})?;
        self.make_room(bytes);
        let beside = self
            .folder
            .join(format!("{name}.{}.{UNFINISHED}", std::process::id()));
        let written = File::create(&beside).and_then(|mut part| part.write_all(file));
        let moved = written.and_then(|()| fs::rename(&beside, self.path(name)));
        if let Err(error) = moved {
            remove_file(&beside);
            return Err(error);
        }
        let used = SystemTime::now();
        self.entries().insert(*name, Entry { bytes, used });
        Ok(true)
    }

    /// Gives up what was used least lately until so many bytes more may be there.
    fn make_room(&self, bytes: u64) {
        loop {
            let oldest = {
                let entries = self.entries();
                let held: u64 = entries.values().map(|entry| entry.bytes).sum();
                if held.saturating_add(bytes) <= self.max_bytes {
                    return;
                }
                entries
                    .iter()
                    .min_by_key(|(_, entry)| entry.used)
                    .map(|(name, _)| *name)
            };
            match oldest {
                Some(name) => self.remove(&name),
                None => return,
            }
        }
    }

    pub(super) fn remove(&self, name: &Name) {
        if self.entries().remove(name).is_some() {
            remove_file(&self.path(name));
        }
    }

    /// Notes that a file was used, for this process and those to come.
    pub(super) fn touch(&self, name: &Name) {
        let used = SystemTime::now();
        if let Some(entry) = self.entries().get_mut(name) {
            entry.used = used;
        }
        let file = File::options().append(true).open(self.path(name));
        if let Err(error) = file.and_then(|file| file.set_modified(used)) {
            tracing::debug!(file = %name, %error, "the use of a prefix could not be noted");
        }
    }
}

/// A file that another process has removed is gone as well.
fn remove_file(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a file of the prefix cache could not be removed");
    }
}
