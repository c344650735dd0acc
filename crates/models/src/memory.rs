//! How much memory models take, in MLX and outside it.
//!
//! Both are counted for the whole process: MLX counts its arrays, and what the kernels of a CPU compute with is counted
//! here.

use std::sync::atomic::{AtomicUsize, Ordering};

use mlx_engine_kernels::KernelError;
use mlx_rs::memory;

use crate::ModelError;

static ACTIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// What [`ACTIVE`] may come to.
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Limits what is computed with outside MLX, in bytes; `None` lifts the limit. Keys and values that would go beyond it are
/// refused as out of memory, and the rest stays as it was.
pub fn set_memory_limit(bytes: Option<u64>) {
    let limit = bytes.map_or(usize::MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    LIMIT.store(limit, Ordering::Relaxed);
}

/// Whether so many bytes more stay within the limit.
pub(crate) fn check_room(bytes: usize) -> Result<(), KernelError> {
    if ACTIVE.load(Ordering::Relaxed).saturating_add(bytes) > LIMIT.load(Ordering::Relaxed) {
        return Err(KernelError::OutOfMemory { bytes });
    }
    Ok(())
}

/// Bytes that are counted as long as this lives.
#[derive(Debug, Default)]
pub(crate) struct Held(usize);

impl Held {
    pub(crate) fn new(bytes: usize) -> Self {
        let mut held = Self(0);
        held.set(bytes);
        held
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0
    }

    pub(crate) fn set(&mut self, bytes: usize) {
        if bytes > self.0 {
            let active = ACTIVE.fetch_add(bytes - self.0, Ordering::Relaxed) + bytes - self.0;
            PEAK.fetch_max(active, Ordering::Relaxed);
        } else {
            ACTIVE.fetch_sub(self.0 - bytes, Ordering::Relaxed);
        }
        self.0 = bytes;
    }
}

/// As many again.
impl Clone for Held {
    fn clone(&self) -> Self {
        Self::new(self.0)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// The most bytes that models had allocated since [`reset_peak_memory`]: MLX's most and ours, which need not have been
/// at the same moment.
///
/// # Errors
///
/// None that MLX documents.
pub fn peak_memory() -> Result<u64, ModelError> {
    Ok((memory::peak_memory()? + PEAK.load(Ordering::Relaxed)) as u64)
}

/// Bytes that models take now.
///
/// # Errors
///
/// None that MLX documents.
pub fn active_memory() -> Result<u64, ModelError> {
    Ok((memory::active_memory()? + ACTIVE.load(Ordering::Relaxed)) as u64)
}

/// Bytes that MLX keeps for later arrays.
///
/// # Errors
///
/// None that MLX documents.
pub fn cache_memory() -> Result<u64, ModelError> {
    Ok(memory::cache_memory()? as u64)
}

/// Lets [`peak_memory`] start again.
///
/// # Errors
///
/// None that MLX documents.
pub fn reset_peak_memory() -> Result<(), ModelError> {
    PEAK.store(ACTIVE.load(Ordering::Relaxed), Ordering::Relaxed);
    Ok(memory::reset_peak_memory()?)
}

/// Gives memory back to the system that MLX keeps for later arrays.
///
/// # Errors
///
/// None that MLX documents.
pub fn clear_cache() -> Result<(), ModelError> {
    Ok(memory::clear_cache()?)
}

/// Sets how much MLX may allocate in this process before it waits for what runs to give some back, and how much of what
/// was given back it keeps for later arrays. It may go beyond the first where nothing runs that could give any back.
///
/// # Errors
///
/// None that MLX documents.
pub fn limit_memory(bytes: u64, kept: u64) -> Result<(), ModelError> {
    let size = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
    memory::set_memory_limit(size(bytes))?;
    memory::set_cache_limit(size(kept))?;
    Ok(())
}
