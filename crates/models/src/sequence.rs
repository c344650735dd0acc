//! What a decoder remembers of the tokens that it was fed.

use mlx_rs::{Array, transforms};

use crate::ModelError;
use crate::graph::KvCache;
use crate::host::HostCache;

/// What a decoder remembers of one sequence: how many tokens it has seen, and their keys and values.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) cache: Cache,
    pub(crate) offset: usize,
}

#[derive(Debug)]
pub(crate) enum Cache {
    Graph(Vec<KvCache>),
    Host(HostCache),
}

impl Sequence {
    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.offset
    }

    /// Whether nothing was seen yet.
    pub fn is_empty(&self) -> bool {
        self.offset == 0
    }

    /// Forgets all but the first `len` tokens. The memory is kept for the tokens that follow.
    pub fn truncate(&mut self, len: usize) {
        self.offset = self.offset.min(len);
    }

    /// Another sequence that has seen the first `len` tokens of this one, or all if it has seen fewer. From here each goes
    /// its own way, and gets the bits that it would get without the other.
    ///
    /// Keys and values are shared, not copied, also while a step of this sequence is in flight. On a CPU they are in
    /// pages of 64 tokens, and the first to write to a page that is not full copies that page; in MLX's graph the first
    /// to write copies the buffers of its layers.
    ///
    /// # Errors
    ///
    /// Where MLX fails.
    pub fn fork(&mut self, len: usize) -> Result<Self, ModelError> {
        let offset = self.offset.min(len);
        let cache = match &mut self.cache {
            Cache::Graph(layers) => Cache::Graph(layers.clone()),
            Cache::Host(cache) => Cache::Host(cache.fork(offset)?),
        };
        Ok(Self { cache, offset })
    }

    /// Waits until the keys and values of all tokens that were fed are there.
    ///
    /// # Errors
    ///
    /// What a step failed with.
    pub fn wait(&self) -> Result<(), ModelError> {
        let arrays: Vec<&Array> = match &self.cache {
            Cache::Graph(layers) => layers.iter().flat_map(KvCache::arrays).collect(),
            Cache::Host(cache) => cache.written.iter().collect(),
        };
        Ok(transforms::eval(arrays)?)
    }

    /// Bytes that the keys and values take, with what is reserved and what other sequences share.
    pub fn bytes(&self) -> usize {
        match &self.cache {
            Cache::Graph(layers) => layers.iter().flat_map(KvCache::arrays).map(Array::nbytes).sum(),
            Cache::Host(cache) => cache.bytes(),
        }
    }

    /// Bytes that would be given back if this sequence were dropped now: those of pages that no other sequence shares. In
    /// MLX's graph who shares what is not known, and all count.
    pub fn unshared_bytes(&self) -> usize {
        match &self.cache {
            Cache::Graph(_) => self.bytes(),
            Cache::Host(cache) => cache.unshared_bytes(),
        }
    }
}
