//! A file's bytes, mapped or owned.

use std::fmt;
use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use crate::CheckpointError;

/// The bytes of a checkpoint and the name to call it by in errors.
pub(crate) struct Bytes {
    pub(crate) name: String,
    storage: Storage,
}

enum Storage {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let failed = |source| CheckpointError::Open {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let name = path
            .file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy()
            .into_owned();
        if metadata.is_dir() {
            return Err(failed(std::io::ErrorKind::IsADirectory.into()));
        }
        if metadata.len() == 0 {
            return Ok(Self {
                name,
                storage: Storage::Owned(Vec::new()),
            });
        }
        #[expect(
            unsafe_code,
            reason = "mapping a file is the only way to read a checkpoint without copying it"
        )]
        // SAFETY: the bytes are only read. That nobody truncates or rewrites the file meanwhile is asked of the user,
        // as by every program that maps its models; the hub's files are replaced by renaming, which keeps the mapping.
        let mapped = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(Self {
            name,
            storage: Storage::Mapped(mapped),
        })
    }

    /// Gives the pages that were read back to the system, which reads them again where they are looked at again.
    pub(crate) fn release(&self) {
        #[cfg(unix)]
        if let Storage::Mapped(mapped) = &self.storage {
            #[expect(
                unsafe_code,
                reason = "the advice would lose what was written, and nothing was"
            )]
            // SAFETY: the mapping is of a file and only read, so that the same bytes come back.
            //
            // It is advice: where it is not taken, the pages stay.
            let _ = unsafe { mapped.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }

    pub(crate) fn owned(name: &str, bytes: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            storage: Storage::Owned(bytes),
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bytes")
            .field("name", &self.name)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.storage {
            Storage::Mapped(mapped) => mapped,
            Storage::Owned(bytes) => bytes,
        }
    }
}
