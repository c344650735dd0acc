//! Keys and values on disk, so that a restart finds what was computed before.
//!
//! What a sequence has seen is cut into chunks of 256 tokens. The name of a chunk is a hash over the model, all tokens
//! before the chunk and its own, so that a name that is found is the right one. Files are written on a thread of their
//! own and read on another, one after the other, and are nothing but a help: nobody waits for a disk, and what cannot be read, is
//! not what its name says or comes too late is computed again.

mod chain;
mod file;
mod reader;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use mlx_engine_core::ParamError;

use self::chain::{CHUNK, Name};
pub(crate) use self::reader::Fetch;
use self::reader::Reader;
pub(crate) use self::store::Access;
use self::store::Store;
use self::writer::{Job, Writer};
use crate::config::DiskCacheConfig;

/// Sequences that may wait to be cut into files.
const PENDING: usize = 16;

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
    writer: Writer,
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
        let patience = access.patience;
        let store = Arc::new(Store::open(config, access).map_err(refused)?);
        let writer = Writer::start(Arc::clone(&store), patience).map_err(refused)?;
        let reader = Reader::start(Arc::clone(&store)).map_err(refused)?;
        Ok(Self {
            store,
            key: chain::key(identity),
            pending: VecDeque::new(),
            writer,
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

    /// Whether another file may be handed over.
    pub(crate) fn has_room(&self) -> bool {
        self.writer.has_room()
    }

    /// Ends when there is [room](Self::has_room).
    pub(crate) fn room(&self) -> impl Future<Output = ()> + use<> {
        self.writer.room()
    }

    /// Hands a chunk over to be written. `false` where there is no room for it now.
    pub(crate) fn write(&mut self, piece: &Piece, block: &[u8]) -> bool {
        let tokens = &piece.tokens[piece.range.clone()];
        let file = match file::encode(&piece.name, tokens, block) {
            Ok(file) => file,
            Err(reason) => {
                tracing::warn!(reason, "a prefix could not be written");
                self.pending.pop_front();
                return true;
            }
        };
        let name = piece.name;
        let taken = self.writer.write(Job { name, file });
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
