//! What a decoder remembers of the tokens that it was fed.

use std::sync::Arc;

use mlx_rs::{Array, transforms};

use crate::ModelError;
use crate::graph::KvCache;
use crate::host::HostCache;
use crate::kv::KvPlan;

/// What a decoder remembers of one sequence: how many tokens it has seen, and their keys and values.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) cache: Cache,
    pub(crate) offset: usize,
    pub(crate) plan: Arc<KvPlan>,
    /// For each kind of attention the first position, beside the kept ones, whose keys and values are still there.
    pub(crate) released: Vec<usize>,
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

    /// Whether all but the first `len` tokens can be forgotten. Where layers see a window, what it has passed is gone: then
    /// some of the last tokens can be taken back, or all.
    pub fn can_truncate(&self, len: usize) -> bool {
        len >= self.offset || self.plan.can_go_on_at(len, &self.released)
    }

    /// Forgets all but the first `len` tokens, and where that [cannot be](Self::can_truncate), all; what is left is
    /// [`len`](Self::len). The memory is kept for the tokens that follow.
    pub fn truncate(&mut self, len: usize) {
        let possible = self.can_truncate(len);
        let before = self.offset;
        self.offset = if possible { self.offset.min(len) } else { 0 };
        if let Cache::Host(cache) = &mut self.cache
            && self.offset < before
        {
            cache.faults.cut(self.offset);
        }
        if self.offset == 0 {
            self.released.fill(0);
        }
    }

    /// Counts tokens that were fed.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.plan.release(self.offset, &mut self.released);
        self.offset += tokens;
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
    /// Where what the tokens up to `len` see [is gone](Self::can_truncate), and where MLX fails.
    pub fn fork(&mut self, len: usize) -> Result<Self, ModelError> {
        if !self.can_truncate(len) {
            return Err(ModelError::Forgotten { len });
        }
        let offset = self.offset.min(len);
        let cache = match &mut self.cache {
            Cache::Graph(layers) => Cache::Graph(layers.clone()),
            Cache::Host(cache) => Cache::Host(cache.fork(offset)?),
        };
        let mut fork = Self {
            cache,
            offset,
            plan: Arc::clone(&self.plan),
            released: self.released.clone(),
        };
        fork.truncate(offset);
        Ok(fork)
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
        transforms::eval(arrays)?;
        self.check(self.offset)
    }

    /// Looks whether steps failed that have run. On a CPU an array of logits does not say so itself: a step of several
    /// sequences may fail for one of them, whose logits are zeros then.
    ///
    /// # Errors
    ///
    /// What the step failed with that was to compute one of the first `len` tokens, where one did so far.
    pub fn check(&self, len: usize) -> Result<(), ModelError> {
        match &self.cache {
            Cache::Graph(_) => Ok(()),
            Cache::Host(cache) => cache.check(len),
        }
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
