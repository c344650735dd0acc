//! Keys and values on disk, so that a restart finds what was computed before.
//!
//! What a sequence has seen is cut into chunks of 256 tokens. The name of a chunk is a hash over the model, all tokens
//! before the chunk and its own, so that a name that is found is the right one. Files are written on a thread of their
//! own and read on another, one after the other, and are nothing but a help: what cannot be read, is not what its name says
//! or comes too late is computed again.

mod chain;
mod file;
mod reader;
mod store;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use mlx_engine_core::ParamError;

use self::chain::{CHUNK, Name};
pub(crate) use self::reader::Fetch;
use self::reader::Reader;
pub(crate) use self::store::Access;
use self::store::Store;
use crate::config::DiskCacheConfig;

/// Files that may wait to be written; each is held in memory.
const WAITING: usize = 2;

/// Sequences that may wait to be cut into files.
const PENDING: usize = 16;

/// A file that is to be written.
struct Job {
    name: Name,
    file: Vec<u8>,
}

/// A sequence of which chunks are to be written.
#[derive(Debug)]
struct Pending {
    tokens: Vec<u32>,
    names: Vec<Name>,
    /// The chunk that is next.
    next: usize,
}

/// The chunks on disk, and those on their way there.
pub(crate) struct DiskCache {
    store: Arc<Store>,
    key: Name,
    pending: VecDeque<Pending>,
    jobs: Option<SyncSender<Job>>,
    writer: Option<JoinHandle<()>>,
    reader: Reader,
}

/// A chunk that is to be written now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// All tokens up to its end.
    pub(crate) tokens: Vec<u32>,
    /// Its positions.
    pub(crate) range: Range<usize>,
    name: Name,
}

impl DiskCache {
    /// Opens a folder for a model of this identity, which names all that keys and values depend on.
    pub(crate) fn open(config: &DiskCacheConfig, identity: &str) -> Result<Self, ParamError> {
        Self::open_with(config, identity, Access::default())
    }

    /// The same with another way to the disk.
    pub(crate) fn open_with(
        config: &DiskCacheConfig,
        identity: &str,
        access: Access,
    ) -> Result<Self, ParamError> {
        let refused = |error: std::io::Error| {
            let allowed = format!("a folder that can be written to ({error})");
            ParamError::new("prefix_cache.disk.folder", config.folder.display(), allowed)
        };
        let store = Arc::new(Store::open(config, access).map_err(refused)?);
        let (jobs, receiver) = sync_channel(WAITING);
        let written = Arc::clone(&store);
        let writer = std::thread::Builder::new()
            .name("mlx-engine-disk".to_owned())
            .spawn(move || write(&written, &receiver))
            .map_err(refused)?;
        let reader = Reader::start(Arc::clone(&store)).map_err(refused)?;
        Ok(Self {
            store,
            key: chain::key(identity),
            pending: VecDeque::new(),
            jobs: Some(jobs),
            writer: Some(writer),
            reader,
        })
    }

    /// How many of the tokens are on disk, by the names of the files.
    pub(crate) fn known(&self, tokens: &[u32]) -> usize {
        let names = chain::names(self.key, tokens);
        CHUNK * names.take_while(|name| self.store.has(name)).count()
    }

    /// Has the blocks read of as many of the tokens as are on disk and whole.
    pub(crate) fn fetch(&self, tokens: &[u32]) -> Fetch {
        let chunks = chain::names(self.key, tokens).zip(tokens.chunks_exact(CHUNK));
        let known = chunks.take_while(|(name, _)| self.store.has(name));
        self.reader
            .fetch(known.map(|(name, tokens)| (name, tokens.to_vec())).collect())
    }

    /// Gives files up whose blocks the model does not take.
    pub(crate) fn refuse(&self, tokens: &[u32]) {
        chain::names(self.key, tokens).for_each(|name| self.store.remove(&name));
    }

    /// Notes that a sequence was computed which may be written.
    pub(crate) fn note(&mut self, tokens: &[u32]) {
        let names: Vec<Name> = chain::names(self.key, tokens).collect();
        let whole = names.len() * CHUNK;
        if names.iter().all(|name| self.store.has(name)) {
            return;
        }
        if self.pending.len() == PENDING {
            self.pending.pop_front();
        }
        self.pending.push_back(Pending {
            tokens: tokens[..whole].to_vec(),
            names,
            next: 0,
        });
    }

    /// The chunk that is to be written next.
    pub(crate) fn piece(&mut self) -> Option<Piece> {
        while let Some(first) = self.pending.front_mut() {
            let Some(&name) = first.names.get(first.next) else {
                self.pending.pop_front();
                continue;
            };
            let range = first.next * CHUNK..(first.next + 1) * CHUNK;
            if self.store.has(&name) {
                first.next += 1;
                continue;
            }
            return Some(Piece {
                tokens: first.tokens[..range.end].to_vec(),
                range,
                name,
            });
        }
        None
    }

    /// Hands a chunk over to be written; without waiting, unless told to. `false` where there is no place for it now.
    pub(crate) fn write(&mut self, piece: &Piece, block: &[u8], wait: bool) -> bool {
        let Some(jobs) = &self.jobs else { return false };
        let tokens = &piece.tokens[piece.range.clone()];
        let file = match file::encode(&piece.name, tokens, block) {
            Ok(file) => file,
            Err(reason) => {
                tracing::warn!(reason, "a prefix could not be written");
                self.pending.pop_front();
                return true;
            }
        };
        let job = Job {
            name: piece.name,
            file,
        };
        let taken = if wait {
            jobs.send(job).is_ok()
        } else {
            !matches!(jobs.try_send(job), Err(TrySendError::Full(_)))
        };
        if taken && let Some(first) = self.pending.front_mut() {
            first.next += 1;
        }
        taken
    }

    /// Gives up writing the sequence that is next: it is not kept any more.
    pub(crate) fn give_up(&mut self) {
        self.pending.pop_front();
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        // What was handed over is written, and nothing else.
        drop(self.jobs.take());
        if let Some(thread) = self.writer.take() {
            // It has no result, and nobody to tell of a panic.
            let _ = thread.join();
        }
    }
}

/// Writes files until nobody hands any over.
fn write(store: &Store, jobs: &Receiver<Job>) {
    for Job { name, file } in jobs {
        match store.write(&name, &file) {
            Ok(true) => {}
            Ok(false) => tracing::debug!(file = %name, "no room on disk for a prefix"),
            Err(error) => tracing::warn!(file = %name, %error, "a prefix could not be written"),
        }
    }
}
