//! What can go wrong, in words that say what happened and what to do.

use std::io;
use std::path::{Path, PathBuf};

use crate::progress::megabytes;

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    #[error(
        "the disk is full: {what} needs {} ({needed} bytes) in {}\n  free that much there, or set \
         MLX_ENGINE_CACHE to a folder on another disk, and run the command again",
        megabytes(*needed), folder.display()
    )]
    DiskFull {
        what: String,
        folder: PathBuf,
        needed: u64,
    },

    #[error(
        "{file} is not the file that this workspace pins\n  expected SHA-256 {expected}\n  got      SHA-256 {got}\n  \
         {}", advice(*by_hand)
    )]
    Hash {
        file: String,
        expected: &'static str,
        got: String,
        by_hand: bool,
    },

    #[error(
        "{file} did not come: {why}\n  without a network, place {file} in {} and run cargo xtask setup again",
        folder.display()
    )]
    Download {
        file: &'static str,
        why: String,
        folder: PathBuf,
    },

    #[error("{archive} cannot be unpacked: {why}")]
    Archive { archive: String, why: String },

    #[error("{tool} was not found, and {purpose} needs it\n  {install}")]
    MissingTool {
        tool: String,
        purpose: &'static str,
        install: &'static str,
    },

    #[error("{command} failed ({status})")]
    Failed { command: String, status: String },

    #[error("{0}")]
    Refused(String),
}

fn advice(by_hand: bool) -> &'static str {
    if by_hand {
        "delete it, or replace it with the pinned version, and run cargo xtask setup again"
    } else {
        "nothing was kept; if it happens again, the package index in use serves another file under this name"
    }
}

/// Turns an I/O error into one that names the action and the path.
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            path: path.to_path_buf(),
            source,
        })
    }
}
